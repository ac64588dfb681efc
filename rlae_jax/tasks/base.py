"""What a task is: prompts with references in three splits, and a reward. Knows nothing of models."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

from rlae_jax.errors import InputError
from rlae_jax.tasks.rewards import Reward

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Prompts and what a good answer to each is compared with."""

    prompts: Sequence[str]
    references: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """A hash of the content, by which a run knows its data again."""
        content = json.dumps([list(self.prompts), list(self.references)]).encode()
        return hashlib.sha256(content).hexdigest()

    def take(self, n: int) -> "Examples":
        """The first n, or all of them."""
        return Examples(self.prompts[:n], self.references[:n])


@dataclasses.dataclass(frozen=True)
class Task:
    """A named set of examples with a reward.

    Attributes:
      splits: "train" (agents and searches learn on it), "dev" (choices are made on it), "test" (read once). No prompt
        of one split says what an answer of another is.
      reward: (text, reference) -> a number in [0, 1].
      token_reward: the reward is 1 exactly for the reference's own tokens followed by the end, so that programs on the
        device can score ids without their text.
      max_new_tokens, span_length: what suits the task's answers.
      skills: per split and example the skill that each span of `span_length` steps needs, where a task knows it.
    """

    name: str
    splits: Mapping[str, Examples]
    reward: Reward
    token_reward: bool = False
    max_new_tokens: int = 64
    span_length: int = 4
    skills: Mapping[str, Sequence[Sequence[str]]] | None = None

    def split(self, name: str) -> Examples:
        """The examples of a split.

        Raises:
          InputError: no such split, or an empty one.
        """
        examples = self.splits.get(name)
        if examples is None:
            raise InputError(f"task {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        if not len(examples):
            raise InputError(f"task {self.name}: its split {name!r} is empty; the file has too few examples")
        return examples
