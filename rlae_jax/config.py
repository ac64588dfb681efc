"""Settings of a training run: frozen dataclasses, one per concern, with two named presets.

A run writes its settings to `config.json`; `fingerprint` is what decides whether a directory belongs to a run.
"""

import dataclasses
import math
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.fusion.policy import OBSERVATION_PARTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The weight agent's network.

    Attributes:
      reads: parts of the observation that it sees: "hidden" (each member's last hidden state), "stats" (entropy, top
        probability, log-probability of the last span, disagreement) and "span" (the span's index).
      projection: width to which each member's hidden state is projected.
      span_embedding: width of the span index's embedding.
      ffn_width: hidden width of the actor's and of the critic's MLP.
      concentration_floor: added to every softplus concentration of the Dirichlet.
      initial_concentration: where every concentration starts: 1 draws all weights alike, more keeps near equal ones.
    """

    reads: tuple[str, ...] = ("hidden", "stats", "span")
    projection: int = 64
    span_embedding: int = 64
    ffn_width: int = 256
    concentration_floor: float = 0.05
    initial_concentration: float = 1.0

    def __post_init__(self) -> None:
        unknown = [part for part in self.reads if part not in OBSERVATION_PARTS]
        if unknown or not self.reads:
            raise InputError(f"reads must name some of {', '.join(OBSERVATION_PARTS)}, not {list(self.reads)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Training of a weight agent with PPO (Schulman et al., 2017) on the span MDP.

    The defaults are the `demo` preset; `PPOConfig.paper()` has the published figures. A run records which it used.

    Attributes:
      iterations: rollouts, each followed by `epochs` passes over it in `minibatches`.
      prompts: prompts per rollout.
      discount, gae_lambda: gamma and lambda of the advantage estimate.
      clip, value_clip: of the probability ratio and of the value's change.
      span_length, max_new_tokens: None takes the task's.
      temperature: of the tokens; 0 writes greedily, and only the weights are drawn.
      eval_every, eval_prompts: the dev split is scored, and a checkpoint written, every so many iterations.
    """

    iterations: int = 200
    prompts: int = 512
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.003
    gradient_norm: float = 1.0
    span_length: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    eval_every: int = 10
    eval_prompts: int = 512
    seed: int = 0
    agent: AgentConfig = AgentConfig()

    def __post_init__(self) -> None:
        low = [
            name
            for name in ("iterations", "prompts", "epochs", "minibatches", "eval_every", "eval_prompts")
            if getattr(self, name) < 1
        ]
        if low:
            raise InputError(f"{', '.join(low)} must be at least 1")

    @classmethod
    def demo(cls, **changes: Any) -> "PPOConfig":
        """Settings for small members and short answers: fast steps, undiscounted."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> "PPOConfig":
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
    def preset(self) -> str:
        """The preset that these settings are, or "custom". How long, from which seed and for which answers a preset
        runs does not make it another one."""
        neutral = ("iterations", "seed", "span_length", "max_new_tokens", "eval_every", "eval_prompts")
        for name, preset in PRESETS.items():
            if self == preset(**{field: getattr(self, field) for field in neutral}):
                return name
        return "custom"


PRESETS = {"demo": PPOConfig.demo, "paper": PPOConfig.paper}
