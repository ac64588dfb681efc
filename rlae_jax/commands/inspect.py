"""`rlae-jax inspect`."""

import dataclasses
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from rlae_jax.commands.options import MemberOptions
from rlae_jax.ranges import Bandwidth, Count

INSPECTED_TOKENS = 1024  # or the shortest context


def inspect(
    *,
    model: Annotated[MemberOptions, OmitArgPrefixes],
    bandwidth: Bandwidth = 1000.0,
    batch: Count = 1,
    tokens: Count | None = None,
) -> None:
    """Show how models fit together, and how fast they could write, without running them.

    For models with different tokenizers: how many of a vocabulary's texts another member has as one token, how many
    tokens of each member an entry of their union takes, what some member cannot write at all.

    Args:
        model: which models.
        bandwidth: of the memory that holds the weights, in 10^9 bytes per second: the limit of a step is reading all
            weights and the cache once.
        batch: answers written together.
        tokens: length of each text so far. Default: 1024, or the shortest context.
    """
    from rlae_jax.inspect_members import inspect_members, show
    from rlae_jax.models import load

    model.require_models()
    end_ids = model.read_end_ids(len(model.models))
    held = dataclasses.asdict(model.held)
    members = [load(name, dtype=model.dtype, **held) for name in model.models]
    if tokens is None:
        tokens = min(INSPECTED_TOKENS, *(lm.config.context for lm in members))
    show(inspect_members(members, end_ids, bandwidth_gb_s=bandwidth, batch=batch, tokens=tokens))
