"""Every number that a user sets has a range, stated once: settings, arguments and options outside it are refused."""

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import ranges, sharding
from rlae_jax.commands import main, options
from rlae_jax.commands.ablate import AblateOptions
from rlae_jax.commands.emorl.search import SearchOptions
from rlae_jax.commands.emorl.train import TrainOptions as AdapterOptions
from rlae_jax.commands.train import TrainOptions
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.emorl.search import SearchConfig
from rlae_jax.errors import InputError
from rlae_jax.fusion.operators import Candidates, Proxy, get_operator
from rlae_jax.fusion.policy import Consistency, Gate, Perplexity
from rlae_jax.fusion.sampling import Sampling
from rlae_jax.models.pretrain import PretrainConfig

SETTINGS = (
    *(rj.PPOConfig, rj.MAPPOConfig, rj.AgentConfig, rj.LoraConfig, rj.SamplingOptions, EMORLConfig, SearchConfig),
    *(PretrainConfig, Perplexity, Consistency, Gate, Candidates, Proxy),
)
COMMANDS = {**main.COMMANDS, **{f"emorl {name}": command for name, command in main.EMORL_COMMANDS.items()}}


def numbers_in(hint: Any, within: bool = False) -> list[bool]:
    """For every int and float in an annotation, whether it has a range."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        has = any(isinstance(one, ranges.Range) for one in hint.__metadata__)
        return numbers_in(typing.get_args(hint)[0], within or has)
    if hint in (int, float):
        return [within]
    return [] if origin is typing.Literal else [one for part in typing.get_args(hint) for one in numbers_in(part)]


def declared(declaration: Any) -> dict[str, Any]:
    """The annotations of fields or parameters, those of options that are dataclasses included."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(declaration, include_extras=True).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        hints |= declared(kind) if dataclasses.is_dataclass(kind) else {name: hint}
    return hints


def bounds(hint: Any) -> list[tuple[Any, ...]]:
    return [(one.kind, one.low, one.high, one.above, one.below) for one in ranges.ranges_in(hint)]


@pytest.mark.parametrize(
    "declaration", [*SETTINGS, *COMMANDS.values()], ids=[*(s.__name__ for s in SETTINGS), *COMMANDS]
)
def test_no_number_is_without_a_range(declaration: Any) -> None:
    hints = {
        name: hint for name, hint in declared(declaration).items() if typing.get_origin(hint) is not typing.ClassVar
    }
    without = [name for name, hint in hints.items() if not all(numbers_in(hint))]
    assert not without


@pytest.mark.parametrize(
    ("of_command", "settings"),
    [
        (TrainOptions, rj.PPOConfig),
        (TrainOptions, rj.AgentConfig),
        (AblateOptions, rj.PPOConfig),
        (options.AgentOptions, rj.PPOConfig),
        (AdapterOptions, EMORLConfig),
        (AdapterOptions, rj.LoraConfig),
        (SearchOptions, SearchConfig),
    ],
)
def test_an_option_has_the_range_of_its_setting(of_command: Any, settings: Any) -> None:
    ours, theirs = declared(of_command), declared(settings)
    assert set(ours) & set(theirs)
    other = {name for name in set(ours) & set(theirs) if bounds(ours[name]) != bounds(theirs[name])}
    assert not other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, 1e308, "1", True, None.__class__, 1j])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_settings_refuse_what_is_no_such_number(settings: Any, value: Any) -> None:
    for name, found in ranges.ranges_of(settings).items():
        if not found:
            continue
        if found[0].fits(value):
            assert value == -1
            continue
        given = (value,) if name == "span_lengths" else value
        with pytest.raises(InputError, match=rf"^{name} is .*; expected a "):
            ranges.check(settings(**{name: given}))


def test_numbers_of_numpy_are_numbers() -> None:
    assert rj.PPOConfig(prompts=np.int64(3), learning_rate=np.float32(0.5)).prompts == 3  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"prompts is np\.float64"):
        rj.PPOConfig(prompts=np.float64(3.0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"clip is np\.True"):
        rj.PPOConfig(clip=np.True_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("within", "shown", "says"),
    [
        (ranges.whole(1), "INT>=1", "a whole number of at least 1"),
        (ranges.whole(0, 65535), "0<=INT<=65535", "a whole number from 0 to 65535"),
        (ranges.number(0, above=True), "FLOAT>0", "a number above 0"),
        (ranges.number(), "FLOAT", "a finite number"),
        (ranges.number(0, 1, below=True), "0<=FLOAT<1", "a number of at least 0 and below 1"),
        (ranges.number(0, 1, above=True, unit="W"), "0<W<=1", "a number above 0 and at most 1"),
    ],
)
def test_a_range_is_shown_and_said(within: ranges.Range, shown: str, says: str) -> None:
    assert (within.metavar, within.says) == (shown, says)


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        (ranges.whole(1), (1, 2**31 - 1), (0, 2**31, 1.0)),
        (ranges.whole(0, 2**32 - 1), (0, 2**32 - 1), (-1, 2**32)),
        (ranges.number(0, 1, above=True), (1, 1e-9), (0, 1.0001)),
        (ranges.number(0, 1, below=True), (0, 0.999), (1, -1e-9)),
        (ranges.number(), (-1e30, 1e30), (1e31, 10**400)),
    ],
)
def test_the_ends_of_a_range(within: ranges.Range, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    assert all(map(within.fits, inside))
    assert not any(map(within.fits, outside))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        *(("proxy:nan", "proxy:nan: expected"), ("proxy:1e400", "proxy:1e400: expected"), ("proxy:-inf", "expected")),
        *(("topk:0", "topk:0: expected"), ("topk:1e9", "topk:1e9: expected"), ("topk:", "expected a whole number")),
        *(("primary:-1", "primary:-1: expected"), ("primary:3", "numbered 0 to 2"), ("topk:" + "9" * 5000, "expected")),
    ],
)
def test_numbers_of_operators(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        get_operator(name, 3)


def test_seeds_side_by_side_end_where_seeds_do() -> None:
    rj.PPOConfig(seed=2**32 - 2, seeds=2)
    with pytest.raises(InputError, match="the last seed is 4294967295"):
        rj.PPOConfig(seed=2**32 - 2, seeds=3)


def test_the_coldest_temperatures_are_greedy() -> None:
    assert Sampling.create(rj.SamplingOptions(temperature=1e-40)).greedy
    assert not Sampling.create(rj.SamplingOptions(temperature=1e-3)).greedy


@pytest.mark.parametrize("text", ["data=0", "data=-2", "data=1e3", "model=" + "9" * 5000, "data=nan", "data=1.5"])
def test_meshes(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        sharding.read_mesh(text)


def test_a_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, told in (("nan", "=nan: expected a whole number"), ("-1", "=-1: expected"), ("1" * 50, "expected")):
        monkeypatch.setenv("RLAE_JAX_SECONDS", text)
        with pytest.raises(InputError, match=f"RLAE_JAX_SECONDS.*{told}"):
            ranges.from_environment("RLAE_JAX_SECONDS", ranges.WholeSeconds, 3)
    monkeypatch.setenv("RLAE_JAX_SECONDS", "")
    assert ranges.from_environment("RLAE_JAX_SECONDS", ranges.WholeSeconds, 3) == 3


def test_arguments_of_functions() -> None:
    for name in ("slots", "context", "chunk", "prefix_bytes", "queue"):
        assert name in inspect.signature(rj.Engine.__init__).parameters
        with pytest.raises(InputError, match=f"{name} is -1; expected a whole number"):
            rj.Engine(None, **{name: -1})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_minutes is nan"):
        rj.train(None, None, max_minutes=float("nan"))  # type: ignore[arg-type]
