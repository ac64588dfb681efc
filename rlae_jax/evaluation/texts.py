"""Methods scored by how likely they find given texts: bits per byte, with intervals over texts.

    texts ─cut by a rule, read once─► Kept ─weights of a method─► nats of each text ─► results.json, predictions.jsonl

Bits per byte are all bits over all bytes, less is better. What each text adds is linearised in both, so that the mean
of these numbers is the ratio, and intervals and tests over texts are those of a ratio.

Over a union every rule by which texts are cut gives figures of its own, each a bound from above. A member alone has its
own tokenizer's.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlae_jax import report, statistics
from rlae_jax.compilation import jit
from rlae_jax.errors import InputError
from rlae_jax.evaluation.methods import AnyMethod, Method, Methods, member_alone, member_names, seeds_of
from rlae_jax.evaluation.results import (
    SCHEMA,
    Prediction,
    agent_pairs,
    differences,
    write_results,
)
from rlae_jax.evaluation.searches import SEARCH_PROMPTS, STATIC_STEP, cost, simplex_grid
from rlae_jax.fusion.cutting import Cut, rules
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.kept import Kept, SpanRows, keep, span_log_probs
from rlae_jax.fusion.operators import linear
from rlae_jax.fusion.policy import NAMED_POLICIES, OBSERVATION_PARTS, BoundPolicy
from rlae_jax.fusion.weights import named_policy, span_length_of
from rlae_jax.ppo.given import DIRECTORY, bits_per_byte, cut_examples
from rlae_jax.tasks import Examples, Task

UNIT = "bits per byte"
ORACLE_STEP = 0.1
NAMES = ("uniform", "static", "oracle")
_STEPS, _ENOUGH = 300, 1e-7  # of the search for fixed weights, in nats per token


@dataclasses.dataclass(frozen=True, eq=False)
class BestWeights:
    """Each span under the weights of a grid that find it likeliest, as nobody knows beforehand: a reference line, which
    says how much there is to gain. Over a union no member alone may have all tokens of a span."""

    ensemble: Ensemble
    span_length: int


@dataclasses.dataclass(frozen=True, eq=False)
class TextScorer:
    """How likely methods find the right answers of examples; what members say is read once for all methods.

    Attributes:
      most: tokens of a window, see `cut_texts`.
      directory: where what was read is kept; None keeps it in memory.
    """

    task: Task
    examples: Examples
    most: int | None = None
    directory: Path | None = None
    _kept: dict[tuple[Ensemble, int], Kept] = dataclasses.field(default_factory=dict, init=False)
    _cuts: dict[Ensemble, Cut] = dataclasses.field(default_factory=dict, init=False)

    def cut(self, ensemble: Ensemble) -> Cut:
        """The texts as these members read them."""
        if ensemble not in self._cuts:
            task = self.task if ensemble.union is not None else dataclasses.replace(self.task, cut="own")
            self._cuts[ensemble] = cut_examples(ensemble, task, self.examples, self.most)
        return self._cuts[ensemble]

    def kept(self, ensemble: Ensemble, span_length: int, methods: Sequence[AnyMethod | BestWeights] = ()) -> Kept:
        """What the members say in spans of a length, with what these methods look at."""
        key = ensemble, span_length
        wanted, encoder, text_tokens = set[str](), None, 512
        for method in methods:
            policy = method.weights if isinstance(method, Method) else None
            if isinstance(policy, BoundPolicy) and policy.encoder is not None:
                encoder, text_tokens = policy.encoder, policy.text_tokens
            if _place(method) == key:
                wanted |= set(_reads(method))
        known = self._kept.get(key)
        if known is None or not wanted <= set(known.reads):
            reads = wanted | set(known.reads if known is not None else ())
            with report.progress("reading texts", len(self.cut(ensemble).rows), "texts") as update:
                self._kept[key] = keep(
                    *(ensemble, self.cut(ensemble), sorted(reads), span_length),
                    directory=self.directory,
                    chat=self.task.chat,
                    encoder=encoder,
                    text_tokens=text_tokens,
                    on_progress=lambda done: update(done, ""),
                )
        return self._kept[key]

    def nats(self, method: AnyMethod | BestWeights, beside: Sequence[AnyMethod | BestWeights] = ()) -> np.ndarray:
        """The log-probability of each text, [N].

        Args:
          beside: other methods that will be asked for: what they look at is read at the same time.
        """
        place = _place(method)
        if isinstance(method, BestWeights):
            return self.kept(*place, [method, *beside]).sums(_best_weights)
        assert isinstance(method, Method)
        cut = self.cut(method.ensemble)
        if _keepable(method):
            spans = -(-cut.longest // place[1])
            policy, params, _ = method.ensemble.bind(method.weights, 1, spans, method.span_length)
            return self.kept(*place, [method, *beside]).log_likelihoods(policy, params)
        found = method.ensemble.score_tokens(
            *(cut.rows, cut.tokens, method.weights, method.span_length), prompts=cut.prompts, chat=self.task.chat
        )
        totals = np.zeros(len(cut.bytes))
        np.add.at(totals, cut.text, [one.fused.sum(dtype=np.float64) for one in found])
        return totals

    def tokens(self, ensemble: Ensemble) -> int:
        """Of all texts."""
        return sum(map(len, self.cut(ensemble).tokens))


def _place(method: AnyMethod | BestWeights) -> tuple[Ensemble, int]:
    """What is read for a method: by which members, in spans of which length."""
    if isinstance(method, BestWeights):
        return method.ensemble, method.span_length
    if not isinstance(method, Method):
        raise InputError(f"{type(method).__name__.lower()} is of written answers and has no likelihood of a text")
    return method.ensemble, span_length_of(method.weights, method.span_length)


def _reads(method: AnyMethod | BestWeights) -> tuple[str, ...]:
    policy = named_policy(method.weights) if isinstance(method, Method) and _keepable(method) else None
    policy = policy.policy if isinstance(policy, BoundPolicy) else policy
    return tuple(getattr(policy, "reads", ()))


def _keepable(method: Method) -> bool:
    """Whether what is kept says all: a policy that decides each span by what is observed there, under `linear`."""
    weights = named_policy(method.weights)
    policy = weights.policy if isinstance(weights, BoundPolicy) else weights
    drawn = getattr(weights, "sample", False) or getattr(policy, "draws_members", False)
    others = set(getattr(policy, "reads", ())) - set(OBSERVATION_PARTS)
    apart = getattr(policy, "span_lengths", ()) or hasattr(policy, "slice_rows") or hasattr(policy, "complement")
    cached = any(lm.config.kv_dtype is not None for lm in method.ensemble.members)
    return method.ensemble.fusion is linear and not (drawn or others or apart or cached)


@jit
def _best_weights(rows: SpanRows) -> Float[Array, " M"]:
    k = rows.log_probs.shape[-1]
    grid = [*simplex_grid(k, ORACLE_STEP), np.full(k, 1 / k, np.float32)]
    each = (span_log_probs(rows, jnp.asarray(w)[None]) for w in grid)
    return functools.reduce(jnp.maximum, each)


def best_fixed(kept: Kept) -> Float[np.ndarray, " K"]:
    """The fixed weights under which the texts are likeliest.

    From the best point of a grid each step takes w_k to w_k sum_t p_k(t) / p(t) over sum_t mass_k(t) / mass(t), scaled
    to sum to 1: no step makes the texts less likely, since log p is concave and -log mass convex in w (Hunter and
    Lange, 2004). With one tokenizer, whose masses are 1, this is expectation maximisation, and finds the best there is.
    """
    log_probs, log_mass = kept.by_token()
    p = np.exp(log_probs - log_probs.max(axis=1, keepdims=True))
    mass = np.ones_like(p) if log_mass is None else np.exp(log_mass)

    def score(w: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            return float(np.mean(np.log(p @ w) - np.log(mass @ w)))

    grid = [*simplex_grid(p.shape[1], STATIC_STEP).astype(np.float64), np.full(p.shape[1], 1 / p.shape[1])]
    best = max(grid, key=score)
    w = 0.98 * best + 0.02 / len(best)
    before = score(w)
    for _ in range(_STEPS):
        w = w * (p / (p @ w)[:, None]).mean(axis=0) / (mass / (mass @ w)[:, None]).mean(axis=0)
        w /= w.sum()
        after = score(w)
        if after - before < _ENOUGH:
            break
        before = after
    return np.asarray(max([best, w], key=score), np.float32)


def text_methods(
    ensemble: Ensemble,
    task: Task,
    names: Sequence[str] | None = None,
    *,
    search_prompts: int | None = None,
    directory: Path | None = None,
) -> dict[str, AnyMethod | BestWeights]:
    """The methods to compare agents with, by name: each member alone, equal weights, the best fixed ones on train, and
    the best weights of each span as a reference.

    Args:
      names: by default all, for which "all" stands, too; or also policies without training, under their own settings.

    Raises:
      InputError: an unknown name.
    """
    singles = member_names(ensemble)
    known = [*singles, *NAMES]
    every = [own for name in names or ["all"] for own in (known if name == "all" else [name])]
    methods: dict[str, AnyMethod | BestWeights] = {}
    for name in dict.fromkeys(every):
        if name in singles:
            methods[name] = member_alone(ensemble, singles.index(name), task.span_length)
        elif name == "uniform":
            methods[name] = Method(ensemble, None, task.span_length)
        elif name == "static":
            began, train = time.perf_counter(), task.split("train").take(search_prompts or SEARCH_PROMPTS)
            weights = best_fixed(TextScorer(task, train, None, directory).kept(ensemble, task.span_length))
            record = {"weights": np.round(weights, 4).tolist(), **cost(len(train), began)}
            methods[name] = Method(ensemble, weights, task.span_length, record)
        elif name == "oracle":
            methods[name] = BestWeights(ensemble, task.span_length)
        elif name in NAMED_POLICIES:
            policy = NAMED_POLICIES[name]
            length = task.span_length if name == "perplexity" else getattr(policy, "span_length", 1)
            methods[name] = Method(ensemble, policy, length)
        else:
            named = ", ".join([*known, *NAMED_POLICIES, "all"])
            raise InputError(f"method {name!r} has no likelihood of texts; known: {named}")
    return methods


class _Scored(NamedTuple):
    """A method's texts under one rule, [S, N] each."""

    nats: Float[np.ndarray, "S N"]
    tokens: int
    seconds: float


def evaluate_texts(
    by_rule: Mapping[str, Mapping[str, Any]],
    task: Task,
    split: str = "test",
    *,
    out: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Scores methods by how likely they find a split's right answers; returns, and with `out` writes, the content of
    results.json, whose scores are bits per byte.

    Args:
      by_rule: for every rule by which texts are cut its methods, see `Methods`, or `BestWeights`s. With several rules
        the names of mixtures get theirs.
    """
    began = time.perf_counter()
    examples = task.split(split)
    examples = examples if limit is None else examples.take(limit)
    size = np.array([len(text.encode()) for text in examples.texts()], np.float64)
    table: dict[str, dict[str, Any]] = {}
    values: dict[str, np.ndarray] = {}
    lines: list[Prediction] = []
    pairs: list[tuple[str, str]] = []
    most = window(by_rule)
    alone: list[str] = []
    total = sum(len(_seeds(one)) for methods in by_rule.values() for one in methods.values())
    done = 0
    with report.progress("evaluation", total, "methods") as update:
        for rule, methods in by_rule.items():
            directory = None if out is None else out / DIRECTORY
            scorer = TextScorer(dataclasses.replace(task, cut=rule), examples, most, directory)
            every = [one for method in methods.values() for one in _seeds(method)]
            shown: dict[str, str] = {}  # of the names under this rule
            for name, method in methods.items():
                scored = _score(scorer, _seeds(method), every)
                done += len(_seeds(method))
                update(done, name)
                single = all(len(_place(one)[0].members) == 1 for one in _seeds(method))
                full = name if single or len(by_rule) == 1 else f"{name} [{rule}]"
                if not np.all(np.isfinite(scored.nats)):
                    report.say(f"left out: {full} gives some text no chance")
                    continue
                if single:
                    alone.append(full)
                shown[full] = name
                table[full], values[full] = _row(_seeds(method), scored, size)
                if not single and len(by_rule) > 1:
                    table[full]["cut"] = rule
                lines += _lines(full, scored.nats, examples)
            own = dict.fromkeys([*alone, *shown])
            short = {shown.get(name, name): name for name in own if not table[name].get("reference")}
            pairs += [(short[a], short[b]) for a, b in agent_pairs(list(short))]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task.name,
        "split": split,
        "unit": UNIT,
        "texts": {"bytes": int(size.sum()), "window": most},
        "methods": table,
        "differences": differences(values, list(dict.fromkeys(pairs)), bounded=False),
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        write_results(out, results, lines)
    return results


def evaluate_rules(
    ensemble: Ensemble,
    task: Task,
    split: str,
    names: Sequence[str] | None,
    agents: Methods,
    *,
    cuts: Sequence[str] | None = None,
    out: Path,
    limit: int | None = None,
    search_prompts: int | None = None,
) -> dict[str, Any]:
    """`evaluate_texts` of `text_methods` and agents under every rule that cuts texts differently, or some of them."""
    by_rule: dict[str, dict[str, Any]] = {}
    for rule in rules(ensemble) if cuts is None else cuts:
        own = text_methods(
            *(ensemble, dataclasses.replace(task, cut=rule), names),
            search_prompts=search_prompts,
            directory=out / DIRECTORY,
        )
        if by_rule:  # which no rule changes
            own = {name: method for name, method in own.items() if name not in member_names(ensemble)}
        by_rule[rule] = {**own, **agents}
    return evaluate_texts(by_rule, task, split, out=out, limit=limit)


def window(by_rule: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The tokens of the longest window that all agents can set weights for; None where none bounds it."""
    room = []
    for methods in by_rule.values():
        for method in methods.values():
            for one in _seeds(method):
                policy = one.weights if isinstance(one, Method) else None
                if isinstance(policy, BoundPolicy) and "span" in policy.policy.reads:
                    room.append(policy.dims.spans * policy.span_length)
    return min(room, default=None)


def _seeds(method: Any) -> list[Any]:
    return seeds_of(method)


def _score(scorer: TextScorer, seeds: Sequence[Any], beside: Sequence[Any]) -> _Scored:
    began = time.perf_counter()
    nats = np.stack([scorer.nats(one, beside) for one in seeds])
    return _Scored(nats, scorer.tokens(_place(seeds[0])[0]), time.perf_counter() - began)


def per_text(nats: Float[np.ndarray, "S N"], size: Float[np.ndarray, " N"]) -> Float[np.ndarray, "S N"]:
    """What each text adds to all bits over all bytes, R: R + (bits - R bytes) / mean bytes. Their mean is R, and their
    spread that of R over draws of texts."""
    bits = -nats / math.log(2)
    ratio = bits.sum(axis=1, keepdims=True) / size.sum()
    values: Float[np.ndarray, "S N"] = ratio + (bits - ratio * size) / size.mean()
    return values


def _row(methods: Sequence[Any], scored: _Scored, size: Float[np.ndarray, " N"]) -> tuple[dict[str, Any], np.ndarray]:
    values = per_text(scored.nats, size)
    s, n = values.shape
    total = scored.nats.sum(axis=1)
    low, high = statistics.bootstrap_interval(values)
    row = {
        "score": float(values.mean()),
        "accuracy": None,
        "n": n,
        "ci95": [max(low, 0.0), high],
        "per_seed": bits_per_byte(total, size.sum()).tolist(),
        "scores": {UNIT: float(values.mean()), "nats per token": -float(total.mean()) / scored.tokens},
        "tokens": scored.tokens,
        "ms_per_token": scored.seconds * 1e3 / (s * scored.tokens),
        "ms_per_answer": scored.seconds * 1e3 / (s * n),
    }
    if any(isinstance(method, BestWeights) for method in methods):
        row["reference"] = True
    records = [method.record for method in methods if isinstance(method, Method)]
    for key in records[0] if records else ():
        row[key] = records[0][key] if len(records) == 1 else [record[key] for record in records]
    return row, values


def _lines(name: str, nats: Float[np.ndarray, "S N"], examples: Examples) -> list[Prediction]:
    texts = examples.texts()
    return [
        Prediction(
            method=name, seed=seed, index=i, prompt=examples.prompts[i], text=texts[i], reward=float(own[i]), weights=[]
        )
        for seed, own in enumerate(nats)
        for i in range(len(texts))
    ]
