"""Inputs that no command can use, and how each of them takes one.

    python -m tests.faults.bad_inputs [PART]

An input is refused as it should be if the command ends with a status of its own, says why in a few lines without a
traceback, within seconds, and leaves everything as it was. A line per input that is not (or whose line has PART in it),
then `bad_inputs: N of M`. All run in this process, one after another, in a small world of files, good and bad;
`try_alone` runs one as a user does.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from rlae_jax import ranges
from rlae_jax.commands import main as commands
from rlae_jax.commands import watch
from tests.faults import small

SECONDS, LINES, KIB = 20, 25, 2 * 2**20  # that a refusal may take; tyro frames what cannot be parsed
_ROOT = Path(__file__).resolve().parents[2]
_MODELS = ["--models", "alpha", "beta"]
_DATA = ["--data", "mine.jsonl", "--prompt-field", "q", "--answer-field", "a"]
# What each command needs, so that a bad option is the only thing wrong.
CALLS: dict[str, list[str]] = {
    "demo": ["--out", "new"],
    "specialists": ["--task", "skills", "--out", "new"],
    "generate": [*_MODELS, "--prompt", "rs4821=", "--max-new-tokens", "4"],
    "train": [*_MODELS, *_DATA, "--out", "new", "--iterations", "1"],
    "evaluate": [*_MODELS, *_DATA, "--out", "new", "--methods", "uniform"],
    "lm-eval": ["--models", "alpha", "--tasks", "arc_easy"],
    "ablate": [*_MODELS, *_DATA, "--out", "new", "--vary", "span_length=1,2"],
    "transfer": [*_MODELS, "--task", "skills", "overlap", "--out", "new", "--iterations", "1"],
    "serve": ["--models", "alpha", "--port", "0"],
    "inspect": ["--models", "alpha"],
    "families": [],
    "plan": ["--models", "alpha", "--device", "H100", "--prompt", "8", "--new", "4"],
    "emorl demo": ["--out", "new"],
    "emorl train": ["--objective", "brevity", "--base", "base", "--data", "prompts.jsonl", "--out", "new"],
    "emorl search": ["--run", "adapters"],
    "emorl evaluate": ["--run", "adapters"],
    "emorl export": ["--run", "adapters", "--out", "new"],
}


@dataclasses.dataclass(frozen=True)
class Bad:
    """A call that cannot be.

    Attributes:
      what: what is wrong with it.
      arguments: behind `rlae-jax`, in the world's directory.
    """

    what: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        shown = [text if len(text) < 60 else f"{text[:57]}..." for text in self.arguments]
        return f"{self.what}: {' '.join(shown)}"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """How a command took one."""

    status: int | None  # None: an exception came out
    told: str
    seconds: float  # of a processor: others may be at work beside this
    kib: int  # of memory
    changed: tuple[str, ...]  # files

    @property
    def wrong(self) -> str:
        """What is not as it should be; empty if all is."""
        if self.status is None or "Traceback" in self.told:
            return "a traceback"
        if self.status not in (1, 2):
            return f"exit status {self.status}"
        if not 0 < len(self.told.splitlines()) <= LINES:
            return f"{len(self.told.splitlines())} lines"
        if self.seconds > SECONDS:
            return f"{self.seconds:.0f} s of a processor"
        if self.kib > KIB:
            return f"{self.kib / 2**20:.1f} GiB"
        return f"changed {', '.join(self.changed[:3])}" if self.changed else ""


def _call(command: str, *options: str) -> tuple[str, ...]:
    """A command with options in the place of those that it has."""
    given = CALLS[command]
    starts = [i for i, word in enumerate(given) if word.startswith("--")] + [len(given)]
    kept = [word for a, b in itertools.pairwise(starts) if given[a] not in options for word in given[a:b]]
    return (*command.split(), *kept, *options)


# --- numbers


def _declared(declaration: Any) -> Iterator[tuple[str, Any]]:
    """The options of a command, and of its options that are dataclasses."""
    for name, hint in typing.get_type_hints(declaration, include_extras=True).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(kind):
            yield from _declared(kind)
        elif name != "return":
            yield name, hint


def _outside(within: ranges.Range) -> list[str]:
    """Texts that are no number of a range."""
    if within.kind is int:
        return [str(int(within.low) - 1), str(int(within.high) + 1), "1.5", "nan", "9" * 5000]
    low = within.low if within.above else within.low - 1
    return ["nan", "1e400", f"{low:g}", f"{within.high * 10:g}", "much"]


def numbers() -> Iterator[Bad]:
    """Every number of every command, outside its range."""
    everything = {**commands.COMMANDS, **{f"emorl {name}": one for name, one in commands.EMORL_COMMANDS.items()}}
    for command in CALLS:
        for name, hint in _declared(everything[command]):
            for within in ranges.ranges_in(hint):
                option = f"--{name.replace('_', '-')}"
                for text in _outside(within):
                    yield Bad(f"{name} {text[:12]}", _call(command, option, text))


# --- models


def _edit(**changes: Any) -> Callable[[Path], None]:
    """A model whose config.json has other values; None leaves a key out."""

    def edit(model: Path) -> None:
        path = model / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return edit


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _as_directory(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return make


def _as_loop(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(directory / name)

    return make


def _cut(name: str, kept: float) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: int(len(whole) * kept)])

    return cut


def _header(header: Any, tail: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tail


_DEEP = "[" * 100_000
_TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MODELS: dict[str, Callable[[Path], None]] = {
    "no config.json": _remove("config.json"),
    "an empty config.json": _write("config.json", ""),
    "a config.json of a list": _write("config.json", "[]"),
    "a config.json of null": _write("config.json", "null"),
    "a config.json cut off": _cut("config.json", 0.5),
    "a config.json that is nested": _write("config.json", _DEEP),
    "a config.json that is no text": _write("config.json", b"\xff\xfe\x00"),
    "a config.json of a large number": _write("config.json", '{"hidden_size": ' + "9" * 9000 + "}"),
    "a config.json that is a directory": _as_directory("config.json"),
    "a config.json that is a loop": _as_loop("config.json"),
    "architectures of an object": _edit(architectures=[{}]),
    "architectures of a number": _edit(architectures=3),
    "no architectures, no type": _edit(architectures=..., model_type=...),
    "a model_type of a list": _edit(model_type=["llama"]),
    "an unknown model_type": _edit(model_type="nonesuch", architectures=["Nonesuch"]),
    "layers of a text": _edit(num_hidden_layers="two"),
    "very many layers": _edit(num_hidden_layers=100_000_000),
    "no layers": _edit(num_hidden_layers=0),
    "fewer than no layers": _edit(num_hidden_layers=-1),
    "heads that are none": _edit(num_attention_heads=0),
    "heads of null": _edit(num_attention_heads=None),
    "a width of 10^15": _edit(hidden_size=10**15),
    "a vocabulary of -5": _edit(vocab_size=-5),
    "a vocabulary of 10^12": _edit(vocab_size=10**12),
    "a fractional width": _edit(hidden_size=16.5),
    "an epsilon of a text": _edit(rms_norm_eps="small"),
    "an end token of an object": _edit(eos_token_id={"id": 1}),
    "an end token of a list of texts": _edit(eos_token_id=["a"]),
    "a rope_theta of null": _edit(rope_theta="x"),
    "rope_scaling of a number": _edit(rope_scaling=7),
    "a quantization_config of a list": _edit(quantization_config=[1]),
    "no weights": _remove("model.safetensors"),
    "empty weights": _write("model.safetensors", b""),
    "weights cut off": _cut("model.safetensors", 0.5),
    "weights of one byte": _write("model.safetensors", b"x"),
    "weights with a header of null": _write("model.safetensors", _header(None)),
    "weights with a header of a list": _write("model.safetensors", _header([])),
    "weights with a long header": _write("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "weights with a tensor of a number": _write("model.safetensors", _header({"x": 3})),
    "weights with other tensors": _write("model.safetensors", _header({"x": _TENSOR}, bytes(16))),
    "weights with offsets beyond": _write("model.safetensors", _header({"x": _TENSOR})),
    "weights with a negative shape": _write("model.safetensors", _header({"x": _TENSOR | {"shape": [-1]}}, bytes(16))),
    "weights of another dtype": _write("model.safetensors", _header({"x": _TENSOR | {"dtype": "X9"}}, bytes(16))),
    "weights that are a directory": _as_directory("model.safetensors"),
    "weights that are a loop": _as_loop("model.safetensors"),
    "pickled weights": lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin") and None,
    "an index of a list": _write("model.safetensors.index.json", "[]"),
    "an index of a number": _write("model.safetensors.index.json", '{"weight_map": 3}'),
    "an index that leaves": _write("model.safetensors.index.json", '{"weight_map": {"x": "../../etc/passwd"}}'),
    "an index of a missing file": _write("model.safetensors.index.json", '{"weight_map": {"x": "gone.safetensors"}}'),
    "a tokenizer.json of a list": _write("tokenizer.json", "[]"),
    "a tokenizer.json cut off": _cut("tokenizer.json", 0.5),
    "an empty tokenizer.json": _write("tokenizer.json", ""),
    "a tokenizer.json of an object": _write("tokenizer.json", "{}"),
    "a tokenizer_config.json of a list": _write("tokenizer_config.json", "[]"),
    "a tokenizer_config.json cut off": _write("tokenizer_config.json", "{"),
    "a special token of a number": _write("tokenizer_config.json", '{"eos_token": 7}'),
    "no tokenizer": lambda model: [path.unlink() for path in model.glob("*token*")] and None,
}
# Without weights or tokenizer some commands have all that they need.
_OF_WEIGHTS = ("weights", "index")


def _furnish_models() -> None:
    for i, (_, spoil) in enumerate(MODELS.items()):
        model = Path(f"models/{i}")
        shutil.copytree("alpha", model)
        spoil(model)
    Path("models/text.gguf").write_text("no model")
    Path("models/empty.gguf").write_bytes(b"")
    Path("models/cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + (2**60).to_bytes(8, "little") * 2)
    Path("models/old.gguf").write_bytes(b"GGUF\x63\x00\x00\x00" + bytes(16))
    Path("models/loop").symlink_to("loop")
    Path("models/nowhere").symlink_to("gone")
    Path("models/empty").mkdir()


_NO_MODELS = {
    "a model that is not there": "./gone",
    "a model that is a file": "mine.jsonl",
    "a model that is a loop": "models/loop",
    "a model that is a link to nowhere": "models/nowhere",
    "a model that is an empty directory": "models/empty",
    "a model of an empty name": "",
    "a model with a long name": "m" * 5000,
    "a model with NUL in its name": "a\0b",
    "a model at the Hub, which is not reached": "nobody/nothing",
    "a GGUF file of text": "models/text.gguf",
    "an empty GGUF file": "models/empty.gguf",
    "a GGUF file of many tensors": "models/cut.gguf",
    "a GGUF file of another version": "models/old.gguf",
    "a GGUF file that is not there": "models/gone.gguf",
}


def models() -> Iterator[Bad]:
    """Models that are none."""
    for i, what in enumerate(MODELS):
        yield Bad(what, _call("generate", "--models", f"models/{i}"))
        if not what.endswith("tokenizer"):
            yield Bad(what, _call("inspect", "--models", "alpha", f"models/{i}"))
        if "config.json" in what and "tokenizer" not in what:
            yield Bad(what, _call("plan", "--models", f"models/{i}"))
            yield Bad(what, _call("plan", "--models", f"models/{i}/config.json"))
        if i % 4 == 0:
            for command in ("train", "evaluate", "ablate", "serve"):
                yield Bad(what, _call(command, "--models", f"models/{i}", "alpha"))
    for what, name in _NO_MODELS.items():
        for command in ("generate", "train", "evaluate", "inspect", "serve", "plan", "emorl train"):
            yield Bad(what, _call(command, "--base" if command == "emorl train" else "--models", name))
    for command in ("generate", "plan", "inspect", "serve", "train"):
        yield Bad("no model", _call(command, "--models"))


# --- data


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DATA: dict[str, str | bytes] = {
    "empty.jsonl": "",
    "blank.jsonl": "\n\n\n",
    "cut.jsonl": '{"q": "a", "a": "b"}\n{"q": ',
    "numbers.jsonl": "1\n2\n3\n",
    "lists.jsonl": _lines(*[["q", "a"]] * 30),
    "null.jsonl": _lines(*[None] * 30),
    "others.jsonl": _lines(*[{"x": 1}] * 30),
    "objects.jsonl": _lines(*[{"q": {"deep": 1}, "a": "1"}] * 30),
    "few.jsonl": _lines({"q": "r1=", "a": "1"}),
    "alike.jsonl": _lines(*[{"q": "r1=", "a": "1"}] * 30),
    "deep.jsonl": _DEEP + "\n",
    "bytes.jsonl": b"\xff\xfe\xfd\n",
    "list.json": "[1, 2]",
    "object.json": "{}",
    "text.json": '"text"',
    "cut.json": "[{",
    "no_header.csv": "1,2\n3,4\n",
    "empty.csv": "",
    "nul.csv": "q,a\n\0,1\n",
    "quote.csv": 'q,a\n"x,1\n',
    "wrong.jsonl.gz": "no gzip",
    "cut.jsonl.gz": gzip.compress(b'{"q": "a", "a": "b"}\n' * 1000)[:30],
    "table.xlsx": b"PK\x03\x04",
    "table.parquet": b"PAR1",
}


def _furnish_data() -> None:
    Path("data").mkdir()
    for name, content in DATA.items():
        Path("data", name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("data/loop.jsonl").symlink_to("loop.jsonl")
    Path("data/directory.jsonl").mkdir()


def data() -> Iterator[Bad]:
    """Files of prompts that are none."""
    for name in [*DATA, "loop.jsonl", "directory.jsonl", "gone.jsonl", "n" * 300 + ".jsonl"]:
        for command in ("train", "evaluate", "emorl train"):
            field = ["--prompt-field", "q", "--layout", "rows"] if command == "emorl train" else []
            if command == "emorl train" and name in ("alike.jsonl", "few.jsonl"):
                continue  # prompts without answers
            yield Bad(f"data {name[:20]}", _call(command, "--data", f"data/{name}", *field))
    for option, text in (
        *(("--prompt-field", "none"), ("--prompt-field", ""), ("--answer-field", "a.b.c"), ("--reward", "best")),
        *(
            ("--reward", "gone.py:f"),
            ("--reward", "reward.py:none"),
            ("--reward", "reward.py:"),
            ("--reward", "os:path"),
        ),
        *(("--reward", "os:path"), ("--reward", ":"), ("--reward", "")),
        *(("--data-dir", "gone"), ("--shots", "3"), ("--max-prompt-tokens", "1")),
    ):
        yield Bad(f"{option} {text}", _call("train", option, text))
    for task in ("none", "", "skills,overlap", "../skills"):
        for command in ("train", "evaluate", "ablate"):
            kept = [word for word in _call(command) if word not in _DATA]
            yield Bad(f"task {task!r}", (*kept, "--task", task))
    for task in ("gsm8k", "mmlu"):
        for directory in ("gone", "mine.jsonl", "data", "tasks"):
            kept = [word for word in _call("evaluate") if word not in _DATA]
            yield Bad(f"{task} in {directory}", (*kept, "--task", task, "--data-dir", directory))


def _furnish_tasks() -> None:
    for name, text in {"gsm8k": "{}\n", "mmlu": "[]\n"}.items():
        Path("tasks", name).mkdir(parents=True)
        for split in ("train", "dev", "test", "validation"):
            Path("tasks", name, f"{split}.jsonl").write_text(text)


# --- runs

_NO_RUNS = ("gone", "mine.jsonl", "runs/empty", "runs/loop", "x" * 300)


def _settings(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config | {"settings": config["settings"] | changes}


RUNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "of a list": lambda config: [],
    "of nothing": lambda config: {},
    "without settings": lambda config: {name: value for name, value in config.items() if name != "settings"},
    "of a newer version": lambda config: config | {"schema": 99},
    "with an unknown key": lambda config: config | {"colour": "red"},
    "with settings of a list": lambda config: config | {"settings": []},
    "with an unknown setting": _settings(colour=1),
    "with a setting of a text": _settings(iterations="many"),
    "with a setting out of range": _settings(learning_rate=-1.0),
    "with a seed of a text": _settings(seed="x"),
    "with an agent of null": _settings(agent=None),
    "with an agent that reads a colour": lambda config: _settings(
        agent=config["settings"]["agent"] | {"reads": ["red"]}
    )(config),
    "with an unknown algorithm": lambda config: config | {"algorithm": "dqn"},
    "with members of a text": lambda config: config | {"members": "two"},
    "with a member without a width": lambda config: config | {"members": [{"name": "a"}]},
    "with spans of a text": lambda config: config | {"spans": "x"},
    "with checkpoints of a number": lambda config: config | {"checkpoints": 7},
    "without checkpoints": lambda config: config,
}


def _furnish_runs() -> None:
    from rlae_jax.config import PPOConfig
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.models import load
    from rlae_jax.ppo.train import AgentRun, setup
    from rlae_jax.tasks import jsonl

    ensemble, task = Ensemble([load("alpha"), load("beta")]), jsonl("mine.jsonl", prompt_field="q", answer_field="a")
    settings = PPOConfig(span_length=2, max_new_tokens=4)
    fields = setup(ensemble, [task], settings, ensemble.spec(max_new_tokens=4))
    config = msgspec.to_builtins(AgentRun(**fields, settings=settings))
    for i, edit in enumerate(RUNS.values()):
        Path(f"runs/{i}").mkdir(parents=True)
        Path(f"runs/{i}/config.json").write_text(json.dumps(edit(config)))
    for name, text in {"cut": '{"schema": 1', "deep": _DEEP, "nothing": "", "text": "hello"}.items():
        Path(f"runs/{name}").mkdir()
        Path(f"runs/{name}/config.json").write_text(text)
    Path("runs/directory/config.json").mkdir(parents=True)
    Path("runs/empty").mkdir()
    Path("runs/loop").symlink_to("loop")


def runs() -> Iterator[Bad]:
    """Runs that are none."""
    broken = {f"runs/{i}": f"a run {what}" for i, what in enumerate(RUNS)}
    broken |= {
        f"runs/{name}": f"a run's config.json, {name}" for name in ("cut", "deep", "nothing", "text", "directory")
    }
    for run, what in broken.items():
        yield Bad(what, _call("generate", "--policy", run))
        yield Bad(what, _call("evaluate", "--policy", run))
        for command in ("emorl search", "emorl evaluate", "emorl export"):
            yield Bad(what, _call(command, "--run", run))
        yield Bad(what, _call("train", "--out", run))
    for run in _NO_RUNS:
        for command in ("generate", "evaluate", "serve"):
            yield Bad(f"policy {run[:20]}", _call(command, "--policy", run))
        for command in ("emorl search", "emorl evaluate", "emorl export"):
            yield Bad(f"run {run[:20]}", _call(command, "--run", run))


# --- what else options hold


def _each(option: str, *texts: str) -> list[list[str]]:
    return [[option, text] for text in texts]


def others() -> Iterator[Bad]:
    """Names, lists and paths."""
    cases: dict[str, list[list[str]]] = {
        "generate": [
            *_each("--fusion", "", "best", ":", "topk:", "topk:0", "topk:1e9", "topk:-5", "topk:99999999999"),
            *_each("--fusion", "primary:-1", "primary:2", "primary:x", "linear:3", "hidden"),
            *(
                ["--models", "alpha", "beta", "alpha", "--fusion", f"proxy:{n}"]
                for n in ("nan", "inf", "-inf", "1e400", "x")
            ),
            *(["--fusion", "proxy"], ["--fusion", "topk:" + "9" * 5000]),
            *_each("--policy", "", "best", "gate:0.5", "gate:nan", "perplexity:-1"),
            *(["--weights", *texts] for texts in (["1"], ["1", "2", "3"], ["0", "0"], ["1", "x"], [])),
            *(
                ["--end-ids", *texts]
                for texts in (["x"], ["-1"], ["1", "1", "1"], ["1,"], [""], ["99999999999999999999"])
            ),
            *_each("--end-ids", "999999", "1e3", "nan"),
            *_each("--mesh", "", "x", "data=0", "data=-2", "data=nan", "data=1,rows=2", "data=-1,model=-1"),
            *_each("--mesh", "data=9999999999", "data=1.5", "data=", "model=99"),
            *_each("--html", ".", "mine.jsonl/x.html", "h" * 300, "runs/loop/x.html"),
            *_each("--adapters", "gone", "mine.jsonl", "runs/empty", "runs/loop"),
            *(
                ["--models", "alpha", "--adapters", text]
                for text in ("gone", "alpha", "mine.jsonl", "runs/empty", "runs/0")
            ),
            *(["--prompt"], ["--prompt", ""], ["--prompt", "r" * 100_000], ["--stop", ""], ["--chat"]),
            *(["--min-new-tokens", "9"], ["--stream", "--samples", "2"], ["--stream", "--scores"]),
            *(["--samples", "1000000000", "--temperature", "1"], ["--max-new-tokens", "2000000000"]),
            *(["--quantise", "int3"], ["--dtype", "float8"], ["--nonesuch"], ["--temperature"], ["extra"]),
        ],
        "train": [
            *_each("--out", "mine.jsonl", "mine.jsonl/new", "o" * 300, "runs/loop/new", "runs/cut"),
            *_each("--checkpoints", "mine.jsonl", "mine.jsonl/x", "c" * 300, "nonesuch://x", "://", ""),
            *(["--reads"], ["--reads", "red"], ["--reads", "text"], ["--encoder", "gone"], ["--encoder", "alpha"]),
            *(["--reads", "text", "--encoder", text] for text in ("./gone", "alpha", "mine.jsonl", "runs/empty")),
            *(["--span-lengths", "2", "2"], ["--span-lengths", "0"], ["--slots", "2"], ["--algo", "dqn"]),
            *(["--prompts", "2000000000"], ["--seeds", "2000000000"], ["--seed", "4294967295", "--seeds", "2"]),
            *(["--samples", "2000000000"], ["--log-to", "paper"]),
            *(["--mesh", "data=3"], ["--algo", "mappo", "--reads", "span"], ["--max-new-tokens", "2000000000"]),
        ],
        "evaluate": [
            *_each("--methods", "", "best", "single:gone", "single:"),
            *_each("--out", "mine.jsonl", "mine.jsonl/new", "o" * 300, "runs/0"),
            *(["--split", "all"], ["--policy", "gone", "alpha"]),
        ],
        "ablate": [
            *_each("--vary", "", "x", "=", "=1", "span_length", "span_length=", "span_length=0", "colour=1,2"),
            *_each("--vary", "learning_rate=nan", "seed=-1", "span_length=1,1", "agent.reads=red", "algo=dqn"),
            *_each("--vary", "target_kl=x", "iterations=1e3", "agent.projection=99999999", "encoder=red"),
            *_each("--set", "", "x", "prompts=0", "prompts=many", "schedule=steep", "agent=1", "clip=inf"),
            ["--vary", *(f"{name}=" + ",".join(map(str, range(1, 40))) for name in ("prompts", "samples", "epochs"))],
            *_each("--out", "mine.jsonl", "mine.jsonl/new", "runs/0"),
        ],
        "serve": [
            *_each("--api-key", "", " x", "\u00e9"),
            *_each("--host", "nonesuch.invalid", "", "256.1.1.1", "1.2.3.4"),
            *(
                ["--name", ""],
                ["--context", "99999"],
                ["--slots", "1000000000"],
                ["--policy", "draw"],
                ["--policy", "x"],
            ),
        ],
        "inspect": [["--end-ids", "1", "2"], ["--end-ids", "x"], ["--bandwidth", "0"], ["--mesh", "data=x"]],
        "plan": [
            *_each("--device", "", "none", "H1000"),
            *_each("--mesh", "x", "data=0", "data=1,model=0", "model=3", "data=-1"),
            *(["--iterations", "3"], ["--adapters", "2", "--union", "9"], ["--compile"], ["--prompt", "2000000000"]),
            *(["--models", "mine.jsonl"], ["--models", "alpha/tokenizer.json"], ["--algo", "dqn"]),
        ],
        "lm-eval": [
            *_each("--tasks", "nonesuch", "", "*?"),
            *(["--tasks"], ["--include-path", "gone"], ["--include-path", "mine.jsonl"], ["--out", "mine.jsonl/x"]),
            *(["--weights", "1", "--policy", "gate"], ["--weights", "nan"], ["--policy", "gone"]),
        ],
        "emorl train": [
            *_each("--objective", "", "best", "reflection", "reflection=", "reflection=gone", "fluency=alpha/x"),
            *_each("--objective", "gone.py:f", "reward.py:none", "os:path", "../x", "a/b:c"),
            *(["--objective"], ["--objective", "brevity", "brevity"], ["--objective", "fluency=mine.jsonl"]),
            *_each("--baselines", "best", "", "dynaopt"),
            *_each("--targets", "none", "", "(", "*"),
            *(
                ["--samples", "1"],
                ["--accumulate", "3"],
                ["--layout", "psych8k"],
                ["--layout", "pair"],
                ["--algorithm", "x"],
            ),
            *_each("--out", "mine.jsonl", "mine.jsonl/new", "o" * 300, "runs/0", "runs/cut", "runs/loop/x"),
            *(["--base", "runs/empty"], ["--max-new-tokens", "2000000000"], ["--batch", "2000000000"]),
            *_each("--checkpoints", "mine.jsonl", "nonesuch://x", "file:///x", "://x", "c\0"),
        ],
        "emorl export": [["--weights", "nan"], ["--weights", "2"], ["--mode", "none"]],
        "emorl search": [["--method", "best"], ["--mode", "none"], ["--space", "ball"]],
        "families": [["alpha"], ["--models", "alpha"], ["--nonesuch"], [""]],
        "demo": [["--out", "mine.jsonl"], ["--out", "mine.jsonl/new"], ["--out", "o" * 300], ["--out", "runs/0"]],
        "emorl demo": [["--out", "mine.jsonl"], ["--out", "mine.jsonl/new"], ["--out", "runs/loop/new"]],
        "specialists": [
            *_each("--out", "mine.jsonl", "mine.jsonl/new", "runs/loop/new", "o" * 300),
            *_each("--task", "", "gsm8k"),
        ],
    }
    for command, all_options in cases.items():
        for options in all_options:
            yield Bad(" ".join(options)[:40] or "none", _call(command, *options))
    for words in (
        [],
        ["nonesuch"],
        ["emorl"],
        ["emorl", "nonesuch"],
        ["--nonesuch"],
        ["train"],
        ["emorl", "train"],
        [""],
    ):
        yield Bad("no such command", tuple(words))


KINDS: tuple[Callable[[], Iterator[Bad]], ...] = (numbers, models, data, runs, others)


def everything() -> list[Bad]:
    """All inputs."""
    return [bad for kind in KINDS for bad in kind()]


def share(step: int) -> list[Bad]:
    """Every `step`-th of all, and of each kind at least one of every command."""
    chosen: list[Bad] = []
    for kind in KINDS:
        met: set[str] = set()
        for i, bad in enumerate(kind()):
            command = " ".join(bad.arguments[: 2 if bad.arguments[:1] == ("emorl",) else 1])
            if i % step == 0 or command not in met:
                chosen.append(bad)
            met.add(command)
    return chosen


def furnish(world: Path) -> None:
    """Makes the files that calls name, in an empty directory."""
    world.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(world):
        small.build()
        for make in (_furnish_models, _furnish_data, _furnish_tasks, _furnish_runs):
            make()


def listing(world: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a directory: kinds, and of what is no directory size, time and number. A directory's time is left
    out: a lock comes and goes."""
    found: dict[str, tuple[int, ...]] = {}
    for directory, names, files in os.walk(world):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            stat = os.lstat(path)
            own = () if os.path.isdir(path) else (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            found[os.path.relpath(path, world)] = (stat.st_mode, *own)
    return found


@contextlib.contextmanager
def _environment(scratch: Path) -> Iterator[None]:
    """No network, no cache of programs, temporary files elsewhere; what a command changes is changed back."""
    import warnings

    before, arguments, shows = dict(os.environ), sys.argv, warnings.showwarning
    os.environ.update(_variables(scratch))
    tempfile.tempdir = None
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.argv, warnings.showwarning, tempfile.tempdir = arguments, shows, None


def _variables(scratch: Path) -> dict[str, str]:
    scratch.mkdir(parents=True, exist_ok=True)
    given = {"HOME": str(scratch), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", commands.CACHE_VARIABLE: "off"}
    return given | {"XDG_CACHE_HOME": str(scratch), watch.VARIABLE: "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}


class _TooLong(BaseException):
    pass


def _stop(signum: int, frame: Any) -> None:
    raise _TooLong


def _changes(world: Path, before: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """What is no longer as it was; what is new is removed, so that the next call meets the same world."""
    after = listing(world)
    for name in sorted(after.keys() - before.keys()):
        path = world / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def try_one(bad: Bad, world: Path, scratch: Path) -> Refusal:
    """Runs a call in this process."""
    before, told = listing(world), io.StringIO()
    status: int | None = 0
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    handler = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(3 * SECONDS)
    outputs = contextlib.redirect_stdout(told), contextlib.redirect_stderr(told)
    with contextlib.chdir(world), _environment(scratch), outputs[0], outputs[1]:
        sys.argv = ["rlae-jax", *bad.arguments]
        try:
            commands.main()
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:
            status = None
            told.write(traceback.format_exc())
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
    seconds, kib = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return Refusal(status, told.getvalue(), seconds, kib, _changes(world, before))


# The peak of a process counts from what its parent held when it was started: a small one starts it.
_MEASURED = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=2)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


def try_alone(bad: Bad, world: Path, scratch: Path) -> Refusal:
    """Runs a call in a process of its own; killed after three times the seconds it may take of a processor."""
    before = listing(world)
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-c", _MEASURED, sys.executable, "-m", "rlae_jax", *bad.arguments],
            cwd=world,
            env=os.environ | {"PYTHONPATH": str(_ROOT)} | _variables(scratch),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=told,
            start_new_session=True,
        )
        killer = threading.Timer(3 * SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        measured, _ = process.communicate()
        killer.cancel()
        status, seconds, kib = json.loads(measured) if measured else (process.returncode, float("inf"), 0)
        told.seek(0)
        text = told.read().decode(errors="replace")
    return Refusal(status, text, seconds, kib, _changes(world, before))


def main(arguments: list[str]) -> int:
    part = arguments[0] if arguments else ""
    asked = [bad for bad in everything() if part in str(bad)]
    with tempfile.TemporaryDirectory() as root:
        world, scratch = Path(root) / "world", Path(root) / "scratch"
        furnish(world)
        good = 0
        for bad in asked:
            refusal = try_one(bad, world, scratch)
            good += not refusal.wrong
            if refusal.wrong or part:
                print(f"{bad}\n  {refusal.wrong or 'refused'}: {refusal.told.strip()[-1500:]}", flush=True)
        print(f"bad_inputs: {good} of {len(asked)}")
    return 0 if good == len(asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
