"""The members of the benchmarks with several tokenizers: random Llama models, and a small tokenizer trained here.

In: a tokenizer's directory and a seed. Out: a Hugging Face directory with that tokenizer, which this program and
transformers load alike. Same arguments, same files.

The models are random: they write any token of their vocabularies, rare ones included, so that an entry of the union
takes more tokens than on real text. Quote speeds with the tokens per step beside them.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers
import transformers

import rlae_jax as rj
from benchmarks.decode import LARGE
from rlae_jax.models import ModelConfig, transformer

END = "<|endoftext|>"


def tiny_llama(
    directory: Path,
    tokenizer_dir: Path,
    *,
    width: int = 64,
    layers: int = 5,
    heads: int = 8,
    kv_heads: int = 4,
    ffn: int = 172,
    seed: int = 0,
) -> Path:
    """About 0.23 million parameters beside the embedding by default: the shape of stories260K. Returns `directory`."""
    config = ModelConfig(
        vocab=1,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        ffn_width=ffn,
        norm_eps=1e-5,
        tied_head=True,
    )
    return _write(directory, config, tokenizer_dir, seed)


def llama_134m(directory: Path, tokenizer_dir: Path, *, seed: int = 0) -> Path:
    """The shape of `benchmarks.decode`'s 134M members, with this tokenizer's vocabulary. Returns `directory`."""
    return _write(directory, LARGE, tokenizer_dir, seed)


def _write(directory: Path, config: ModelConfig, tokenizer_dir: Path, seed: int) -> Path:
    tokenizer, config = fit(config, tokenizer_dir)
    rj.LM(config, transformer.init_params(config, jax.random.key(seed)), tokenizer).save(directory)
    return Path(directory)


def fit(config: ModelConfig, tokenizer_dir: Path) -> tuple[Any, ModelConfig]:
    """A tokenizer, and the configuration with its vocabulary."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    end = tokenizer.eos_token_id
    vocab = max(tokenizer.get_vocab().values()) + 1
    ends = () if end is None else (end,)
    return tokenizer, dataclasses.replace(config, vocab=vocab, bos_id=tokenizer.bos_token_id, end_ids=ends)


def train_small_tokenizer(directory: Path, text_files: Sequence[Path], *, size: int = 600) -> Path:
    """A byte-level BPE tokenizer of `size` tokens, of which 256 are the bytes. Returns `directory`.

    Args:
      text_files: plain text, or JSON lines, whose string fields are the text.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(text_files), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(directory)
    return Path(directory)


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            if Path(path).suffix != ".jsonl":
                yield from lines
                continue
            for line in lines:
                yield from (value for value in json.loads(line).values() if isinstance(value, str))
