"""What given texts are to the members, read once and kept: then any weights of `linear` are a matter of milliseconds.

    Cut ─members─► parts on disk: per span its tokens' log-probabilities, and what a policy observes at its beginning
                     │ take(spans), and a policy
                     └──────────────► log-probabilities of the spans, of the texts

    directory/3f5a.../00000/   log_probs.npy, mass.npy, stats.npy, hidden.0.npy, ..., digests.json
                      00001/   a part is some texts; it is there whole or not at all

A directory's name is a digest of all that the numbers depend on, so that other texts or members have another one. Parts
that are there are not read again; one that was altered is told, and is. Per token there are K numbers (2 K over a
union), per span the members' widths: nothing has the size of a vocabulary.
"""

import dataclasses
import functools
import hashlib
import io
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlae_jax import digests, files, hosts, memory
from rlae_jax.compilation import jit
from rlae_jax.fusion.cutting import Cut
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.likelihood import Spans, fused_by
from rlae_jax.fusion.policy import OBSERVATION_PARTS, STATS, Observation, Policy
from rlae_jax.models import Encoder

FORMAT = 1  # of a part's files
_PART_TOKENS, _PART_BYTES = 2**15, 2**26  # of a part, about: what is lost where reading is stopped
_CHUNK = 4096  # spans that are looked at together


class SpanRows(NamedTuple):
    """M spans of up to L tokens; every leaf has M first."""

    log_probs: Float[Array, "M L K"]  # see `likelihood.Spans`; 0 behind the last token
    mass: Any  # Float[M, L, K], or () where it is 0
    length: Int[Array, " M"]  # tokens of each
    observation: Observation


def span_log_probs(rows: SpanRows, weights: Float[Array, "#M K"]) -> Float[Array, " M"]:
    """The log-probability of each span's tokens together, in nats, under the `linear` mixture of some weights."""
    m, length, _ = rows.log_probs.shape
    fused = fused_by(jnp.broadcast_to(weights, (m, weights.shape[1])), rows.log_probs, rows.mass)
    return jnp.sum(jnp.where(jnp.arange(length)[None] < rows.length[:, None], fused, 0.0), axis=1)


@functools.partial(jit, static_argnames="policy")
def _decided(params: Any, rows: SpanRows, policy: Policy) -> Float[Array, " M"]:
    distribution, _ = policy.apply(params, rows.observation)
    return span_log_probs(rows, distribution.to_weights(distribution.mode()))


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The spans of some texts, as arrays that may lie on disk.

    Attributes:
      reads: the parts of the observation that are kept.
      parts: of each part its arrays by name.
      window, span, length: of each span its window in `cut`, its number there and its tokens.
    """

    cut: Cut
    reads: tuple[str, ...]
    span_length: int
    parts: list[dict[str, np.ndarray]]
    window: Int[np.ndarray, " M"]
    span: Int[np.ndarray, " M"]
    length: Int[np.ndarray, " M"]

    def __len__(self) -> int:
        """M."""
        return len(self.window)

    @property
    def text(self) -> Int[np.ndarray, " M"]:
        """Whose text each span is of."""
        texts: Int[np.ndarray, " M"] = self.cut.text[self.window]
        return texts

    @property
    def tokens(self) -> Int[np.ndarray, " N"]:
        """How many tokens each text has."""
        return np.bincount(self.text, weights=self.length, minlength=len(self.cut.bytes)).astype(np.int64)

    @functools.cached_property
    def _starts(self) -> Int[np.ndarray, " _P"]:
        return np.cumsum([0, *(len(part["log_probs"]) for part in self.parts)])

    def take(self, spans: Int[np.ndarray, " M"]) -> SpanRows:
        """Some of the spans, by their numbers."""
        of_part = np.searchsorted(self._starts, spans, side="right") - 1
        arrays: dict[str, Any] = {}
        for name, first in self.parts[0].items():
            array = np.empty((len(spans), *first.shape[1:]), first.dtype)
            for p in np.unique(of_part):
                here = of_part == p
                array[here] = self.parts[p][name][spans[here] - self._starts[p]]
            arrays[name] = array
        observation = Observation(
            hidden=tuple(arrays[name] for name in _hidden_names(arrays)),
            stats=arrays.get("stats", ()),
            span=self.span[spans].astype(np.int32) if "span" in self.reads else (),
            prompt=arrays.get("prompt", ()),
            text=arrays.get("text", ()),
            agreement=arrays.get("agreement", ()),
        )
        return SpanRows(arrays["log_probs"], arrays.get("mass", ()), self.length[spans].astype(np.int32), observation)

    def by_token(self) -> tuple[Float[np.ndarray, "T K"], Float[np.ndarray, "T K"] | None]:
        """All tokens' log-probabilities and masses, in memory, in float64."""
        real = np.arange(self.span_length) < self.length[:, None]

        def joined(name: str) -> Float[np.ndarray, "T K"]:
            return np.concatenate([part[name] for part in self.parts])[real].astype(np.float64)

        return joined("log_probs"), joined("mass") if "mass" in self.parts[0] else None

    def chunks(self, spans: Int[np.ndarray, " M"] | None = None) -> Iterator[tuple[Int[np.ndarray, " m"], SpanRows]]:
        """All spans, or some, in order and some thousand at a time: their numbers, and the rows, which the first one
        fills up to one number."""
        spans = np.arange(len(self)) if spans is None else spans
        size = min(_CHUNK, max(len(spans), 1))
        for start in range(0, len(spans), size):
            own = spans[start : start + size]
            yield own, self.take(np.concatenate([own, np.full(size - len(own), own[0])]))

    def log_likelihoods(self, policy: Policy, params: Any) -> Float[np.ndarray, " N"]:
        """The log-probability of each text in nats under a policy's modes; every decision is one of its own, so that
        parameters per row have no meaning here."""
        seen = set(policy.reads)
        assert seen <= set(self.reads), f"{seen} are not kept"

        def score(rows: SpanRows) -> Any:
            kept = {name: getattr(rows.observation, name) if name in seen else () for name in OBSERVATION_PARTS}
            return _decided(params, rows._replace(observation=Observation(**kept)), policy)

        return self.sums(score)

    def sums(self, score: Callable[[SpanRows], Any]) -> Float[np.ndarray, " N"]:
        """Of each text the sum of what `score` gives for its spans, [M]."""
        totals = np.zeros(len(self.cut.bytes))
        for own, rows in self.chunks():
            np.add.at(totals, self.text[own], np.asarray(score(rows), np.float64)[: len(own)])
        return totals


def _hidden_names(arrays: Any) -> list[str]:
    return sorted((name for name in arrays if name.startswith("hidden.")), key=lambda name: int(name.split(".")[1]))


def keep(
    ensemble: Ensemble,
    cut: Cut,
    reads: Sequence[str],
    span_length: int,
    *,
    directory: Path | None = None,
    chat: bool = False,
    encoder: Encoder | None = None,
    text_tokens: int = 512,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Kept:
    """Has the members read texts, as far as they have not done so before.

    Args:
      reads: the parts of the observation to keep.
      directory: where parts are kept; by default in memory, as everything is where several processes run.
      on_progress: called with the number of windows that are read.

    Raises:
      InputError: more than memory or disk hold; what `Ensemble.read_spans` raises.
    """
    reads = tuple(part for part in OBSERVATION_PARTS if part in reads)
    counts = np.array([-(-len(own) // span_length) for own in cut.tokens])
    window = np.repeat(np.arange(len(counts)), counts)
    span = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.array([len(own) for own in cut.tokens])
    length = np.minimum(sizes[window] - span * span_length, span_length)
    each = _span_bytes(ensemble, reads, span_length, encoder)
    place = None
    if directory is not None and hosts.count() == 1:
        by_encoder = [] if encoder is None else [_mark(encoder), text_tokens, cut.prompts]
        place = directory / _digest(ensemble, cut, [reads, span_length, chat, by_encoder])
    parts: list[dict[str, np.ndarray]] = []
    ranges = list(_parts(ensemble, cut, counts, each))
    there = [i for i in range(len(ranges)) if place is not None and (place / f"{i:05}").is_dir()]
    missing = sum(int(counts[own].sum()) for i, own in enumerate(ranges) if i not in there) * each
    what = f"what the members say about {len(window):,} spans of {len(cut.bytes):,} texts"
    if place is None:
        memory.require(missing, what, "give fewer texts, or longer spans")
    else:
        memory.require_disk(missing, place, what, "give fewer texts, or longer spans")
    for i, own in enumerate(ranges):
        path = None if place is None else place / f"{i:05}"
        arrays = None if path is None else _load(path)
        if arrays is None:
            texts = ensemble.read_spans(
                *(cut.rows[own], cut.tokens[own], reads, span_length),
                longest=cut.longest,
                prompts=cut.prompts[own],
                encoder=encoder,
                text_tokens=text_tokens,
                chat=chat,
            )
            arrays = _arrays(texts, span_length)
            if path is not None:
                _store(path, arrays)
                arrays = _mapped(path)
        parts.append(arrays)
        on_progress(own.stop)
    return Kept(cut, reads, span_length, parts, window, span, length)


def _span_bytes(ensemble: Ensemble, reads: Sequence[str], span_length: int, encoder: Encoder | None) -> int:
    """What a span takes."""
    k = len(ensemble.members)
    numbers = span_length * k * (1 if ensemble.union is None else 2)
    of_parts = {"hidden": sum(ensemble.widths), "stats": k * len(STATS), "prompt": k, "agreement": k * k}
    numbers += sum(size for part, size in of_parts.items() if part in reads)
    if "text" in reads and encoder is not None:
        numbers += encoder.config.hidden_width
    return 4 * numbers


def _parts(ensemble: Ensemble, cut: Cut, counts: Int[np.ndarray, " W"], each: int) -> Iterator[slice]:
    """Windows that are read and kept together."""
    read = np.array(ensemble.lengths(cut.rows)) + [len(own) for own in cut.tokens]
    start = tokens = held = 0
    for i, (n, spans) in enumerate(zip(read.tolist(), counts.tolist(), strict=True)):
        if i > start and (tokens + n > _PART_TOKENS or held + spans * each > _PART_BYTES):
            yield slice(start, i)
            start, tokens, held = i, 0, 0
        tokens, held = tokens + n, held + spans * each
    yield slice(start, len(counts))


def _mark(encoder: Encoder) -> str:
    """A hash that tells an encoder."""
    digest = hashlib.sha256(repr(encoder.config).encode())
    for leaf in jax.tree.leaves(encoder.params):
        digest.update(np.asarray(leaf.reshape(-1)[:64]).tobytes())
    return digest.hexdigest()


def _digest(ensemble: Ensemble, cut: Cut, options: Any) -> str:
    """Of all that the numbers depend on."""
    union = hashlib.sha256()
    if ensemble.union is not None:
        for array in (ensemble.union.utf8, ensemble.union.choosable, *ensemble.union.own, *ensemble.union.spell_ids):
            union.update(np.ascontiguousarray(array).tobytes())
    rows = [[int(i) for i in row] if isinstance(row[0], int | np.integer) else [*map(list, row)] for row in cut.rows]
    shared = ensemble.shared is not None
    return files.digest([FORMAT, ensemble.fingerprints, shared, union.hexdigest(), options, rows, cut.tokens])[:16]


def _arrays(texts: Sequence[Spans], span_length: int) -> dict[str, np.ndarray]:
    """Texts' spans as arrays with all spans first."""

    def padded(log_probs: Any) -> np.ndarray:
        n, k = log_probs.shape
        filled: np.ndarray = np.pad(log_probs, ((0, -n % span_length), (0, 0)))
        return filled.reshape(-1, span_length, k).astype(np.float32)

    arrays = {"log_probs": np.concatenate([padded(one.log_probs) for one in texts])}
    if not isinstance(texts[0].mass, tuple):
        arrays["mass"] = np.concatenate([padded(one.mass) for one in texts])
    seen: Any = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one.observation for one in texts))
    arrays |= {f"hidden.{k}": states for k, states in enumerate(seen.hidden)}
    others = {name: getattr(seen, name) for name in ("stats", "prompt", "text", "agreement")}
    return arrays | {name: value for name, value in others.items() if not isinstance(value, tuple)}


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with files.making(path) as directory:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            files.write_bytes(directory / f"{name}.npy", content.getvalue())


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """A part that is there; None where there is none, or not as it was kept, which is told."""
    if not path.is_dir():
        return None
    told = digests.damage(path) if digests.has_digests(path) else f"{digests.FILE} is missing"
    if told is None:
        return _mapped(path)
    warnings.warn(f"{path}: {told}; it is read again", stacklevel=3)
    shutil.rmtree(path)
    return None


def _mapped(path: Path) -> dict[str, np.ndarray]:
    return {one.stem: np.load(one, mmap_mode="r", allow_pickle=False) for one in sorted(path.glob("*.npy"))}
