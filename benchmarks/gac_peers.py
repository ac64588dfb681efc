"""Two tokenizers, one text, in torch: GaC (Yu et al., 2024, arXiv 2406.12585), as published and as well as torch can.

In: Hugging Face directories of Llama members with their tokenizers, and prompts as text. Out: per row the bytes written
and the tokens that every member read for them. Greedy, uniform weights, every step fused; end tokens do not end a text:
each prompt gets exactly N steps.

The published algorithm: the union of the vocabularies is one of *strings*, with the marks of a space replaced; a 0/1
matrix per model carries its distribution there; the mean's best string is tokenized again for every model. Its known
traps are kept, because they are part of it: bytes of a byte-level vocabulary are read as characters, and "." may be two
entries. What a text's bytes are is what the first member's tokens stand for.

- `ReferencePeer` does that step by step, one prompt at a time.
- `BestPeer` does the same job batched, for two members: slices of reordered output heads instead of matrices, tables
  instead of tokenizers, a preallocated cache where every row has its own length, dense layers on the pending tokens
  alone, `torch.compile` where it wins. It takes any `Union`: with another program's tables it writes that program's
  text.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks import peers
from benchmarks.peers import Dims, Generate, LayerCache, LayerWeights, Member, Peer


@dataclasses.dataclass(frozen=True)
class Written:
    """What a peer wrote. Lists have one entry per prompt."""

    texts: list[bytes]
    entries: list[list[int]]  # of the union, N each
    fed: np.ndarray  # Int[B, K]: tokens that each member read after the prompt; the last step's are never read


# --- the union, as published ---


@dataclasses.dataclass(frozen=True)
class Union:
    """A union vocabulary of U entries as tables."""

    texts: tuple[bytes, ...]  # what an entry writes
    maps: tuple[np.ndarray, ...]  # per member Int[V]: the entry of each id, -1 for an id that has none
    spellings: tuple[list[list[int]], ...]  # per member the ids that spell each entry, at least one


@dataclasses.dataclass(frozen=True)
class Strings:
    """The published union before anything is spelled."""

    strings: tuple[str, ...]
    maps: tuple[np.ndarray, ...]  # as in `Union`


def byte_level(tokenizer: Any) -> bool:
    """Whether most marks of a space are those of byte-level BPE."""
    vocab = tokenizer.get_vocab()
    return sum(token.startswith("Ġ") for token in vocab) > sum(token.startswith("▁") for token in vocab)


def single_bytes(tokenizer: Any) -> dict[str, int]:
    """The ids of the strings <0x00> to <0xFF>. A byte-level vocabulary gives its first 128, by tokenizing them."""
    if byte_level(tokenizer):
        return {f"<0x{i:02X}>": tokenizer.convert_tokens_to_ids(tokenizer.tokenize(chr(i)))[0] for i in range(128)}
    vocab = tokenizer.get_vocab()
    return {name: vocab[name] for name in (f"<0x{i:02X}>" for i in range(256)) if name in vocab}


def union_strings(tokenizers: Sequence[Any], sizes: Sequence[int]) -> Strings:
    """Every token's string, once. `sizes` are the models' vocabularies; ids beyond them have no entry."""
    index: dict[str, int] = {f"<0x{i:02X}>": i for i in range(256)}
    maps = []
    kinds = [byte_level(tokenizer) for tokenizer in tokenizers]
    for tokenizer, size, bytewise in zip(tokenizers, sizes, kinds, strict=True):
        names = {i: name for name, i in single_bytes(tokenizer).items()}
        entry_of = np.full(size, -1, np.int64)
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if i >= size:
                continue
            if i in names:
                string = names[i]
                if bytewise and not all(kinds):  # the only bytes that meet another model's characters
                    character = chr(int(string[3:5], 16))
                    string = character if character.isalnum() else string
            elif bytewise:
                string = token.replace("Ġ", " ").replace("Ċ", "\n")
            else:
                string = token.replace("▁", " ") if token.startswith("▁") else token
            entry_of[i] = index.setdefault(string, len(index))
        maps.append(entry_of)
    # Single bytes that no model can choose are entries nevertheless, as published.
    return Strings(tuple(index), tuple(maps))


def find_prefix(tokenizer: Any) -> str:
    """A text after which a token can be tokenized as in the middle of a text: the shortest word that is a token and
    part of no other. Byte-level tokenizers need none."""
    if byte_level(tokenizer):
        return ""
    words = [token for token in tokenizer.get_vocab() if token.startswith("▁")]
    for word in sorted((word[1:] for word in words), key=lambda word: (len(word), word)):
        if word.strip() and "▁" not in word and not any("▁" + word in other for other in words if other != "▁" + word):
            return word
    raise ValueError("this tokenizer has no word that is part of no other")


@dataclasses.dataclass(frozen=True)
class Speller:
    """Tokenizes strings of the union for one member, as published."""

    tokenizer: Any
    prefix: str
    bytes: dict[str, int]
    ends: frozenset[str]  # the members' end tokens; each member reads its own instead

    def __call__(self, string: str) -> list[int]:
        if string in self.ends:
            return [self.tokenizer.eos_token_id]
        if string in self.bytes:
            return [self.bytes[string]]
        for prefix in (self.prefix, ";"):
            start = self.ids(prefix)
            both = self.ids(prefix + string)
            if both[: len(start)] == start and len(both) > len(start):
                return both[len(start) :]
        return self.ids(string)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def all(self, strings: Sequence[str]) -> list[list[int]]:
        """The same for many strings, the tokenizer called once for all of them."""
        spelled: list[list[int]] = []
        start = self.ids(self.prefix)
        encoded = self.tokenizer([self.prefix + string for string in strings], add_special_tokens=False).input_ids
        for string, both in zip(strings, encoded, strict=True):
            easy = string not in self.ends and string not in self.bytes
            easy = easy and both[: len(start)] == start and len(both) > len(start)
            spelled.append(both[len(start) :] if easy else self(string))
        return spelled


def make_spellers(tokenizers: Sequence[Any]) -> list[Speller]:
    ends = frozenset(tokenizer.eos_token for tokenizer in tokenizers)
    return [Speller(t, find_prefix(t), single_bytes(t), ends) for t in tokenizers]


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What each id stands for; special tokens stand for nothing."""
    added = tokenizer.added_tokens_decoder
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    bytewise = byte_level(tokenizer)
    names = {} if bytewise else {i: bytes([int(name[3:5], 16)]) for name, i in single_bytes(tokenizer).items()}
    texts = {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            texts[i] = b"" if added[i].special else token.encode()
        elif bytewise:
            texts[i] = bytes(characters[character] for character in token)
        else:
            texts[i] = names.get(i, token.replace("▁", " ").encode())
    return texts


def published_union(tokenizers: Sequence[Any], sizes: Sequence[int]) -> Union:
    """The published union with every entry spelled beforehand.

    Raises:
      ValueError: a tokenizer makes nothing of an entry, so that its model would have nothing to read.
    """
    union = union_strings(tokenizers, sizes)
    spellings = tuple(speller.all(union.strings) for speller in make_spellers(tokenizers))
    for spelled in spellings:
        empty = [string for string, ids in zip(union.strings, spelled, strict=True) if not ids]
        if empty:
            raise ValueError(f"{len(empty)} entries of the union have no tokens, the first is {empty[0]!r}")
    stands_for = token_bytes(tokenizers[0])
    return Union(tuple(b"".join(stands_for[i] for i in ids) for ids in spellings[0]), union.maps, spellings)


# --- as published ---


class ReferencePeer:
    """One prompt at a time, transformers models and their own cache in a Python loop."""

    def __init__(self, directories: Sequence[Path], attention: str = "sdpa"):
        self.tokenizers = [transformers.AutoTokenizer.from_pretrained(directory) for directory in directories]
        self.models: list[Any] = [
            transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation=attention
            ).eval()
            for directory in directories
        ]
        sizes = [model.config.vocab_size for model in self.models]
        union = union_strings(self.tokenizers, sizes)
        self.strings = union.strings
        self.matrices = [_matrix(entry_of, len(union.strings)) for entry_of in union.maps]
        self.spellers = make_spellers(self.tokenizers)
        self.stands_for = token_bytes(self.tokenizers[0])

    def generate(self, prompts: Sequence[str], new_tokens: int) -> Written:
        texts, entries, fed = zip(*(self._one(prompt, new_tokens) for prompt in prompts), strict=True)
        return Written(list(texts), list(entries), np.array(fed))

    @torch.inference_mode()
    def _one(self, prompt: str, new_tokens: int) -> tuple[bytes, list[int], list[int]]:
        caches = [transformers.DynamicCache(config=model.config) for model in self.models]
        pending = [tokenizer(prompt).input_ids for tokenizer in self.tokenizers]
        fed = [-len(ids) for ids in pending]
        text, entries = b"", []
        for _ in range(new_tokens):
            mean = torch.zeros(len(self.strings), 1)
            for k, (model, cache) in enumerate(zip(self.models, caches, strict=True)):
                ids = torch.tensor([pending[k]])
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                fed[k] += len(pending[k])
                mean += torch.sparse.mm(self.matrices[k], torch.softmax(logits, dim=-1).t()) / len(self.models)
            entry = int(mean.argmax())
            pending = [speller(self.strings[entry]) for speller in self.spellers]
            text += b"".join(self.stands_for[i] for i in pending[0])
            entries.append(entry)
        return text, entries, fed


def _matrix(entry_of: np.ndarray, entries: int) -> Tensor:
    """0/1, [U, V]: torch multiplies from the left only under `inference_mode`, and faster."""
    ids = np.flatnonzero(entry_of >= 0)
    places = torch.from_numpy(np.stack([entry_of[ids], ids]))
    matrix = torch.sparse_coo_tensor(places, torch.ones(len(ids)), (entries, len(entry_of)), check_invariants=True)
    return matrix.coalesce()


# --- as well as torch can ---


@dataclasses.dataclass(frozen=True)
class Tables:
    """One member's side of a union, for tensors. Entries are numbered as in `Order`."""

    head: Tensor  # [V, D], its rows in the order of the entries; rows of other ids at the end
    more: tuple[Tensor, Tensor] | None  # columns of the logits: an entry's, and its further id's. None as a rule
    spelled: Tensor  # [U, J], filled up with 0
    lengths: Tensor  # [U]


@dataclasses.dataclass(frozen=True)
class Order:
    """Entries renumbered: the first member's own, those of both, the second's own, those of none.

    Each member's are then consecutive, and the two distributions meet in slices where the union in any other order
    would need matrices or gathers.
    """

    entries: np.ndarray  # [U]: the union's number of each
    shared: int  # where those of both start
    second: int  # where the second's own start
    none: int  # where those of none start


def make_order(union: Union) -> Order:
    first, second = (np.isin(np.arange(len(union.texts)), entry_of) for entry_of in union.maps)
    group = np.where(first, np.where(second, 1, 0), np.where(second, 2, 3))
    starts = np.cumsum(np.bincount(group, minlength=4))
    return Order(np.argsort(group, kind="stable"), int(starts[0]), int(starts[1]), int(starts[2]))


def make_tables(union: Union, order: Order, k: int, head: Tensor, *, least: int) -> Tables:
    """Member k's tables, spellings at least `least` wide."""
    start, end = ((0, order.second), (order.shared, order.none))[k]
    column_of = np.empty(len(order.entries), np.int64)  # of an entry, for this member
    column_of[order.entries] = np.arange(len(order.entries)) - start
    rows = np.full(end - start, -1, np.int64)
    rest: list[int] = []
    more: list[tuple[int, int]] = []
    for i, entry in enumerate(union.maps[k].tolist()):
        if entry >= 0 and rows[column_of[entry]] < 0:
            rows[column_of[entry]] = i
            continue
        if entry >= 0:
            more.append((int(column_of[entry]), len(rows) + len(rest)))
        rest.append(i)
    rest += range(len(union.maps[k]), head.shape[0])
    spellings = [union.spellings[k][entry] for entry in order.entries]
    lengths = np.array([len(ids) for ids in spellings])
    widest = max(least, int(lengths.max()))
    spelled = np.zeros((len(spellings), widest), np.int64)
    spelled[np.arange(widest) < lengths[:, None]] = list(itertools.chain.from_iterable(spellings))
    further = torch.from_numpy(np.array(more, np.int64).reshape(-1, 2).T.copy())
    return Tables(
        head[torch.from_numpy(np.concatenate([rows, np.array(rest, np.int64)]))],
        (further[0], further[1]) if more else None,
        torch.from_numpy(spelled),
        torch.from_numpy(lengths),
    )


Buffers = tuple[Tensor, Tensor]  # logits and probabilities [B, V]


def choose(
    states: Sequence[Tensor], tables: Sequence[Tables], order: Order, buffers: Sequence[Buffers] | None
) -> Tensor:
    """The best entry [B] under the mean. Without a compiler, results of size [B, V] go to buffers: fresh memory costs
    more than the arithmetic."""
    both = []
    for k, (state, table) in enumerate(zip(states, tables, strict=True)):
        if buffers is None:
            p = F.linear(state, table.head).softmax(dim=-1)
        else:
            p = torch.softmax(torch.mm(state, table.head.t(), out=buffers[k][0]), dim=-1, out=buffers[k][1])
        if table.more is not None:
            p.index_add_(1, table.more[0], p.index_select(1, table.more[1]))
        both.append(p)
    first, second = both
    shared = order.second - order.shared
    first[:, order.shared : order.second] += second[:, :shared]
    best, entry = first[:, : order.second].max(dim=-1)
    if order.none == order.second:
        return entry
    rival, place = second[:, shared : order.none - order.shared].max(dim=-1)
    return torch.where(rival > best, order.second + place, entry)


def _pending_layer(
    x: Tensor,
    layer: LayerWeights,
    cache: LayerCache,
    cos: Tensor,
    sin: Tensor,
    row: Tensor,
    slot: Tensor,
    place: Tensor | None,
    hidden: Tensor | None,
    used: int,
    width: int,
    dims: Dims,
) -> Tensor:
    """The rows' pending tokens, packed [R, D]: token r is of row `row[r]` and goes to slot `slot[r]` of its cache.

    Only attention needs a rectangle: token r is at `place[r]` of [B W], or at r where `place` is None. `hidden` [B, W,
    S] marks the slots that a place must not see: those behind its own, which hold leftovers at most.
    """
    g, m, h = dims.groups, dims.per_group, dims.head
    heads = F.linear(peers.norm(x, layer[0], dims.eps), layer[1]).view(-1, g * m + 2 * g, h)
    rotated = peers.rotate(heads[:, : g * m + g], cos, sin)
    keys, values = cache
    b = keys.shape[0]
    keys[row, :, slot] = rotated[:, g * m :]
    values[row, :, slot] = heads[:, g * m + g :]
    keys, values = keys[:, :, :used], values[:, :, :used]
    q = rotated[:, : g * m]
    if place is not None:
        q = q.new_zeros(b * width, g * m, h).index_copy_(0, place, q)
    q = q.reshape(b, width, g, m, h).transpose(1, 2).reshape(b, g, width * m, h)
    scores = q @ keys.transpose(-1, -2) * h**-0.5
    if hidden is not None:
        scores = scores.view(b, g, width, m, used).masked_fill(hidden[:, None, :, None], float("-inf"))
        scores = scores.view(b, g, width * m, used)
    out = (scores.softmax(dim=-1) @ values).view(b, g, width, m, h).transpose(1, 2).reshape(b * width, g * m * h)
    if place is not None:
        out = out.index_select(0, place)
    return peers.feed_forward(x + F.linear(out, layer[2]), layer, dims.eps)


@dataclasses.dataclass
class Store:
    """One member's cache and the lengths of its rows."""

    caches: list[LayerCache]
    slots: Tensor  # arange(S)
    rotation: tuple[Tensor, Tensor]
    lengths: Tensor  # [B]


class BestPeer:
    """The same job, batched.

    Args:
      union: the tables to write with; by default the published ones.
      members: the models, if they are read already.
      room: steps to keep cache for even where a call asks for fewer; another size is compiled anew.
      compiled: what `torch.compile` gets: nothing; the choice of an entry ("choice"); that and each layer ("layer"); or
        that and each member's layers together ("member"). The layers are compiled for `widths` of pending tokens, to
        which a step is padded; a wider step runs eagerly, on packed tokens.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        union: Union | None = None,
        compiled: str | None = None,
        widths: Sequence[int] = (1, 2, 4),
        members: Sequence[Member] | None = None,
        room: int = 0,
    ):
        self.tokenizers = [transformers.AutoTokenizer.from_pretrained(directory) for directory in directories]
        self.members = [peers.read_member(directory) for directory in directories] if members is None else members
        self.union = union or published_union(self.tokenizers, [member.head.shape[0] for member in self.members])
        self.room = room
        self.widths = tuple(widths) if compiled in ("layer", "member") else ()
        self.order = make_order(self.union)
        self.tables = [
            make_tables(self.union, self.order, k, member.head, least=max(self.widths, default=1))
            for k, member in enumerate(self.members)
        ]
        self.stores: list[Store] = []
        self.buffers: list[Buffers] | None = None
        # Inductor's C++ wrapper keeps Python out of a compiled call.
        compiler = functools.partial(torch.compile, dynamic=False, fullgraph=True, options={"cpp_wrapper": True})
        self.layer: Callable[..., Tensor] = compiler(_pending_layer) if compiled == "layer" else _pending_layer
        self.forward: Callable[..., Tensor] = compiler(self._forward) if compiled == "member" else self._forward
        self.choose: Callable[..., Tensor] = compiler(choose) if compiled else choose
        self.in_buffers = compiled is None

    def _forward(
        self,
        member: Member,
        store_caches: list[LayerCache],
        rotation: tuple[Tensor, Tensor],
        ids: Tensor,
        row: Tensor,
        slot: Tensor,
        place: Tensor | None,
        hidden: Tensor | None,
        last: Tensor,
        used: int,
        width: int,
        layer_function: Callable[..., Tensor],
    ) -> Tensor:
        """What the output head reads after the pending tokens [B, D]."""
        x = F.embedding(ids, member.embedding)
        cos, sin = (table.index_select(0, slot)[:, None] for table in rotation)
        for layer, cache in zip(member.layers, store_caches, strict=True):
            x = layer_function(x, layer, cache, cos, sin, row, slot, place, hidden, used, width, member.dims)
        return peers.norm(x.index_select(0, last), member.norm, member.dims.eps)

    def _reserve(self, batch: int, lengths: Sequence[int], new_tokens: int) -> None:
        """Caches for this batch, kept for the next call. Entries of the mean length fit; `_step` grows them."""
        wide = max(self.widths, default=1)
        for k, (member, table) in enumerate(zip(self.members, self.tables, strict=True)):
            mean = float(table.lengths.double().mean())
            need = 64 * math.ceil((lengths[k] + max(self.room, new_tokens) * mean + wide) / 64)
            if len(self.stores) > k and self.stores[k].lengths.shape[0] == batch and len(self.stores[k].slots) >= need:
                continue
            self.stores[k : k + 1] = [_store(member, batch, need)]
            for width in self.widths:  # compiles what this batch can need, whether or not its first steps do
                entry = int((table.lengths - width).abs().argmin())
                self._step(k, torch.full((batch,), entry))
                self.stores[k].lengths.zero_()
        if self.in_buffers and (self.buffers is None or self.buffers[0][0].shape[0] != batch):
            sizes = [(batch, member.head.shape[0]) for member in self.members]
            self.buffers = [(torch.empty(size), torch.empty(size)) for size in sizes]

    def _prefill(self, k: int, prompts: list[list[int]]) -> Tensor:
        member, store = self.members[k], self.stores[k]
        store.lengths = torch.tensor([len(ids) for ids in prompts])
        t = int(store.lengths.max())
        # Padding comes after a row's tokens, where causal attention hides it and later tokens overwrite it.
        ids = torch.tensor([prompt + [0] * (t - len(prompt)) for prompt in prompts])
        cos, sin = store.rotation
        x = F.embedding(ids, member.embedding)
        for layer, cache in zip(member.layers, store.caches, strict=True):
            x = peers.prefill_layer(x, layer, cache, cos[:t], sin[:t], member.dims)
        last = x[torch.arange(len(prompts)), store.lengths - 1]
        return peers.norm(last, member.norm, member.dims.eps)

    def _step(self, k: int, entries: Tensor) -> Tensor:
        """Member k reads the chosen entries [B]."""
        member, table, store = self.members[k], self.tables[k], self.stores[k]
        counts = table.lengths.index_select(0, entries)
        widest, b = int(counts.max()), len(entries)
        width = next((width for width in self.widths if width >= widest), widest)
        end = int(store.lengths.max()) + width
        if end > len(store.slots):
            store = self.stores[k] = _grow(member, store, 2 * len(store.slots))
        fits = width in self.widths
        used = len(store.slots) if fits else end
        offsets = torch.arange(width)
        position = store.lengths[:, None] + offsets
        ids = table.spelled[entries, :width]
        hidden = None
        if fits or b > 1 or width > 1:
            hidden = store.slots[:used] > position[..., None]
        place, row, last = None, torch.arange(b).repeat_interleave(width), torch.arange(b) * width + counts - 1
        ids, slot = ids.reshape(-1), position.reshape(-1)
        if not fits and b > 1 and width > 1:
            place = (offsets < counts[:, None]).reshape(-1).nonzero()[:, 0]
            ids, slot, row, last = ids[place], slot[place], row[place], counts.cumsum(0) - 1
        store.lengths = store.lengths + counts
        forward = self.forward if fits else self._forward
        layer = self.layer if fits else _pending_layer
        return forward(member, store.caches, store.rotation, ids, row, slot, place, hidden, last, used, width, layer)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], new_tokens: int) -> Written:
        tokenized = [tokenizer(list(prompts)).input_ids for tokenizer in self.tokenizers]
        self._reserve(len(prompts), [max(map(len, rows)) for rows in tokenized], new_tokens)
        states = [self._prefill(k, rows) for k, rows in enumerate(tokenized)]
        starts = [store.lengths for store in self.stores]
        chosen = [self.choose(states, self.tables, self.order, self.buffers)]
        for _ in range(new_tokens - 1):
            states = [self._step(k, chosen[-1]) for k in range(len(self.members))]
            chosen.append(self.choose(states, self.tables, self.order, self.buffers))
        fed = torch.stack([store.lengths - start for store, start in zip(self.stores, starts, strict=True)], dim=1)
        entries = self.order.entries[torch.stack(chosen, dim=1).numpy()].tolist()
        return Written([b"".join(self.union.texts[i] for i in row) for row in entries], entries, fed.numpy())


def _store(member: Member, batch: int, slots: int) -> Store:
    # Zeros rather than anything: a slot that is masked still takes part in a product, where NaN would spread.
    shape = (batch, member.dims.groups, slots, member.dims.head)
    places = torch.arange(slots)
    angles = places[:, None] * member.frequencies
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in member.layers]
    return Store(caches, places, (angles.cos(), angles.sin()), torch.zeros(batch, dtype=torch.long))


def _grow(member: Member, store: Store, slots: int) -> Store:
    larger = _store(member, len(store.lengths), slots)
    for new, old in zip(larger.caches, store.caches, strict=True):
        for kind in range(2):
            new[kind][:, :, : len(store.slots)] = old[kind]
    larger.lengths = store.lengths
    return larger


def best_peer(
    directories: Sequence[Path],
    prompts: Sequence[str],
    new_tokens: int,
    *,
    union: Union | None = None,
    compiled: Sequence[str | None],
    widths: Sequence[int] = (1, 2, 4),
) -> Peer:
    """The fastest `BestPeer` on these prompts. `compiled` lists what to try, as in `BestPeer`."""
    # Compiled code of earlier cases counts towards a limit beyond which torch silently stops compiling.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # two members in all widths, and again where a cache had to grow
    members = [peers.read_member(directory) for directory in directories]
    variants: dict[str, Generate] = {}
    for what in compiled:
        peer = BestPeer(directories, union=union, compiled=what, widths=widths, members=members, room=new_tokens)
        union = peer.union
        variants[f"compiled {what}" if what else "eager"] = peer.generate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peers.fastest(variants, prompts, new_tokens)
