"""Settings of a training run: frozen dataclasses, one per concern, with two named presets.

A run writes its settings to `config.json`, by which `runs.directory` knows whether a directory belongs to a run.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.fusion.policy import MEMBER_PARTS, OBSERVATION_PARTS
from rlae_jax.ranges import (
    Count,
    CountOr0,
    LearningRate,
    Passes,
    Positive,
    PositiveOr0,
    Seed,
    Share,
    ShareBelow1,
    Spans,
    Temperature,
    Width,
)

# What a network reads, and how often it does without hidden states in training, unless that is given.
NETWORKS: dict[str, dict[str, Any]] = {
    "joint": {"reads": ("hidden", "stats", "span"), "hidden_dropout": 0.0},
    "set": {"reads": ("hidden", "stats", "agreement", "span"), "hidden_dropout": 0.25},
}
_MEMBER_PARTS = f"{', '.join(MEMBER_PARTS[:-1])} or {MEMBER_PARTS[-1]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The weight agent's network.

    Attributes:
      reads: parts of the observation that it sees: "hidden" (each member's last hidden state), "stats" (entropy, top
        probability, log-probability of the last span, disagreement), "span" (the span's index), "prompt" (how likely
        each member finds the prompt), "text" (prompt and text so far, read by `encoder`) and "agreement" (how alike
        every two members' predictions are).
      encoder, text_tokens: a Hugging Face encoder (directory or Hub id) for "text", and how many tokens it reads at
        most, the newest ones. It is not trained.
      max_spans: spans that the index's embedding holds, if more than in training.
      network: "joint" knows members by their places, "set" by what it reads of them, so that it takes any members in
        any order. `AgentConfig.of_set()` has what suits it.
      hidden_dropout: of a set agent, the share of hidden states that it is not shown in training.
      projection: width to which each member's hidden state is projected.
      span_embedding: width of the span index's embedding.
      ffn_width: hidden width of the actor's and of the critic's MLP.
      concentration_floor: added to every softplus concentration of the Dirichlet.
      initial_concentration: where every concentration starts: 1 draws all weights alike, more keeps near equal ones.
      distribution: of a single agent's weights, "dirichlet" or "logistic_normal".
      share_actors: several agents are one network that is told whose agent it is.
      span_lengths: lengths among which the agent chooses for each span; () keeps `span_length` of the run.
    """

    reads: tuple[str, ...] = ("hidden", "stats", "span")
    projection: Width = 64
    span_embedding: Width = 64
    ffn_width: Width = 256
    concentration_floor: PositiveOr0 = 0.05
    initial_concentration: Positive = 1.0
    distribution: str = "dirichlet"
    share_actors: bool = False
    span_lengths: tuple[Count, ...] = ()
    encoder: str | None = None
    text_tokens: Count = 512
    max_spans: Spans = 0
    network: str = "joint"
    hidden_dropout: ShareBelow1 = 0.0

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.distribution not in ("dirichlet", "logistic_normal"):
            raise InputError(f"distribution must be dirichlet or logistic_normal, not {self.distribution!r}")
        if len(set(self.span_lengths)) != len(self.span_lengths):
            raise InputError(f"span_lengths must be different numbers, not {list(self.span_lengths)}")
        unknown = [part for part in self.reads if part not in OBSERVATION_PARTS]
        if unknown or not self.reads:
            raise InputError(f"reads must name some of {', '.join(OBSERVATION_PARTS)}, not {list(self.reads)}")
        if ("text" in self.reads) != (self.encoder is not None):
            raise InputError(
                'to read "text" needs an encoder, such as microsoft/deberta-v3-base, and only that; '
                f"reads is {', '.join(self.reads)} and encoder {self.encoder}"
            )
        if self.network not in NETWORKS:
            raise InputError(f"network must be one of {', '.join(NETWORKS)}, not {self.network!r}")
        if self.network == "set":
            self._check_set()
        elif self.hidden_dropout:
            raise InputError("hidden_dropout is of set agents: set network, too")

    def _check_set(self) -> None:
        if not set(MEMBER_PARTS) & set(self.reads):
            raise InputError(f"a set agent must read something of each member: {_MEMBER_PARTS}")
        if self.distribution != "dirichlet":
            raise InputError("a set agent's weights have a Dirichlet; leave distribution out")
        if self.share_actors:
            raise InputError("a set agent is one network already, and not told whose it is; leave share_actors out")

    @classmethod
    def of_set(cls, **changes: Any) -> Self:
        """Settings of a set agent."""
        return cls(**NETWORKS["set"] | {"network": "set"} | changes)


# Dev prompts that are scored unless their number is given: per answer of an iteration, since greedy answers cost about
# what those of a rollout cost; the fewest and the most.
DEV_SHARE, FEWEST_DEV, MOST_DEV = 4, 32, 512
CREDITS = ("span", "answer")  # see rlae_jax.ppo.given
SCHEDULES = ("constant", "linear", "cosine")  # see rlae_jax.schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Training of a weight agent with PPO (Schulman et al., 2017) on the span MDP.

    The defaults are the `demo` preset; `PPOConfig.paper()` has the published figures. A run records which it used.

    Attributes:
      iterations: rollouts, each followed by `epochs` passes over it in `minibatches`.
      prompts, samples: prompts per rollout, and answers to each.
      accumulate: parts of a minibatch whose gradients are summed before a step.
      learning_rate, schedule, warmup: Adam's step size, which after `warmup` iterations of linear growth stays
        ("constant") or falls to 0 at the last iteration ("linear", "cosine").
      target_kl: an iteration's remaining updates are left out once a minibatch's estimate of KL(old || new) exceeds it.
      member_cost, length_cost: taken off an answer's reward: for the mean number of members with a weight above 0.05,
        beyond the first; and for the longest possible answer, shorter ones in proportion.
      discount, gae_lambda: gamma and lambda of the advantage estimate.
      clip, value_clip: of the probability ratio and of the value's change.
      span_length, max_new_tokens: None takes the task's.
      temperature: of the tokens; 0 writes greedily, and only the weights are drawn.
      credit: where a reward by likelihood comes (see `ppo.given`): "span" gives each span its own, "answer" the last
        span their sum; None is "span". A written answer has its reward at its end.
      engine, slots: whether a rollout writes so many of an agent's answers at a time and gives a row that ends the next
        prompt, instead of all together until the longest ends. None is `engine_slots`. The answers are the same.
      eval_every, eval_prompts: the first so many prompts of dev are scored, and a checkpoint written, every so many
        iterations. None is `dev_prompts`.
      seed, seeds: agents of the seeds seed, seed + 1, ... are trained side by side in one program.
      shares: of an iteration's prompts, for each of several tasks, as numbers of any scale; () for one task.
    """

    iterations: Count = 200
    prompts: Count = 512
    samples: Count = 1
    epochs: Passes = 4
    minibatches: Count = 4
    accumulate: Count = 1
    learning_rate: LearningRate = 1e-3
    schedule: str = "constant"
    warmup: CountOr0 = 0
    target_kl: Positive | None = None
    discount: Share = 1.0
    gae_lambda: Share = 0.95
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    value_weight: PositiveOr0 = 0.5
    entropy_weight: PositiveOr0 = 0.003
    gradient_norm: Positive = 1.0
    member_cost: PositiveOr0 = 0.0
    length_cost: PositiveOr0 = 0.0
    span_length: Count | None = None
    max_new_tokens: Count | None = None
    temperature: Temperature = 0.0
    credit: str | None = None
    engine: bool = False
    slots: Count | None = None
    eval_every: Count = 10
    eval_prompts: Count | None = None
    seed: Seed = 0
    seeds: Count = 1
    shares: tuple[Positive, ...] = ()
    agent: AgentConfig = AgentConfig()

    algorithm: ClassVar[str] = "ppo"

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.seed + self.seeds - 1 > ranges.LAST_SEED:
            raise InputError(f"seeds {self.seed} to {self.seed + self.seeds - 1}: the last seed is {ranges.LAST_SEED}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.credit not in (None, *CREDITS):
            raise InputError(f"credit must be one of {', '.join(CREDITS)}, not {self.credit!r}")
        if self.slots is not None and not self.engine:
            raise InputError("slots are an engine's: set engine, too")
        if 0 in self.task_prompts:
            raise InputError(
                f"a share of {self.shares[self.task_prompts.index(0)]:g} among {list(self.shares)} is none of "
                f"{self.prompts} prompts; give more prompts (--prompts) or a larger share (--task-shares)"
            )

    @classmethod
    def demo(cls, **changes: Any) -> Self:
        """Settings for small members and short answers: fast steps, undiscounted."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """RLAE's published figures (arXiv 2506.00439, appendix, and its released code)."""
        published: dict[str, Any] = {
            "iterations": 116,  # two passes over GSM8K's 7,473 training prompts
            "prompts": 128,
            "epochs": 3,
            "minibatches": 1,
            "learning_rate": 1e-4,
            "discount": 0.99,
            "entropy_weight": 0.01,
            "span_length": 4,
            "agent": AgentConfig(concentration_floor=1e-4, initial_concentration=math.log(2.0)),
        }
        return cls(**(published | changes))

    @property
    def method(self) -> str:
        """What results call agents of these settings."""
        return f"rlae_{self.algorithm}" + ("_set" if self.agent.network == "set" else "")

    @property
    def dev_prompts(self) -> int:
        """The dev prompts that are scored, if there are as many: four for each answer of an iteration unless
        `eval_prompts` says so, at least 32 and at most 512."""
        bound = max(DEV_SHARE * self.prompts * self.samples, FEWEST_DEV)
        return min(bound, MOST_DEV) if self.eval_prompts is None else self.eval_prompts

    @property
    def task_prompts(self) -> tuple[int, ...]:
        """How many of an iteration's prompts are each task's: the whole parts of their shares, and what is left over
        to the largest remainders."""
        if not self.shares:
            return (self.prompts,)
        exact = [self.prompts * share / sum(self.shares) for share in self.shares]
        counts = [int(part) for part in exact]
        by_remainder = sorted(range(len(exact)), key=lambda t: counts[t] - exact[t])
        for t in by_remainder[: self.prompts - sum(counts)]:
            counts[t] += 1
        return tuple(counts)

    @property
    def engine_slots(self) -> int | None:
        """Answers of an agent that are written at a time, if not all: a quarter unless `slots` says so, at least 8."""
        if not self.engine:
            return None
        answers = self.prompts * self.samples
        return min(max(answers // 4, 8) if self.slots is None else self.slots, answers)

    @property
    def preset(self) -> str:
        """The preset that these settings are, or "custom". How long, from which seed, for which answers and how they
        are written does not make it another one."""
        of_answers = ("span_length", "max_new_tokens", "engine", "slots")
        neutral = ("iterations", "seed", "seeds", "eval_every", "eval_prompts", "shares", *of_answers)
        for name in PRESETS:
            preset = getattr(type(self), name)
            if self == preset(**{field: getattr(self, field) for field in neutral}):
                return name
        return "custom"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAPPOConfig(PPOConfig):
    """Training of one agent per member with MAPPO (Yu et al., 2022, arXiv 2103.01955): each has its own observation,
    action and clipped ratio; the reward is the team's, and one critic sees everything."""

    algorithm: ClassVar[str] = "mappo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(MEMBER_PARTS) & set(self.agent.reads):
            raise InputError(f"an agent per member must read something of its member: {_MEMBER_PARTS}")
        if self.agent.distribution != "dirichlet":
            raise InputError("agents that draw a weight each have a Dirichlet together; leave distribution out")


ALGORITHMS: dict[str, type[PPOConfig]] = {"ppo": PPOConfig, "mappo": MAPPOConfig}
PRESETS = ("demo", "paper")
