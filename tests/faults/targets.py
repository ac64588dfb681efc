"""Every reader of the package: valid documents, and what reads them."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.serving.fields import ApiError
from tests.data import hf
from tests.faults import mutate
from tests.helpers import run_files


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      name: for `--only`.
      documents: that it reads without a word.
      change: how a document is made wrong.
      read: takes a document; gives anything, or raises what it may.
      may_raise: errors that are the reader's own.
    """

    name: str
    documents: tuple[bytes, ...]
    change: mutate.Mutation
    read: Callable[[bytes], Any]
    may_raise: tuple[type[Exception], ...] = (InputError,)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _written(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
    """A reader of a document that lies at a path; whatever else lies there stays."""

    def call(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    return call


def _configurations(directory: Path) -> Iterator[Target]:
    """config.json of every family, generation_config.json, and settings of quantisation."""
    from rlae_jax.models import checkpoint_files
    from rlae_jax.models.stored import stored_tensors

    def read(place: Path) -> None:
        source = checkpoint_files.read_source(place)
        checkpoint_files.read_config(source, place, dtype="float32", precision=None, tensors=False)
        with contextlib.suppress(InputError):  # few documents belong to the tensors that lie there
            config = checkpoint_files.read_config(source, place, dtype="float32", precision=None)
            stored_tensors(source.family, config)

    case = hf.read_stored("llama", _first("llama"))
    place = directory / "configurations"
    hf.write_checkpoint(place, case.config, case.tensors, case.seed)  # some look for names of tensors
    cases = [
        case["config"] for path in sorted(hf.REFERENCE.glob("*.json")) for case in json.loads(path.read_text()).values()
    ]
    yield Target(
        "config", tuple(map(_json, cases)), mutate.json_bytes, _written(place / "config.json", lambda: read(place))
    )
    place = directory / "generation"
    place.mkdir()
    (place / "config.json").write_bytes(_json(hf.read_stored("llama", _first("llama")).config))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": True, "temperature": 0.6}
    yield Target(
        "generation",
        (_json(generation),),
        mutate.json_bytes,
        _written(place / "generation_config.json", lambda: read(place)),
    )


def _first(family: str) -> str:
    return next(iter(json.loads((hf.REFERENCE / f"{family}.json").read_text())))


def _weights(directory: Path) -> Iterator[Target]:
    """safetensors, their index, adapters and quantised checkpoints."""
    import rlae_jax as rj
    from rlae_jax.models import checkpoint_files, stored
    from rlae_jax.models.lm import open_checkpoint
    from tests.helpers import quantised
    from tests.helpers.adapters import random_adapter

    case = hf.read_stored("llama", _first("llama"))
    place = directory / "weights"
    hf.write_checkpoint(place, case.config, case.tensors, case.seed)
    tensors = place / "model.safetensors"
    whole = tensors.read_bytes()
    lm = rj.load(place)

    def read_all(path: Path) -> None:
        for name in stored.tensor_headers(path):
            stored.read_tensor(path, name)

    other = directory / "alone"
    other.mkdir()
    alone = other / "model.safetensors"
    yield Target("safetensors", (whole,), mutate.safetensors, _written(alone, lambda: read_all(alone)))
    yield Target("checkpoint", (whole,), mutate.safetensors, _written(tensors, lambda: rj.load(place)))

    sharded = directory / "sharded"
    shutil.copytree(place, sharded)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    names = stored.tensor_headers(sharded / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    def read_index() -> None:
        opened = open_checkpoint(sharded, encoder=False, dtype="float32", precision=None)
        checkpoint_files.open_tensors(opened.path, opened.source, opened.config)

    yield Target(
        "index", (_json(index),), mutate.json_bytes, _written(sharded / "model.safetensors.index.json", read_index)
    )

    adapter = directory / "adapter"
    rj.save_adapter(random_adapter(lm, 0), lm, adapter)
    for name, change in (("adapter_config.json", mutate.json_bytes), ("adapter_model.safetensors", mutate.safetensors)):
        copy = directory / f"copy-{name}"
        shutil.copytree(adapter, copy)
        yield Target(
            name.replace(".", "_").removesuffix("_json").removesuffix("_safetensors"),
            ((copy / name).read_bytes(),),
            change,
            _written(copy / name, functools.partial(rj.load_adapter, copy, lm)),
        )

    def read_quantised(place: Path) -> None:
        opened = open_checkpoint(place, encoder=False, dtype="float32", precision=None)
        source = checkpoint_files.open_tensors(opened.path, opened.source, opened.config)
        for name in list(source.headers)[:3]:
            source.read(name)

    for name in ("gptq", "awq", "fp8", "packed", "int8", "float4", "modelopt"):
        place = directory / f"quantised-{name}"
        quantised.write_llama(place, getattr(quantised, f"make_{name}"))
        for file, change in (("config.json", mutate.json_bytes), ("model.safetensors", mutate.safetensors)):
            own = directory / f"quantised-{name}-{file}"
            shutil.copytree(place, own)
            yield Target(
                f"{name}_{file.split('.')[0]}",
                ((own / file).read_bytes(),),
                change,
                _written(own / file, functools.partial(read_quantised, own)),
            )


def _gguf(directory: Path) -> Iterator[Target]:
    """A GGUF file: its container, its settings, its tokenizer, its tensors."""
    import rlae_jax as rj
    from tests.helpers import gguf_files

    case = hf.read_stored("llama", _first("llama"))
    place = directory / "for-gguf"
    hf.write_checkpoint(place, case.config, case.tensors, case.seed)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))][: case.config["vocab_size"]]

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([1] * len(tokens))

    path = gguf_files.write(directory / "model.gguf", place, add=add)
    plain = gguf_files.write(directory / "plain.gguf", place)
    yield Target("gguf", (path.read_bytes(), plain.read_bytes()), mutate.raw, _written(path, lambda: rj.load(path)))


def _tokenizers(directory: Path) -> Iterator[Target]:
    """The files of a tokenizer, and chat templates."""
    from rlae_jax.fusion.codec import make_codec
    from rlae_jax.models.config import ModelConfig
    from rlae_jax.models.lm import LM, fit_tokenizer, read_tokenizer
    from rlae_jax.specialists import make_pair_tokenizer, make_tokenizer
    from tests.faults.small import TINY

    templates = (
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}=",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages | length }}{% for m in messages | reverse %}{{ m.content | trim }}{% endfor %}",
    )
    config = ModelConfig(vocab=64, **TINY)
    for kind, make in (("pair", make_pair_tokenizer), ("bytes", functools.partial(make_tokenizer, 1))):
        for file, change in (("tokenizer.json", mutate.json_bytes), ("tokenizer_config.json", mutate.json_bytes)):
            place = directory / f"tokenizer-{kind}-{file}"
            tokenizer = make()
            tokenizer.chat_template = templates[0]
            tokenizer.save_pretrained(place)

            def read(place: Path = place) -> None:
                tokenizer = read_tokenizer(place)
                fit_tokenizer(config, tokenizer, place)

            yield Target(
                f"{kind}_{file.removesuffix('.json')}",
                ((place / file).read_bytes(),),
                change,
                _written(place / file, read),
            )
    tokenizer = make_pair_tokenizer()

    def render(data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        codec = make_codec([LM(dataclasses.replace(config, end_ids=(1,)), {}, tokenizer, name="tiny")])
        codec.encode([[{"role": "user", "content": "rs12="}], "12="], True)

    yield Target("chat_template", tuple(map(str.encode, templates)), mutate.text_bytes, render)


def _data(directory: Path) -> Iterator[Target]:
    """What users give as tasks and prompts."""
    from rlae_jax.tasks import get_task, jsonl
    from rlae_jax.tasks.prompts import graded_responses, read_prompts

    rows = [{"prompt": f"what is {i}?", "answer": str(i), "meta": {"k": [i]}} for i in range(24)]
    chats = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": [str(i), "x"]} for i in range(24)]
    of_lines = tuple(b"".join(_json(row) + b"\n" for row in some) for some in (rows, chats))
    of_json = (_json(rows), _json(chats))
    table = {kind: [kind.join(("prompt", "answer"))] + [f"what is {i}?{kind}{i}" for i in range(24)] for kind in ",\t"}
    of_csv, of_tsv = ((("\n".join(table[kind]) + "\n").encode(),) for kind in ",\t")
    kinds = {
        "jsonl": (of_lines, mutate.lines),
        "json": (of_json, mutate.json_bytes),
        "csv": (of_csv, mutate.text_bytes),
        "tsv": (of_tsv, mutate.text_bytes),
    }
    for kind, (documents, change) in kinds.items():
        path = directory / f"task.{kind}"
        yield Target(f"task_{kind}", documents, change, _written(path, functools.partial(jsonl, path)))
        prompts = directory / f"prompts.{kind}"
        yield Target(
            f"prompts_{kind}", documents[:1], change, _written(prompts, functools.partial(read_prompts, prompts))
        )
    psych = directory / "psych.json"
    counsel = [{"instruction": "help", "input": f"I feel {i}", "output": "yes"} for i in range(24)]
    yield Target("psych8k", (_json(counsel),), mutate.json_bytes, _written(psych, lambda: read_prompts(psych)))
    pair = directory / "pair.csv"
    head = "prompt,hq1,hq2,mq1,lq1,lq2,lq3,lq4,lq5,topic"
    graded = "\n".join([head, *(f"I feel {i}," + ",".join(f"r{j} {i}" for j in range(8)) + ",t" for i in range(24))])
    yield Target(
        "graded", ((graded + "\n").encode(),), mutate.text_bytes, _written(pair, lambda: graded_responses(pair))
    )
    for name, row in {
        "gsm8k": {"question": "1+1?", "answer": "it is\n#### 2"},
        "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "x"},
        "triviaqa": {"question": "who?", "answer": {"value": "me", "aliases": ["I"], "normalized_aliases": ["i"]}},
    }.items():
        place = directory / "benchmarks" / name
        place.mkdir(parents=True)
        some = b"".join(_json(row | {"question": f"{row['question']} {i}"}) + b"\n" for i in range(24))
        for split in ("train", "validation", "test", "dev"):
            (place / f"{split}.jsonl").write_bytes(some)
        yield Target(
            f"benchmark_{name}",
            (some,),
            mutate.lines,
            _written(place / "test.jsonl", functools.partial(get_task, name, data_dir=place.parent, shots=0)),
        )


def _specifications(directory: Path) -> Iterator[Target]:
    """What is given on the command line as a text."""
    from rlae_jax.ablate import configured, make_cells, parse_settings, parse_vary
    from rlae_jax.commands.options import HeldOptions, MemberOptions
    from rlae_jax.emorl.scorers import get_objectives
    from rlae_jax.fusion.operators import get_operator
    from rlae_jax.sharding import read_mesh
    from rlae_jax.tasks import get_task
    from rlae_jax.tasks.rewards import get_reward

    config = PPOConfig.demo()

    def vary(text: str) -> None:
        make_cells(config, parse_vary([text], config))

    def end_ids(text: str) -> None:
        MemberOptions(models=("a", "b"), end_ids=tuple(text.split(" ")), held=HeldOptions()).read_end_ids(2)

    readers: Mapping[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
        "fusion": (
            ("linear", "topk:5", "primary:1", "proxy:0.5", "loglinear"),
            lambda text: get_operator(text, 3 if text.startswith("proxy") else 2),
        ),
        "mesh": (("data=1", "data=1,model=1"), read_mesh),
        "end_ids": (("1,2 3", "50256"), end_ids),
        "vary": (("span_length=2,4,8", "agent.reads=hidden+span,stats", "encoder=hidden,none", "algo=ppo,mappo"), vary),
        "set": (
            ("prompts=256", "agent.projection=16", "learning_rate=0.1", "target_kl=none"),
            lambda text: configured(config, parse_settings([text], config)),
        ),
        "reward": (("exact_match", "token_f1", "math_equivalence"), get_reward),
        "objective": (("coverage", "brevity", "diversity_2"), lambda text: get_objectives([text])),
        "task": (("skills", "overlap"), get_task),
    }
    for name, (texts, read) in readers.items():
        yield Target(
            f"option_{name}",
            tuple(map(str.encode, texts)),
            mutate.text_bytes,
            lambda data, read=read: read(data[:100_000].decode("utf-8", "replace")),  # what Linux has room for
        )
    del directory


def _serving(directory: Path) -> Iterator[Target]:
    """Bodies of requests."""
    from rlae_jax.serving.api import read_chat, read_completion
    from rlae_jax.serving.fields import read_json
    from tests.helpers.serving import AGENT, FakeEngine, make_catalogue

    catalogue = make_catalogue(FakeEngine())
    completion = {
        "model": "both",
        "prompt": ["one", "two"],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "best_of": 2,
        "logprobs": 3,
        "stop": ["\n"],
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "echo": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "user": "me",
        "rlae": {"weights": [0.5, 0.5], "span_length": 2, "attribution": True},
    }
    chat = {key: completion[key] for key in ("temperature", "top_p", "seed", "stop", "n")}
    chat |= {
        "model": AGENT,
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    refused = (ApiError,)
    yield Target(
        "completion",
        (_json(completion), _json({"model": "both", "prompt": [1, 2]})),
        mutate.json_bytes,
        lambda data: read_completion(read_json(data), catalogue),
        refused,
    )
    yield Target("chat", (_json(chat),), mutate.json_bytes, lambda data: read_chat(read_json(data), catalogue), refused)
    del directory


def _unions(directory: Path) -> Iterator[Target]:
    """The cache of unions."""
    from rlae_jax.fusion.vocabulary.union import UnionVocabulary, build
    from rlae_jax.specialists import make_tokenizer

    path = directory / "union.npz"
    union = build([make_tokenizer(1), make_tokenizer(2)], ["ones", "pairs"], [[1], [1]])
    union.save(path)
    yield Target("union", (path.read_bytes(),), mutate.raw, _written(path, lambda: UnionVocabulary.load(path)))


def _runs(directory: Path) -> Iterator[Target]:
    """What the commands leave in their directories. All lie in one; every reader finds the others as they should be."""
    root = directory / "runs"
    run_files.make(root)

    def read(path: Path, good: bytes, readers: Sequence[Callable[[Path], Any]], data: bytes) -> None:
        *others, last = readers  # the others may want another run's file
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                for reader in others:
                    path.write_bytes(data)
                    with contextlib.suppress(InputError):
                        reader(root)
                path.write_bytes(data)
                last(root)
            finally:
                path.write_bytes(good)

    for name, readers in run_files.READERS.items():
        good = (root / name).read_bytes()
        change = mutate.lines if name.endswith("l") else mutate.json_bytes
        yield Target(name, (good,), change, functools.partial(read, root / name, good, readers))


PARTS = (_configurations, _weights, _gguf, _tokenizers, _data, _specifications, _serving, _unions, _runs)


def make_targets(directory: Path) -> list[Target]:
    """All readers, with their files in an empty directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [target for part in PARTS for target in part(directory)]
