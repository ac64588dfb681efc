"""The methods to compare agents with, by name: members alone, mixtures, policies without training, tuned and searched.

What has to be chosen, such as the static weights, is chosen on the train split; only the router, an agent, also looks
at dev, as agents do.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlae_jax import report
from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.evaluation import fitted
from rlae_jax.evaluation.agents import train_router
from rlae_jax.evaluation.methods import AnyMethod, Method, Pick, Shuffled, member_alone, member_names, policy_of
from rlae_jax.evaluation.policies import dims_for, drawn_members, random_weights, with_settings
from rlae_jax.evaluation.searches import Budget, best_settings, cost, draw_weights, schedule_weights, static_weights
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import Bayes, BoundPolicy, Confidence, Consistency, Gate, Online, Perplexity, Selective
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.ppo.given import with_room_for_options
from rlae_jax.tasks import Task

# In the order of the table.
BASELINES = ("uniform", "static", "confidence", "schedule")
ALL = (
    *("uniform", "static", "schedule", "router", "confidence", "perplexity", "consistency", "gate", "topk"),
    *("online", "bayes", "draw", "selective", *fitted.NAMES),
    *("random", "shuffled", "vote", "oracle"),
)

# Values that are tried; of equally good ones the first is taken.
TEMPERATURES = {
    "perplexity": (1.0, 0.3, 0.1, 0.03, 0.01, 3.0, 10.0),
    "consistency": (0.25, 0.1, 0.05, 0.02, 0.5, 1.0, 2.5),
    "bayes": (1.0, 0.3, 3.0, 10.0, 30.0),
    "regression": (1.0, 0.3, 0.1, 0.01, 3.0),
}
THRESHOLDS = (0.5, 0.3, 0.7, 0.8, 0.9, 0.95, 0.99)
TOP_KS = (10, 1, 2, 3, 5, 20, 50)
LEARNING_RATES = (0.3, 0.1, 1.0, 3.0)
SHARES = (0.05, 0.0, 0.01, 0.2)
LOGIT_SCALES = (1.0, 0.0, 0.5)
DISAGREEMENTS = (0.1, 0.02, 0.05, 0.2, 0.3, 0.5)  # in nats


def baseline_methods(
    ensemble: Ensemble,
    task: Task,
    names: Sequence[str] | None = None,
    *,
    agents: Mapping[str, Sequence[Method]] | None = None,
    config: PPOConfig | None = None,
    runs: Path | None = None,
    search_prompts: int | None = None,
) -> dict[str, AnyMethod | list[AnyMethod]]:
    """The methods to compare agents with, by name; several seeds of one are a list.

    Args:
      names: None means each member alone and `BASELINES`. "all" stands for each member alone and all of `ALL` for which
        there is what they need: `shuffled` needs an agent, `router` a directory, `perplexity` members that are no
        encoder-decoders.
      agents: trained ones by name; `shuffled` is the first of them, with each of its seeds.
      config: of the router: the agents' own settings. Every search looks at no fewer answers than an agent saw with
        them in training, if the train split has enough prompts.
      search_prompts: of the train split, that searches read at most; see `Budget`.
      runs: where the router's run is kept (as `router`), and taken up again.

    Raises:
      InputError: an unknown name, or one that lacks what it needs.
    """
    task = with_room_for_options(ensemble, task)
    agent = next(iter((agents or {}).values()), ())
    chosen = _chosen(names, member_names(ensemble), _lacking(ensemble, task, agent, runs))
    seen = 0 if config is None else config.iterations * config.prompts * config.samples
    made = _Baselines(ensemble, task, agent, config, runs, Budget(seen, search_prompts))
    return {name: made[name] for name in chosen}


def check_names(names: Sequence[str] | None) -> None:
    """Raises an `InputError` for names that no methods have, whatever the members are called."""
    unknown = [name for name in names or () if name not in (*ALL, "all") and not name.startswith("single:")]
    if unknown:
        known = ", ".join(("single:MEMBER", *ALL))
        raise InputError(f"methods {', '.join(unknown)} are unknown; known: {known}, all (agents: --policy RUN)")


def _lacking(ensemble: Ensemble, task: Task, agent: Sequence[Method], runs: Path | None) -> dict[str, str]:
    """The methods that cannot be made here, and why."""
    lacking = {}
    if not agent or any(getattr(policy_of(method).policy, "span_lengths", ()) for method in agent):
        # Weights per span do not say for which steps they were, where an agent chooses how long its spans are.
        lacking["shuffled"] = "needs a trained agent (--policy RUN) whose spans all have the same length"
    if runs is None:
        lacking["router"] = "is trained, and needs a directory for its run"
    if task.by_likelihood:
        lacking |= dict.fromkeys(("router", "shuffled"), "is for written answers, not for the likeliest option")
    if any(lm.config.kv_dtype is not None for lm in ensemble.members):
        lacking |= dict.fromkeys(fitted.NAMES, "reads texts without a cache: leave kv_dtype out")
    if not ensemble.continues:
        lacking["perplexity"] = "reads how likely a prompt is, which an encoder-decoder cannot say"
    return lacking


def _chosen(names: Sequence[str] | None, singles: Sequence[str], lacking: Mapping[str, str]) -> list[str]:
    """The methods that these names stand for. Tells what "all" leaves out.

    Raises:
      InputError: an unknown name, or one that lacks what it needs.
    """
    if names is None:
        return [*singles, *BASELINES]
    known = [*singles, *ALL]
    if "all" in names:
        possible = [name for name in known if name not in lacking]
        names = list(dict.fromkeys(name for given in names for name in (possible if given == "all" else [given])))
        for name, reason in lacking.items():
            report.console.print(f"left out: {name} {reason}", highlight=False, markup=False)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"methods {', '.join(unknown)} are unknown; known: {', '.join(known)}, all (agents: --policy RUN)"
        )
    for name in names:
        if name in lacking:
            raise InputError(f"method {name} {lacking[name]}")
    return list(names)


@dataclasses.dataclass(frozen=True)
class _Baselines:
    """Baselines by name, each made when it is first asked for: some are made of others."""

    ensemble: Ensemble
    task: Task
    agent: Sequence[Method]  # the seeds of the one that `shuffled` is made of
    config: PPOConfig | None
    runs: Path | None
    budget: Budget
    made: dict[str, AnyMethod | list[AnyMethod]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> AnyMethod | list[AnyMethod]:
        if name not in self.made:
            singles = member_names(self.ensemble)
            if name in singles:
                self.made[name] = member_alone(self.ensemble, singles.index(name), self.task.span_length)
            else:
                self.made[name] = _MAKERS[name](self)
        return self.made[name]

    def method(self, name: str) -> Method:
        """One that has no seeds and writes answers itself."""
        method = self[name]
        assert isinstance(method, Method)
        return method

    def every_member(self) -> tuple[Method, ...]:
        """Each member alone."""
        return tuple(self.method(name) for name in member_names(self.ensemble))

    def tuned(self, name: str, policy: Any, settings: Sequence[Mapping[str, Any]], span_length: int) -> Method:
        """A policy under its best settings."""
        return best_settings(
            *(name, self.task, settings, self.budget),
            lambda **one: Method(self.ensemble, with_settings(self.ensemble, self.task, policy, span_length, **one)),
        )

    def tuned_temperature(self, name: str, policy: Any, span_length: int) -> Method:
        return self.tuned(name, policy, [{"temperature": value} for value in TEMPERATURES[name]], span_length)

    @functools.cached_property
    def gate(self) -> PPOAgent:
        """The network of gates."""
        config = AgentConfig() if self.config is None else self.config.agent
        return fitted.gate_of(config, self.ensemble.continues)

    @functools.cached_property
    def collected(self) -> tuple[fitted.Collected | None, float]:
        """What fitted methods are fitted to, and how long it took."""
        began = time.perf_counter()
        reads = tuple(dict.fromkeys((*self.gate.reads, "stats")))
        return fitted.collect(self.ensemble, self.task, reads, self.budget), time.perf_counter() - began

    def best_fitted(
        self, name: str, settings: Sequence[Mapping[str, Any]], began: float, make: Callable[..., Method]
    ) -> Method:
        """The best of methods that were fitted since `began`, whose record goes on with what was collected for them."""
        collected, seconds = self.collected
        best = best_settings(name, self.task, settings, self.budget, make)
        looked = best.record["searched"] + (0 if collected is None else collected.looked)
        texts = 0 if collected is None else len(collected.rows)
        return dataclasses.replace(best, record={**best.record, "texts": texts, **cost(looked, began - seconds)})

    def tuned_from_static(self, name: str, policy: Any, settings: Sequence[Mapping[str, Any]]) -> Method:
        """As `tuned`, a policy whose parameters are weights: equal ones are tried, and static's, whose search is a part
        of what it costs. It decides anew at every step."""
        static = self.method("static")
        began = time.perf_counter() - static.record["search_seconds"]
        searched = np.asarray(static.weights)
        starts = {"equal": np.full_like(searched, 1 / len(searched)), "static": searched}
        best = best_settings(
            *(name, self.task, [{**one, "start": start} for start in starts for one in settings], self.budget),
            lambda start, **one: Method(
                self.ensemble, with_settings(self.ensemble, self.task, policy, 1, starts[start][None], **one)
            ),
        )
        return dataclasses.replace(
            best, record={**best.record, **cost(best.record["searched"] + static.record["searched"], began)}
        )


def _static(baselines: _Baselines) -> Method:
    began = time.perf_counter()
    weights, looked = static_weights(baselines.ensemble, baselines.task, baselines.budget)
    record = {"weights": np.round(weights, 4).tolist(), **cost(looked, began)}
    return Method(baselines.ensemble, weights, baselines.task.span_length, record)


def _schedule(baselines: _Baselines) -> Method:
    """Its search goes on from static's, whose cost is a part of its own."""
    start = baselines.method("static")
    began = time.perf_counter() - start.record["search_seconds"]
    policy, looked = schedule_weights(baselines.ensemble, baselines.task, np.asarray(start.weights), baselines.budget)
    total = cost(looked + start.record["searched"], began)
    return Method(baselines.ensemble, policy, None, {"weights": np.round(policy.params, 4).tolist(), **total})


def _router(baselines: _Baselines) -> list[AnyMethod]:
    assert baselines.runs is not None
    policies = train_router(baselines.ensemble, baselines.task, baselines.config, baselines.runs / "router")
    return [Method(baselines.ensemble, policy) for policy in policies]


def _gate(baselines: _Baselines) -> Method:
    members = range(len(baselines.ensemble.members))
    settings = [{"threshold": threshold, "member": member} for threshold in THRESHOLDS for member in members]
    return baselines.tuned("gate", Gate(), settings, 1)


def _online(baselines: _Baselines) -> Method:
    settings = [{"learning_rate": rate, "share": share} for rate in LEARNING_RATES for share in SHARES]
    return baselines.tuned_from_static("online", Online(), settings)


def _bayes(baselines: _Baselines) -> Method:
    return baselines.tuned_from_static("bayes", Bayes(), [{"temperature": value} for value in TEMPERATURES["bayes"]])


def _draw(baselines: _Baselines) -> Method:
    began = time.perf_counter()
    weights, looked = draw_weights(baselines.ensemble, baselines.task, baselines.budget)
    record = {"weights": np.round(weights, 4).tolist(), **cost(looked, began)}
    return Method(baselines.ensemble, drawn_members(baselines.ensemble, baselines.task, weights[None]), None, record)


def _selective(baselines: _Baselines) -> Method:
    members = range(len(baselines.ensemble.members))
    settings = [{"threshold": threshold, "member": member} for threshold in DISAGREEMENTS for member in members]
    return baselines.tuned_from_static("selective", Selective(), settings)


def _regression(baselines: _Baselines) -> Method:
    collected, _ = baselines.collected
    began = time.perf_counter()
    coefficients = fitted.fit_regression(collected, len(baselines.ensemble.members))
    method = baselines.best_fitted(
        *("regression", [{"temperature": value} for value in TEMPERATURES["regression"]], began),
        lambda **one: Method(
            baselines.ensemble,
            with_settings(baselines.ensemble, baselines.task, fitted.Regression(), 1, coefficients, **one),
        ),
    )
    told = {"coefficients": np.round(coefficients, 4).tolist()}
    return dataclasses.replace(method, record={**method.record, **told})


def _dllg(baselines: _Baselines) -> Method:
    collected, _ = baselines.collected
    began = time.perf_counter()
    dims = dims_for(baselines.ensemble, baselines.task, 1)
    settings: list[dict[str, Any]] = [
        {"supervision": supervision, "learning_rate": rate}
        for supervision in fitted.SUPERVISION
        for rate in fitted.LEARNING_RATES
    ]
    gates = [fitted.fit_gate(baselines.gate, dims, collected, **one) for one in settings]

    def make(**one: Any) -> Method:
        return Method(baselines.ensemble, BoundPolicy(baselines.gate, gates[settings.index(one)][0], dims, 1))

    method = baselines.best_fitted("dllg", settings, began, make)
    chosen = {key: method.record[key] for key in settings[0]}
    return dataclasses.replace(method, record={**method.record, **gates[settings.index(chosen)][1]})


def _fusionroute(baselines: _Baselines) -> Method:
    collected, _ = baselines.collected
    began = time.perf_counter()
    policy, told = fitted.fit_expert(baselines.ensemble, baselines.task, baselines.gate, collected)

    def make(logit_scale: float) -> Method:
        params = policy.params | {"up": logit_scale * policy.params["up"]}
        return Method(baselines.ensemble, dataclasses.replace(policy, params=params))

    settings = [{"logit_scale": scale} for scale in LOGIT_SCALES]
    method = baselines.best_fitted("fusionroute", settings, began, make)
    return dataclasses.replace(method, record={**method.record, **told})


def _topk(baselines: _Baselines) -> Method:
    # Where k is the whole vocabulary, topk is uniform.
    entries = max(lm.config.vocab for lm in baselines.ensemble.members)
    return best_settings(
        *("topk", baselines.task, [{"k": k} for k in TOP_KS if k < entries], baselines.budget),
        lambda k: Method(baselines.ensemble.with_fusion(f"topk:{k}"), None, baselines.task.span_length),
    )


def _random(baselines: _Baselines) -> Method:
    return Method(baselines.ensemble, random_weights(baselines.ensemble, baselines.task, baselines.task.span_length))


_MAKERS: dict[str, Callable[[_Baselines], AnyMethod | list[AnyMethod]]] = {
    "uniform": lambda baselines: Method(baselines.ensemble, None, baselines.task.span_length),
    "static": _static,
    "schedule": _schedule,
    "router": _router,
    "confidence": lambda baselines: Method(baselines.ensemble, Confidence(), 1),
    "perplexity": lambda baselines: baselines.tuned_temperature("perplexity", Perplexity(), baselines.task.span_length),
    "consistency": lambda baselines: baselines.tuned_temperature("consistency", Consistency(), 1),
    "gate": _gate,
    "topk": _topk,
    "online": _online,
    "bayes": _bayes,
    "draw": _draw,
    "selective": _selective,
    "regression": _regression,
    "dllg": _dllg,
    "fusionroute": _fusionroute,
    "random": _random,
    "shuffled": lambda baselines: [Shuffled(method) for method in baselines.agent],
    "vote": lambda baselines: Pick(baselines.every_member()),
    "oracle": lambda baselines: Pick(baselines.every_member(), oracle=True),
}
