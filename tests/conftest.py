"""What every test may ask for: tiny language models and tokenizers made on the spot, the shared directory, strictness.

No test here needs the network, torch or a trained model. What a machine lacks is skipped with a reason, and the last
lines of the run say how often.
"""

import collections
import dataclasses
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings

from rlae_jax.errors import InputError
from rlae_jax.models import LM, ModelConfig
from rlae_jax.models.transformer import abstract_params
from tests.data import hf
from tests.helpers.chromium import NO_CHROMIUM

# Tests run on the CPU, also where there is something faster; `make test-device` leaves the choice to JAX.
if os.environ.get("RLAE_JAX_TEST_PLATFORM") != "device":
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
    # Nearly all of the suite's time is compilation, of which LLVM's lowest level saves two fifths. XLA reads this when
    # it starts, here and in the processes that tests start; whoever has set flags means them. Eight devices are
    # simulated, for the tests of meshes; all others use the first one.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8")

NO_SHARED = "the shared directory is absent (RLAE_JAX_SHARED, or ../shared beside the repository)"
NO_TORCH = "torch is not installed"

# A warning is an error; what is listed comes from other libraries and cannot be avoided here.
ALLOWED_WARNINGS = (
    "ignore::DeprecationWarning:(?!rlae_jax)",
    "ignore::PendingDeprecationWarning:(?!rlae_jax)",
    "ignore::FutureWarning:(?!rlae_jax)",
    "ignore:.*SwigPy.*:DeprecationWarning",
)


# Broadcasting and casting are written out: where they happen by themselves they hide mistakes (as in equinox's tests).
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with JAX's own promotion of dtypes, for code that is not ours."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _promoting_chain(*parts: optax.GradientTransformation, chain: Any = optax.chain) -> optax.GradientTransformation:
    return optax.GradientTransformation(*map(promoting, chain(*parts)))


def _promoting_schedule(make: Callable[..., optax.Schedule]) -> Callable[..., optax.Schedule]:
    return lambda *args, **kwargs: promoting(make(*args, **kwargs))


# optax counts steps in int32 and computes with them in float32; JAX adds a float32 bias to bfloat16 scores.
optax.chain = _promoting_chain
for _name in ("linear_schedule", "cosine_decay_schedule", "join_schedules"):
    setattr(optax, _name, _promoting_schedule(getattr(optax, _name)))
jax.nn.dot_product_attention = promoting(jax.nn.dot_product_attention)

# The same examples in every run, and no limit on an example's time: the first one compiles.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts the tests that a missing thing left out: a green run on a bare machine proves less."""
    counts: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts.update(known for known in (NO_SHARED, NO_TORCH, NO_CHROMIUM) if known in reason)
    for reason, n in counts.items():
        terminalreporter.write_line(f"{n} tests skipped: {reason}")


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that error messages point to land in the test's own directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


# Every program that XLA compiles for the CPU maps memory of its own, and Linux allows a process 65,530 mappings. A run
# of all tests needs more than that, and beyond it the compiler crashes.
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs between modules, before there are too many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with data and models that lies beside the project; skips where there is none."""
    named = os.environ.get("RLAE_JAX_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(NO_SHARED)
    return path


@pytest.fixture(scope="session")
def torch() -> Any:
    """The torch module; skips where it is not installed."""
    return pytest.importorskip("torch", reason=NO_TORCH)


TINY = ModelConfig(vocab=23, width=16, layers=2, heads=4, kv_heads=2, head_width=4, ffn_width=24, context=512)


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., LM]:
    """make_lm(seed, sharpness=s, tokenizer=t, **fields of ModelConfig) -> a random tiny LM.

    `sharpness` scales the output head: 1 predicts almost uniformly, so that near-ties would decide what is greedy.
    """

    def make(
        seed: int = 0, *, sharpness: float = 4.0, tokenizer: Any = None, name: str | None = None, **fields: Any
    ) -> LM:
        config = dataclasses.replace(TINY, **fields)
        rng = np.random.default_rng(seed)

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # By numpy: compiling `init_params` for every configuration would take most of the suite's time.
            if len(leaf.shape) == 1:
                values = rng.normal(1.0, 0.1, leaf.shape)
            else:
                # Kernels are [inputs, outputs...], but attention's output is [N, H, D].
                inputs = leaf.size // leaf.shape[-1] if "'o'" in jax.tree_util.keystr(path) else leaf.shape[0]
                values = rng.normal(0.0, 0.5 if "embedding" in jax.tree_util.keystr(path) else inputs**-0.5, leaf.shape)
            return jnp.asarray(values, leaf.dtype)

        params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
        sharpened = params["norm"] if config.tied_head else params["head"]
        sharpened.update(jax.tree.map(lambda leaf: leaf * sharpness, sharpened))
        return LM(config, params, tokenizer, name=name or f"tiny-{seed}")

    return make


@pytest.fixture(scope="session")
def make_chain_lm() -> Callable[..., LM]:
    """make_chain_lm(logits_vv) -> an LM whose next-token logits depend on the last token alone: row v of the table.

    Embeddings are one-hot and the layers add nothing, so what it writes can be worked out by hand.
    """

    def make(logits_vv: np.ndarray, *, tokenizer: Any = None, name: str = "chain", **fields: Any) -> LM:
        v = len(logits_vv)
        config = ModelConfig(
            **{"vocab": v, "width": v, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 2, "ffn_width": 2}
            | {"norm_eps": 0.0}
            | fields
        )
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config))
        params["embedding"] = jnp.eye(v)
        # A one-hot of width V leaves the norm as sqrt(V) times itself.
        params["norm"]["scale"] = jnp.full((v,), v**-0.5)
        params["head"]["kernel"] = jnp.asarray(logits_vv, jnp.float32)
        return LM(config, params, tokenizer, name=name)

    return make


@pytest.fixture(scope="session")
def stored_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """stored_checkpoint(case, family="llama") -> the directory of a case of `tests.data.hf`, written once. Copy it
    before you spoil it."""

    @functools.cache
    def write(case: str, family: str = "llama") -> Path:
        stored = hf.read_stored(family, case)
        directory = tmp_path_factory.mktemp(family) / case
        hf.write_checkpoint(directory, stored.config, stored.tensors, stored.seed)
        return directory

    return write


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(words) -> a transformers tokenizer of one token per word, ids in the order given, "</s>" last.

    By default a word is a character. With `metaspace` words are split at spaces and "▁" marks the space before a word,
    so that decoding a word alone loses its space, as with SentencePiece.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(words: Sequence[str], *, metaspace: bool = False, chat_template: str | None = None) -> Any:
        vocab = {word: i for i, word in enumerate([*words, "</s>"])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
        if metaspace:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        if chat_template is not None:
            fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def raises_input_error() -> Callable[..., str]:
    """raises_input_error(call, *parts) -> the message, after checking that it is short and holds every part."""

    def check(call: Callable[[], Any], *parts: str) -> str:
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert len(message.splitlines()) <= 10, message
        missing = [part for part in parts if part not in message]
        assert not missing, f"{missing} not in: {message}"
        return message

    return check
