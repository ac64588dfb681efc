"""Baselines that are fitted to right answers of training prompts, in closed form or with gradients: a regression,
a gate, an expert with logits of its own.

    prompts ─every member, and all with equal weights─► texts, rewards ─► one right text each ─read─► what a policy sees
                                                           │              at every step, what members give each token
                                                           └─► whose own answers are right

In: an ensemble, a task's training split, how much to look at. Out: policies with parameters. Everything is collected
once (`collect`), for all of them.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from rlae_jax import ranges, report
from rlae_jax.compilation import jit
from rlae_jax.config import AgentConfig
from rlae_jax.evaluation.answers import Answerer, score_by_reward
from rlae_jax.evaluation.methods import Method, member_alone
from rlae_jax.evaluation.policies import dims_for
from rlae_jax.evaluation.searches import SEARCH_PROMPTS, Budget
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy, Deterministic, Dims, Observation
from rlae_jax.fusion.prompts import Row
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.ranges import Count, Scale
from rlae_jax.tasks import Examples, RewardPool, Task
from rlae_jax.tasks.rewards import exact_match

NAMES = ("regression", "dllg", "fusionroute")
STEPS, BATCH = 600, 256  # of Adam, and tokens in each
LEARNING_RATES = (3e-3, 1e-3, 1e-2)
SUPERVISION = ("answers", "tokens")
_RIDGE = 1e-3  # of the regression, per token
_LEAST_LOG_PROB = -10.0  # that it is fitted to: a single token that was thought impossible would outweigh all others
_IMPOSSIBLE = -50.0  # the log-probability of a token that a member cannot write
_RANK = 32  # of the logits that are added to an expert's
_LARGEST = 2**27  # numbers that are kept of what was read, about; of longer texts there are fewer
_TOP = 256  # likeliest tokens that are kept of a distribution


class Collected(NamedTuple):
    """T right texts of training prompts, and what was seen at each of their M tokens."""

    prompts: list[str]
    rows: list[Row]
    tokens: list[list[int]]
    right: Float[np.ndarray, "T K"]  # the reward of each member's own answer to the prompt
    text: Int[np.ndarray, " M"]  # whose token it is
    observation: Observation  # leaves [M, ...]
    log_probs: Float[np.ndarray, "M K"]  # of the tokens under each member, finite
    looked: int  # answers that were written or read


def collect(ensemble: Ensemble, task: Task, reads: tuple[str, ...], budget: Budget) -> Collected | None:
    """One right answer to each of some training prompts, as far as there is one: the right option; the reference,
    where it is the answer word for word; else the best of what the members alone and all together wrote, if its reward
    is above 0. None where there is none at all.

    Args:
      reads: the parts of the observation that are kept.
    """
    train, members = task.split("train"), len(ensemble.members)
    n = budget.prompts or max(SEARCH_PROMPTS, -(-budget.answers // (members + 2)))
    examples = train.take(min(n, len(train)))
    alone = [member_alone(ensemble, k, task.span_length) for k in range(members)]
    methods = [*alone, Method(ensemble, None, task.span_length)]
    looked = len(methods) * len(examples)
    with RewardPool(task.reward) as pool, report.progress("answers to fit to", looked, "answers") as update:
        answerer = Answerer(task, examples, score_by_reward(pool))
        answers = []
        for i, method in enumerate(methods):
            answers.append(answerer.answers(method, lambda done, i=i: update(i * len(examples) + done, "")))  # type: ignore[misc]
    rewards = np.stack([one.rewards for one in answers])
    best = np.argmax(rewards, axis=0)
    written = [answers[k].texts[i] if rewards[k, i] > 0 else None for i, k in enumerate(best)]
    found = {i: text for i, text in enumerate(_right_texts(task, examples, written)) if text}
    tokens = {i: _tokens_of(ensemble, task, examples.prompts[i], text) for i, text in found.items()}
    longest = max(map(len, tokens.values()), default=0)
    if not longest:
        return None
    places = [i for i in tokens if tokens[i]][: max(_LARGEST // (longest * sum(ensemble.widths)), 1)]
    prompts, own = [examples.prompts[i] for i in places], [tokens[i] for i in places]
    rows = ensemble.encode(prompts, chat=task.chat)
    spans = ensemble.with_fusion("linear").read_spans(rows, own, reads, 1, prompts=prompts, chat=task.chat)
    observation: Any = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one.observation for one in spans))
    log_probs = np.maximum(np.concatenate([one.log_probs for one in spans]), _IMPOSSIBLE)
    text = np.repeat(np.arange(len(own)), list(map(len, own)))
    right = rewards[:members].T[places]
    return Collected(prompts, rows, own, right, text, observation, log_probs, looked + len(places))


def _right_texts(task: Task, examples: Examples, written: Sequence[str | None]) -> list[str | None]:
    if task.by_likelihood:
        assert examples.options is not None
        pairs = zip(examples.options, map(_first, examples.references), strict=True)
        return [options[string.ascii_uppercase.index(letter)] for options, letter in pairs]
    if task.reward is exact_match:
        return [_first(reference) for reference in examples.references]
    return list(written)


def _first(reference: str | Sequence[str]) -> str:
    return reference if isinstance(reference, str) else reference[0]


def _tokens_of(ensemble: Ensemble, task: Task, prompt: str, text: str) -> list[int]:
    """A text that continues a prompt, with the end where answers are written to theirs."""
    ids = list(ensemble.codec.continuation(prompt, text, not task.chat and ensemble.continues))
    if not (task.by_likelihood or task.stop):
        ids += ensemble.end_ids[:1]
    return ids[: task.max_new_tokens]


# --- regression ---


@dataclasses.dataclass(frozen=True)
class Regression:
    """At every step softmax(prediction / temperature), of predictions that are linear in all members' statistics. Its
    parameters are the coefficients Float[F + 1, K]."""

    temperature: Scale = 1.0
    reads: tuple[str, ...] = ("stats",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def __post_init__(self) -> None:
        ranges.check(self)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "F+1 K"]:
        """Equal weights."""
        del key
        return jnp.zeros((4 * dims.members + 1, dims.members))

    def apply(
        self, params: Float[Array, "F+1 K"], observation: Observation
    ) -> tuple[Deterministic, Float[Array, " B"]]:
        weights = jax.nn.softmax(with_one(observation.stats) @ params / self.temperature, axis=-1)
        return Deterministic(weights), jnp.zeros(len(weights))


def with_one(stats: Float[Any, "M K 4"]) -> Float[Array, "M F+1"]:
    """All members' statistics, and 1."""
    flat = jnp.asarray(stats).reshape(len(stats), -1)
    return jnp.concatenate([flat, jnp.ones((len(flat), 1))], axis=1)


def fit_regression(collected: Collected | None, members: int) -> Float[np.ndarray, "F+1 K"]:
    """Least squares with a little ridge. The target is by how much each member's log-probability of the next token of a
    right text is above the members' mean, of log-probabilities of at least -10."""
    if collected is None:
        return np.zeros((4 * members + 1, members), np.float32)
    log_probs = np.maximum(collected.log_probs, _LEAST_LOG_PROB).astype(np.float64)
    targets = log_probs - log_probs.mean(axis=1, keepdims=True)
    x = np.asarray(with_one(collected.observation.stats), np.float64)
    ridge = _RIDGE * len(x) * np.diag([*[1.0] * (x.shape[1] - 1), 0.0])
    found: Float[np.ndarray, "F+1 K"] = np.linalg.lstsq(x.T @ x + ridge, x.T @ targets, rcond=None)[0]
    return found.astype(np.float32)


# --- a gate ---


def gate_of(config: AgentConfig, continues: bool) -> PPOAgent:
    """The agents' own network, of which the mean of the Dirichlet is the gate's weights: what differs from an agent is
    how it is trained. It reads the members' states in any case.

    Args:
      continues: whether answers continue their prompts, so that how likely these are is known.
    """
    left_out = {"text"} if continues else {"text", "prompt"}
    reads = dict.fromkeys(("hidden", *(part for part in config.reads if part not in left_out)))
    return PPOAgent(
        dataclasses.replace(
            config,
            reads=tuple(reads),
            encoder=None,
            span_lengths=(),
            distribution="dirichlet",
            network="joint",
            hidden_dropout=0.0,
        )
    )


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    agent: PPOAgent

    def __call__(self, params: Any, batch: tuple[Observation, Float[Array, "B K"]]) -> Float[Array, ""]:
        observation, targets = batch
        weights = self.agent.apply(params, observation)[0].mode()
        return -jnp.mean(jnp.sum(targets * jnp.log(weights), axis=-1))


def gate_targets(collected: Collected, supervision: str) -> Float[np.ndarray, "M K"]:
    """Which member was right, as shares that sum to 1, or all 0 where none was.

    Args:
      supervision: "answers": whose own answers to the prompt are right, alike at all tokens; "tokens": each member's
        share of the probability that all give the token.
    """
    if supervision == "tokens":
        return np.asarray(jax.nn.softmax(collected.log_probs, axis=-1))
    total = collected.right.sum(axis=1, keepdims=True)
    shares: Float[np.ndarray, "T K"] = np.where(total > 0, collected.right / np.where(total > 0, total, 1.0), 0.0)
    of_tokens: Float[np.ndarray, "M K"] = shares[collected.text]
    return of_tokens


def fit_gate(
    agent: PPOAgent, dims: Dims, collected: Collected | None, supervision: str, learning_rate: float
) -> tuple[Any, dict[str, Any]]:
    """Cross-entropy on which member was right. With "answers" this is the recipe of DLLG (arXiv 2606.04378): what is
    known is whether a whole answer was right, and the gate acts on every token. Also what is to be told of it."""
    params = agent.init(jax.random.key(0), dims)
    targets = None if collected is None else gate_targets(collected, supervision)
    if collected is None or targets is None or not np.any(targets):  # nobody was right: nothing is learnt
        return params, {"fitted_to": 0, "loss": None}
    known = targets.sum(axis=1) > 0
    observation = jax.tree.map(lambda leaf: leaf[known], collected.observation)
    params, loss = descend(
        params, (observation, targets[known].astype(np.float32)), learning_rate, _CrossEntropy(agent)
    )
    return params, {"fitted_to": int(known.sum()), "loss": loss}


def descend(params: Any, data: Any, learning_rate: float, loss: Any) -> tuple[Any, float]:
    """Adam on `STEPS` minibatches, with steps that fall to 0 linearly, and the mean loss of the last tenth of them.

    Args:
      data: leaves [M, ...].
      loss: hashable, of parameters and a minibatch.
    """
    params, losses = _descend(params, jax.tree.map(jnp.asarray, data), jnp.float32(learning_rate), loss, STEPS, BATCH)
    return params, float(np.mean(losses[-max(STEPS // 10, 1) :]))


@functools.partial(jit, static_argnames=("loss", "steps", "batch"))
def _descend(
    params: Any, data: Any, learning_rate: Float[Array, ""], loss: Any, steps: int, batch: int
) -> tuple[Any, Float[Array, " S"]]:
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    n = len(jax.tree.leaves(data)[0])

    def step(carry: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(0), i), (batch,), 0, n)
        value, gradients = jax.value_and_grad(loss)(params, jax.tree.map(lambda leaf: leaf[rows], data))
        updates, state = optimiser.update(gradients, state, params)
        rate = learning_rate * (1 - i / steps)
        return (jax.tree.map(lambda leaf, change: leaf - rate * change, params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))
    return params, losses


# --- an expert, with logits of one's own ---


@dataclasses.dataclass(frozen=True)
class Expert:
    """At every step the one member that a gate finds best, and logits that are added to its log-probabilities, from all
    members' states through a map of low rank. Its parameters are the gate's, "down" and "up"."""

    gate: PPOAgent
    vocab: Count
    span_length: ClassVar[int] = 1  # it decides anew at every step

    @property
    def reads(self) -> tuple[str, ...]:
        return self.gate.reads

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        """Logits of 0."""
        gate, down = jax.random.split(key)
        inputs = sum(dims.widths)
        return {
            "gate": self.gate.init(gate, dims),
            "down": jax.random.normal(down, (inputs, _RANK)) * inputs**-0.5,
            "up": jnp.zeros((_RANK, self.vocab)),
        }

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        weights = self.gate.apply(params["gate"], observation)[0].mode()
        chosen = jax.nn.one_hot(jnp.argmax(weights, axis=-1), weights.shape[-1])
        return Deterministic(chosen), jnp.zeros(len(chosen))

    def complement(self, params: dict[str, Any], hidden: tuple[Float[Array, "B D"], ...]) -> Float[Array, "B V"]:
        """See `rlae_jax.fusion.policy`."""
        normed = [h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) for h in hidden]
        logits: Array = jnp.concatenate(normed, axis=-1) @ params["down"] @ params["up"]
        return logits


class _Predicted(NamedTuple):
    """Tokens of right texts, and what the expert of each says there."""

    hidden: tuple[Float[Array, "M D"], ...]
    token: Int[Array, " M"]
    log_prob: Float[Array, " M"]
    top_tokens: Int[Array, "M n"]
    top: Float[Array, "M n"]

    def log_probs(self, vocab: int) -> Float[Array, "M V"]:
        """The expert's distribution; all that are not among the likeliest have an equal share of what is left."""
        rows = jnp.arange(len(self.token))
        rest = jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(self.top), axis=1), 1e-9) / max(vocab - self.top.shape[1], 1))
        filled = jnp.broadcast_to(rest[:, None], (len(rows), vocab))
        filled = filled.at[rows, self.token].set(self.log_prob)
        return filled.at[rows[:, None], self.top_tokens].set(self.top)


@dataclasses.dataclass(frozen=True)
class _OwnLogits:
    policy: Expert

    def __call__(self, params: dict[str, Any], batch: _Predicted) -> Float[Array, ""]:
        fused = batch.log_probs(self.policy.vocab) + self.policy.complement(params, batch.hidden)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(fused, axis=-1), batch.token[:, None], axis=1))


def fit_expert(
    ensemble: Ensemble, task: Task, gate: PPOAgent, collected: Collected | None
) -> tuple[BoundPolicy, dict[str, Any]]:
    """Expert choice with complementary logits, after FusionRoute (arXiv 2601.05106): first the choice, by cross-entropy
    on who gives the tokens of right texts most; then, for experts that are chosen so, the logits, by cross-entropy on
    these tokens. There both come from a language model of its own, which is then tuned on preferences; here from the
    members' states, so that no further model is run. Also what is to be told of it."""
    dims = dims_for(ensemble, task, 1)
    policy = Expert(gate, ensemble.spec(SamplingOptions(chat=task.chat)).vocab)
    params = policy.init(jax.random.key(0), dims)
    params["gate"], told = fit_gate(gate, dims, collected, "tokens", LEARNING_RATES[0])
    if collected is None:
        return BoundPolicy(policy, params, dims, 1), told | {"logits_loss": None}
    found = ensemble.score_tokens(
        *(collected.rows, collected.tokens, BoundPolicy(policy, params, dims, 1), 1),
        prompts=collected.prompts,
        chat=task.chat,
        top=min(_TOP, policy.vocab),
    )
    parts: Any = [np.concatenate([getattr(one, name) for one in found]) for name in ("fused", "top_tokens", "top")]
    token: Any = np.concatenate(collected.tokens)
    data = _Predicted(collected.observation.hidden, token, *parts)
    own, loss = descend({key: params[key] for key in ("down", "up")}, data, LEARNING_RATES[0], _OwnLogits(policy))
    return BoundPolicy(policy, params | own, dims, 1), told | {"logits_loss": loss}
