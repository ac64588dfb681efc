"""Texts as rows and tokens to be read: cut into tokens by a rule, and into windows where they are long.

    prompts, texts ─cut_texts─► Cut: windows (row, tokens), each of a text

With one tokenizer a text has its tokens. Over a union it can be cut into entries in many ways, of which one is read: a
likelihood over a union therefore bounds that of the text from below, and its bits per byte from above. The rules are
"own:k", as member k's tokenizer cuts it ("own" is the first member's), and "longest", the longest entry everywhere from
the left; so is a text cut that member k's tokenizer would change, but for a space before it.

A text that does not fit the members' context behind its prompt is read in windows: the first as far as it fits; every
further one goes on behind the token that begins a text, if the tokenizer has one, and the last half context of what
stands before it. Each token is asked for once. A token that ends a text is none of it: bits are of its bytes alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion.codec import Codec
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.prompts import Row

OWN, LONGEST = "own", "longest"


@dataclasses.dataclass(frozen=True)
class Cut:
    """N texts as W windows, in order."""

    rows: list[Row]
    tokens: list[list[int]]
    prompts: list[str]  # each window's text's prompt
    text: Int[np.ndarray, " W"]  # whose window it is
    bytes: Int[np.ndarray, " N"]  # of each text, in UTF-8

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.tokens))


def rules(ensemble: Ensemble) -> list[str]:
    """The rules that cut texts differently for these members."""
    if ensemble.union is None:
        return [OWN]
    return [*(f"{OWN}:{k}" for k in range(len(ensemble.members))), LONGEST]


def member_of(rule: str, ensemble: Ensemble) -> int | None:
    """The member whose tokenizer cuts texts; None for the longest match.

    Raises:
      InputError: no such rule, or no such member.
    """
    if rule == LONGEST and ensemble.union is not None:
        return None
    own = [OWN, *(f"{OWN}:{k}" for k in range(1, len(ensemble.members)))]
    if rule in (*own, f"{OWN}:0"):
        return own.index(rule) if rule in own else 0
    known = "own" if ensemble.union is None else f"own, {', '.join(rules(ensemble))}"
    raise InputError(f"texts cannot be cut by {rule!r}; these members have {known}")


def cut_texts(
    ensemble: Ensemble,
    prompts: Sequence[str],
    texts: Sequence[str],
    rule: str = OWN,
    *,
    chat: bool = False,
    most: int | None = None,
) -> Cut:
    """Texts, each behind its prompt, or by itself where that is "".

    Args:
      chat: prompts go through the members' chat templates.
      most: tokens of a window.

    Raises:
      InputError: an unknown rule, texts without a token, with one that some member cannot write, or whose prompt leaves
        them no room.
    """
    cut, codec = member_of(rule, ensemble), ensemble.codec
    rows: list[Row] = [codec.start() if not prompt else () for prompt in prompts]
    asked = [i for i, prompt in enumerate(prompts) if prompt]
    if asked:
        for i, row in zip(asked, ensemble.encode([prompts[i] for i in asked], chat=chat), strict=True):
            rows[i] = row
    joined = not chat and ensemble.continues
    tokens = [
        _cut(codec, prompt, text, joined and bool(prompt), cut) for prompt, text in zip(prompts, texts, strict=True)
    ]
    findings = [("texts without a token", f"text {i}") for i, own in enumerate(tokens) if not own]
    findings += [
        ("texts with a token that not every member can write", f"text {i}") for i in _unwritable(codec, tokens)
    ]
    findings += [
        ("prompts that leave no room", f"prompt {i} has {n} tokens, and the context is {ensemble.context}")
        for i, n in enumerate(ensemble.lengths(rows))
        if n > ensemble.context
    ]
    if findings:
        raise grouped_error("texts that cannot be read", findings)
    begins = [None if lm.tokenizer is None else lm.tokenizer.bos_token_id for lm in ensemble.members]
    windows: list[tuple[int, Row, list[int]]] = []
    for i, (row, own) in enumerate(zip(rows, tokens, strict=True)):
        windows += [(i, *window) for window in _windows(ensemble, row, own, begins, most or len(own))]
    text, all_rows, all_tokens = (list(column) for column in zip(*windows, strict=True))
    sizes = np.array([len(one.encode()) for one in texts], np.int64)
    return Cut(all_rows, all_tokens, [prompts[i] for i in text], np.array(text, np.int64), sizes)


def _cut(codec: Codec, prompt: str, text: str, joined: bool, cut: int | None) -> list[int]:
    tokens = codec.continuation(prompt, text, joined, cut)
    if codec.union is None or cut is None:
        return tokens
    spelled = b"" if min(tokens, default=0) < 0 else b"".join(map(codec.union.entry_bytes, tokens))
    same = spelled in (text.encode(), b" " + text.encode())
    return tokens if same else codec.continuation(prompt, text, joined, None)


def _unwritable(codec: Codec, tokens: Sequence[Sequence[int]]) -> list[int]:
    """Which of some texts have an entry that may not stand where it stands."""
    if codec.union is None:
        return []
    after = np.asarray(codec.tables.utf8)
    wrong = []
    for i, own in enumerate(tokens):
        state = 0
        for entry in own:
            state = -1 if state < 0 or entry < 0 else int(after[state, entry])
        if state < 0:
            wrong.append(i)
    return wrong


def _windows(
    ensemble: Ensemble, row: Row, tokens: list[int], begins: Sequence[int | None], most: int
) -> list[tuple[Row, list[int]]]:
    alike = isinstance(row[0], int | np.integer)
    before = [list(row)] if alike else [list(ids) for ids in row]
    spelled = ensemble.codec.spell(tokens)[: len(before)]
    ends = [np.cumsum([0, *counts]) for _, counts in spelled]
    context, start = ensemble.context, 0
    windows: list[tuple[Row, list[int]]] = []
    while start < len(tokens):
        rows = []
        for ids, (own, _), end, begin in zip(before, spelled, ends, begins, strict=False):
            past = ids + own[: end[start]]
            if start and len(past) > context // 2:
                first = [begin] if begin is not None and past[0] == begin else []
                past = first + past[len(past) - max(context // 2 - len(first), 1) :]
            rows.append(past)
        # The last token is asked for, but not read.
        rooms = [context - len(past) + end[start] for past, end in zip(rows, ends, strict=True)]
        stop = min(int(np.searchsorted(end, room, side="right")) for end, room in zip(ends, rooms, strict=True))
        stop = min(max(stop, start + 1), start + most, len(tokens))
        windows.append((rows[0] if alike else tuple(rows), tokens[start:stop]))
        start = stop
    return windows
