"""`DecodeSpec`: what shapes a decoding program (members, operator, policy, lengths), and its scalars and tables.

Nothing in it belongs to the rows of a batch: those are `prompts.Prompts`.
"""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Int8

from rlae_jax import ranges
from rlae_jax.fusion.operators import IGNORE_ZERO_WEIGHTS, FusionOperator, linear
from rlae_jax.fusion.policy import Dims, Fixed, Policy
from rlae_jax.fusion.reading import TextReader
from rlae_jax.fusion.sampling import Sampling
from rlae_jax.models import ModelConfig
from rlae_jax.ranges import Count, CountOr0


class Spelling(NamedTuple):
    """One member's view of the union vocabulary."""

    partner: Int[Array, " U"]  # the member's id that is exactly this entry, or -1
    first: Int[Array, " U"]  # its first id of the entry's spelling, or -1 where that has none
    own: Int[Array, " V"]  # the entry that each of its ids is, or -1
    ids: Int[Array, " N"]  # all spellings, one after another
    offsets: Int[Array, " O"]  # U + 1

    def lengths(self, entries_b: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many tokens entries cost this member."""
        return self.offsets[entries_b + 1] - self.offsets[entries_b]


class UnionTables(NamedTuple):
    """What the loop reads of a union vocabulary."""

    spellings: tuple[Spelling, ...]  # of each member
    # The state of a UTF-8 automaton after each entry, from each of its states; -1 where the entry would break a
    # character or cannot be written by every member.
    utf8: Int8[Array, "8 U"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """What is decoded and how. Its data fields may change without a new compilation; the static ones shape it."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling.create)
    min_new_tokens: Int[Array, ""] | int = 0  # no end token before this many
    members: tuple[ModelConfig, ...] = dataclasses.field(metadata={"static": True})
    # The members are K adapters of one base: one `lora.Adapted` serves them all, and one pass runs K rows per prompt.
    shared_base: bool = dataclasses.field(default=False, metadata={"static": True})
    fusion: FusionOperator = dataclasses.field(default=linear, metadata={"static": True})
    policy: Policy = dataclasses.field(default_factory=Fixed, metadata={"static": True})
    sample_weights: bool = dataclasses.field(default=False, metadata={"static": True})  # draw actions, or take modes
    record: bool = dataclasses.field(default=False, metadata={"static": True})  # keep observations (for training)
    span_length: Count = dataclasses.field(default=4, metadata={"static": True})  # L
    max_new_tokens: Count = dataclasses.field(default=64, metadata={"static": True})
    end_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})  # () ends at the length only
    scores: bool = dataclasses.field(default=False, metadata={"static": True})  # keep the tokens' log-probabilities
    top: CountOr0 = dataclasses.field(default=0, metadata={"static": True})  # with scores: of the likeliest tokens, too
    union: UnionTables | None = None  # of members with different tokenizers, or of any that may be skipped
    member_tokens: CountOr0 = dataclasses.field(default=0, metadata={"static": True})  # with a union: a member's room
    reader: TextReader | None = None  # for policies that read "text"

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """The lengths among which the policy chooses for each span; () where all have `span_length`."""
        return getattr(self.policy, "span_lengths", ())

    @property
    def spans(self) -> int:
        """P: the most spans that an answer can have."""
        return -(-self.max_new_tokens // min(self.span_lengths or (self.span_length,)))

    @property
    def vocab(self) -> int:
        """V: the ids that all members have, or U. Rows of a head beyond its tokenizer never win."""
        if self.union is not None:
            return self.union.utf8.shape[1]
        return min(member.usable_vocab for member in self.members)

    @property
    def dims(self) -> Dims:
        """What a policy's parameters depend on."""
        text = 0 if self.reader is None else self.reader.config.hidden_width
        return Dims(tuple(member.hidden_width for member in self.members), self.spans, text)

    @property
    def decides_once(self) -> bool:
        """Whether every decision is the same: the policy looks at nothing and draws nothing."""
        return not (self.policy.reads or self.sample_weights or self.span_lengths)

    @property
    def decides_first(self) -> bool:
        """Whether weights are known before the members are read: members without weight need not be."""
        return self.union is not None and not {"hidden", "stats", "agreement"} & set(self.policy.reads)

    @property
    def may_skip(self) -> bool:
        """Whether members without weight may be left behind: nothing else looks at them."""
        looked_at = self.scores or "so_far" in self.policy.reads
        return self.decides_first and self.fusion in IGNORE_ZERO_WEIGHTS and not looked_at
