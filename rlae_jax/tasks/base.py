"""What a task is: prompts with references in three splits, and a reward. Knows nothing of models."""

import dataclasses
import string
from collections.abc import Mapping, Sequence

from rlae_jax import files
from rlae_jax.errors import InputError
from rlae_jax.tasks.rewards import Reference, Reward

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Prompts and what a good answer to each is compared with.

    Attributes:
      references: per prompt one answer, or several of which any counts.
      options: for multiple choice, per prompt what may follow it, word for word; option i has the letter "ABC..."[i],
        which is the reference of the right one.
    """

    prompts: Sequence[str]
    references: Sequence[Reference]
    options: Sequence[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """A hash of the content, by which a run knows its data again."""
        content = [list(self.prompts), list(self.references)]
        if self.options is not None:
            content.append(list(self.options))
        return files.digest(content)

    def texts(self) -> list[str]:
        """Each right answer word for word, as it may follow its prompt: the option that the reference names, or else
        the reference, of several the first."""
        firsts = [one if isinstance(one, str) else one[0] for one in self.references]
        if self.options is None:
            return firsts
        return [own[string.ascii_uppercase.index(letter)] for own, letter in zip(self.options, firsts, strict=True)]

    def take(self, n: int) -> "Examples":
        """The first n, or all of them."""
        return self.select(range(min(n, len(self))))

    def select(self, rows: Sequence[int]) -> "Examples":
        """These ones, in this order."""
        options = None if self.options is None else [self.options[i] for i in rows]
        return Examples([self.prompts[i] for i in rows], [self.references[i] for i in rows], options)


def joined(parts: Sequence[Examples]) -> Examples:
    """Examples of several tasks, one after another."""
    return Examples(
        [prompt for part in parts for prompt in part.prompts],
        [reference for part in parts for reference in part.references],
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """A named set of examples with a reward.

    Attributes:
      splits: "train" (agents and searches learn on it), "dev" (choices are made on it), "test" (read once). No prompt
        of one split says what an answer of another is.
      reward: (text, reference) -> a number in [0, 1]. `scoring.RewardPool` calls it so that nothing it does is fatal.
      token_reward: the reward is 1 exactly for the reference's own tokens followed by the end, so that programs on the
        device can score ids without their text.
      max_new_tokens, span_length: what suits the task's answers.
      stop: what ends an answer, for members that would go on with a question of their own.
      chat: prompts are messages to a chat model, to be put into the members' chat templates.
      by_likelihood: nothing is sampled. Agents learn from the log-probability of the right answer (`Examples.texts`),
        and are scored by it, in bits per byte; of examples with options the likeliest option, per byte, is the answer,
        and its letter is what `reward` scores.
      cut: by which rule members with different tokenizers cut such texts, see `fusion.cutting`.
      skills: per split and example the skill that each span of `span_length` steps needs, where a task knows it.
    """

    name: str
    splits: Mapping[str, Examples]
    reward: Reward
    token_reward: bool = False
    max_new_tokens: int = 64
    span_length: int = 4
    skills: Mapping[str, Sequence[Sequence[str]]] | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False
    by_likelihood: bool = False
    cut: str = "own"

    @property
    def reads_texts(self) -> bool:
        """Whether what is scored is how likely right answers are, not which of several options is the likeliest."""
        return self.by_likelihood and all(examples.options is None for examples in self.splits.values())

    def split(self, name: str) -> Examples:
        """The examples of a split.

        Raises:
          InputError: no such split, or an empty one.
        """
        examples = self.splits.get(name)
        if examples is None:
            raise InputError(f"task {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        if not len(examples):
            raise InputError(f"task {self.name}: its split {name!r} is empty: no example is left for it")
        return examples

    def select(self, rows: Mapping[str, Sequence[int]]) -> "Task":
        """The task with these examples of each split."""
        splits = {split: examples.select(rows[split]) for split, examples in self.splits.items()}
        skills = self.skills and {split: [needed[i] for i in rows[split]] for split, needed in self.skills.items()}
        return dataclasses.replace(self, splits=splits, skills=skills)
