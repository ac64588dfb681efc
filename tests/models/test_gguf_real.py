"""Two real GGUF files against transformers' reading of the same files.

transformers dequantises the tensors and builds the model by itself; what a text's tokens are is this project's reading,
which is compared with transformers' where that is right. The files come from a package index and are large: these
tests are rare, and skipped where there is no index. `XLA_FLAGS= pytest -m rare tests/models/test_gguf_real.py` runs
programs that are slower to compile and faster than those of other tests, in half the time.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

import rlae_jax as rj
from tests.helpers.real_models import real_model

pytestmark = pytest.mark.rare
pytest.importorskip("gguf", reason="the gguf package is not installed")

TOKENS, CONTEXT = 64, 256
CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Say hello in Spanish.",
    "List three prime numbers.",
    "Why is the sky blue?",
    "Name an animal that can fly.",
    "What is 12 times 12?",
    "Who wrote Romeo and Juliet?",
    "Reply with one word: yes or no?",
    "Translate 'good morning' into German.",
]
BEGINNINGS = [
    "The quick brown fox",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "The three laws of motion are",
    "In 1969, the first",
    "Dear Sir or Madam,",
    "1, 2, 3, 4,",
    "Der Himmel ist",
    "To make bread you need",
]


def near_tie(logits: np.ndarray, ours: int, theirs: int) -> bool:
    """Whether rounding may have decided between two tokens."""
    return abs(logits[ours] - logits[theirs]) < 1e-4 * abs(logits).max()


@pytest.fixture(params=["smollm2", "gemma3"])
def name(request):
    return request.param


@pytest.fixture
def reference(name, torch):
    """transformers' own reading of the file, in float32. (`from_pretrained(gguf_file=...)` is this, and asks for the
    accelerate package besides.)"""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = real_model(name)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"])
    assert not unexpected
    model.tie_weights()
    return model.eval()


def prompts_of(lm) -> list[list[int]]:
    """Twenty prompts: chats as the model's template has them, and beginnings; of a base model twenty beginnings."""
    tokenizer = lm.tokenizer
    if tokenizer.chat_template is None:
        return [tokenizer(text)["input_ids"] for text in [*BEGINNINGS, *CHATS]]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in CHATS
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chats] + [
        tokenizer(text)["input_ids"] for text in BEGINNINGS
    ]


def test_a_real_file_writes_what_transformers_writes(name, reference, torch):
    lm = rj.load(real_model(name), context=CONTEXT)
    prompts = prompts_of(lm)
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    out = rj.Ensemble([lm]).generate(prompt_ids=ids, prompt_mask=mask, max_new_tokens=TOKENS)
    with torch.no_grad():
        written = reference.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=list(lm.config.end_ids),
            pad_token_id=lm.config.end_ids[0],
        )
    stopped = 0
    for prompt, ours, finished, row in zip(prompts, out.tokens, out.finish_reasons, written.tolist(), strict=True):
        theirs = row[longest:]
        end = next((i for i, token in enumerate(theirs) if token in lm.config.end_ids), len(theirs))
        stopped += finished == "stop"
        theirs, ours = [*theirs[:end], -1], [*ours, -1]  # the end, or the limit
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + theirs[:at]])).logits[0, -1].numpy()
            two = [token if token >= 0 else lm.config.end_ids[0] for token in (ours[at], theirs[at])]
            assert near_tie(logits, *two), f"{lm.tokenizer.decode(prompt)!r}: token {at} differs"
    if name == "smollm2":
        assert lm.config.end_ids == (lm.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
        assert stopped >= 3
        spoken = rj.Ensemble([lm]).generate(CHATS[:2], chat=True, max_new_tokens=TOKENS)
        assert spoken.tokens == out.tokens[:2]


def test_saving_a_real_file(tmp_path):
    path = real_model("smollm2")
    lm = rj.load(path)
    lm.save(tmp_path / "saved")
    again = rj.load(tmp_path / "saved")
    text = "Saved, 1,024 times:\n\n\tand loaded <|im_end|> again."
    assert again.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    assert again.config.end_ids == lm.config.end_ids
    assert again.fingerprint() == lm.fingerprint()


def test_both_write_over_their_union():
    members = [rj.load(real_model(name), context=CONTEXT) for name in ("smollm2", "gemma3")]
    assert [lm.name for lm in members] == ["SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m-Q4_K_M"]
    ensemble = rj.Ensemble(members)
    prompts = ["The capital of France is", "Water boils at 100 degrees"]
    alone = [rj.Ensemble([lm]).generate(prompts, max_new_tokens=12).texts for lm in members]
    for weights, texts in zip(([1, 0], [0, 1]), alone, strict=True):
        assert ensemble.generate(prompts, weights=weights, max_new_tokens=12).texts == texts
    together = ensemble.generate(prompts, max_new_tokens=12)
    assert "Paris" in together.texts[0]


def passages(shared: Path) -> list[str]:
    """Of every kind of text in the shared data a few pieces."""
    found = []
    for path in sorted((shared / "data").rglob("*")):
        if path.suffix in (".jsonl", ".csv"):
            text = path.read_text()
        elif path.suffix == ".gz":
            text = gzip.decompress(path.read_bytes()).decode()
        else:
            continue
        found += [text[start : start + 3000] for start in range(0, min(len(text), 150_000), 50_000)]
        if path.suffix == ".jsonl":  # and as people read it, without JSON's escapes
            rows = [json.loads(line) for line in text.splitlines()[:20]]
            found.append("\n".join(value for row in rows for value in row.values() if isinstance(value, str)))
    return found


def test_ids_of_real_text_are_those_of_the_original_tokenizers(name, shared, torch):
    # transformers reads the metadata with torch.
    from transformers import AutoTokenizer

    from rlae_jax.models.lm import read_tokenizer

    path = real_model(name)
    ours, theirs = read_tokenizer(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if name == "smollm2":
        # What SmolLM2's own tokenizer.json has; transformers takes GPT-2's from a GGUF file.
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    texts = passages(shared)
    assert len(texts) > 50
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=True) == text
