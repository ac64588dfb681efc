"""DynaOpt's weights of several objectives in one training run (Min et al., 2024): a bandit decides which to raise.

In: an objective's mean validation scores, time after time. Out: the objectives' weights for every step. Everything is a
function of a seed and of the scores so far, so that a resumed run finds the state again by reading its own metrics.

Two bandits: the outer one has an arm for each objective and one for doing nothing; the inner one's weights, scaled to
sum to 1, are the objectives' weights, and the arm that the outer one holds raises them. As the published code has it,
the outer bandit is paid the mean improvement of the scores, some hundredths, from which it hardly learns; and the inner
one is paid 1 at every step, whatever came of it ("reference"). Repaired, both are paid the improvement on the scale of
the improvements so far, as the article means it, the inner one once per validation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

GAMMA = 0.07  # as published


class Exp3(NamedTuple):
    """The bandit of Auer et al. (2002): p_i = (1 - gamma) w_i / sum w + gamma / K."""

    weights: tuple[float, ...]
    gamma: float = GAMMA

    @classmethod
    def create(cls, arms: int, gamma: float = GAMMA) -> "Exp3":
        """Equal weights."""
        return cls((1.0,) * arms, gamma)

    @property
    def probabilities(self) -> Float[np.ndarray, " K"]:
        w = np.array(self.weights)
        p: Float[np.ndarray, " K"] = (1 - self.gamma) * w / w.sum() + self.gamma / len(w)
        return p

    def paid(self, arm: int, reward: float) -> "Exp3":
        """w_i exp(gamma reward / (p_i K)) for the arm i that was pulled."""
        raised = list(self.weights)
        raised[arm] *= math.exp(self.gamma * reward / (self.probabilities[arm] * len(raised)))
        return self._replace(weights=tuple(raised))


class DynaOpt:
    """The objectives' weights over a run.

    Args:
      seed: of the arms drawn.
      reference: as the published code, see above.
    """

    def __init__(self, objectives: Sequence[str], seed: int, reference: bool = False):
        self._names, self._reference, self._seed = list(objectives), reference, seed
        self._outer = Exp3.create(len(self._names) + 1)
        self._inner = Exp3.create(len(self._names))
        self._before: Mapping[str, float] | None = None
        self._improvements: list[float] = []
        self._draw()

    def _draw(self) -> None:
        # A draw of its own for every validation, so that the state is a function of the history alone.
        rng = np.random.default_rng((self._seed, len(self._improvements)))
        self.arm = int(rng.choice(len(self._names) + 1, p=self._outer.probabilities))

    @property
    def weights(self) -> Float[np.ndarray, " M"]:
        """Of the objectives; they sum to 1."""
        w = np.array(self._inner.weights)
        shares: Float[np.ndarray, " M"] = w / w.sum()
        return shares

    def step(self) -> None:
        """A training step was done."""
        if self._reference and self.arm < len(self._names):
            self._inner = self._inner.paid(self.arm, 1.0)

    def validated(self, scores: Mapping[str, float]) -> None:
        """Takes the objectives' mean validation scores, pays the bandits and draws the next arm."""
        before, self._before = self._before, scores
        if before is None:  # nothing to compare with, and nothing was learnt yet
            return
        improvement = float(np.mean([scores[name] - before[name] for name in self._names]))
        self._improvements.append(improvement)
        if self._reference:
            self._outer = self._outer.paid(self.arm, improvement)
        else:
            low, high = min(self._improvements), max(self._improvements)
            reward = (improvement - low) / (high - low) if high > low else 0.5
            self._outer = self._outer.paid(self.arm, reward)
            if self.arm < len(self._names):
                self._inner = self._inner.paid(self.arm, reward)
        self._draw()
