"""Fused hidden states of several T5s in torch: what this program's search for weights is compared with.

In: Hugging Face directories of M members (one T5 with another adapter merged into each), prompts as lists of ids, and
points Float[P, M]. Out: Int[P, B, N] greedy tokens of H = sum_m w_m h_m under the head that all members share (Kong et
al., 2025, arXiv 2505.02579, section 3.2). End tokens are ignored: every row writes N tokens.

- `Reference`, the published code's `states` mode, step for step: a batch of prompts and one point; at every token every
  member reads the prompts again and the whole text again, and the head reads every position. Left out is what the code
  does beyond that: the members' own logits, which nobody reads, and several copies of each prompt.
- `BestPeer`, what torch can do: prompts are encoded once for all points; decoding is cached; the points are rows of one
  batch that share the keys and values of their prompt; a member runs only the points that give it weight.

The linear layers of the best peer are either torch's own (MKL's products) or oneDNN's on weights that are packed once,
which on processors that are not Intel's are more than twice as fast: torch takes MKL wherever it is built with it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


# Of weights as transformers draws them. A head tied to a large embedding repeats the last token, and attention that is
# blunt or faint lets every text end in a loop of its own, whatever the prompt, the adapters and the weights.
SCALES = {"shared.weight": 0.05, ".q.weight": 8.0, ".o.weight": 2.0}


def write_base(directory: Path, seed: int, **sizes: Any) -> None:
    """A random T5 as a Hugging Face directory, whose texts vary; `sizes` are fields of `T5Config`."""
    torch.manual_seed(seed)
    config = transformers.T5Config.from_dict({"decoder_start_token_id": 0, **sizes})
    model = transformers.T5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.data *= next((scale for end, scale in SCALES.items() if name.endswith(end)), 1.0)
    model.save_pretrained(directory)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], padded on the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    return ids, mask


# --- as published ---


class Reference:
    """M full models, no cache."""

    def __init__(self, directories: Sequence[Path], prompts: Sequence[Sequence[int]]):
        self.models = [
            transformers.T5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
            for directory in directories
        ]
        self.ids, self.mask = pad(prompts)
        self.start = self.models[0].config.decoder_start_token_id

    @torch.inference_mode()
    def choices(self, weights: np.ndarray, text: np.ndarray) -> np.ndarray:
        """One of its steps: what it chooses after every prefix Int[B, t] of a text, the start token included."""
        decoder_ids = torch.from_numpy(text).long()
        total = torch.zeros(*decoder_ids.shape, self.models[0].config.d_model)
        for weight, model in zip(weights.tolist(), self.models, strict=True):
            states = model.encoder(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
            total += (
                weight
                * model.decoder(
                    input_ids=decoder_ids,
                    encoder_hidden_states=states,
                    encoder_attention_mask=self.mask,
                    use_cache=False,
                ).last_hidden_state
            )
        return self.models[0].lm_head(total).argmax(dim=-1).numpy()

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        """The text that the tokens Int[B, N] continue: behind a start token, without the last, which is never read."""
        return np.concatenate([np.full((len(tokens), 1), self.start), tokens[:, :-1]], axis=1)


# --- as well as torch can ---

Linear = Callable[..., Tensor]  # x -> x W^T, with relu=True its positive part, with add=y the sum of both


def plain_linear(weight: Tensor) -> Linear:
    """torch's own product."""

    def apply(x: Tensor, *, relu: bool = False, add: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight)
        if relu:
            return out.relu_()
        return out if add is None else out.add_(add)

    return apply


def packed_linear(weight: Tensor) -> Linear:
    """oneDNN's product, with what follows it fused."""
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.contiguous())

    def apply(x: Tensor, *, relu: bool = False, add: Tensor | None = None) -> Tensor:
        if add is not None:
            return ops._linear_pointwise.binary(x, add, packed, None, "add")
        return ops._linear_pointwise(x, packed, None, "relu" if relu else "none", [], "")

    return apply


LINEARS: dict[str, Callable[[Tensor], Linear]] = {"MKL": plain_linear, "oneDNN": packed_linear}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of either stack. The decoder's self-attention and feed-forward are like the encoder's."""

    norm: Tensor
    qkv: Linear
    o: Linear
    ffn_norm: Tensor
    up: Linear
    down: Linear
    cross_norm: Tensor | None = None
    cross_q: Linear | None = None
    cross_kv: Linear | None = None  # of the encoder's states
    cross_o: Linear | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """A T5 as plain tensors."""

    heads: int
    eps: float
    embedding: Tensor
    encoder: tuple[Layer, ...]
    encoder_norm: Tensor
    decoder: tuple[Layer, ...]
    decoder_norm: Tensor
    encoder_bias: Tensor  # [1, N, S, S], scores of relative positions
    decoder_bias: Tensor  # [1, N, S, S], of which a step reads a row


def read_member(directory: Path, linear: Callable[[Tensor], Linear], longest: int) -> Member:
    """A Hugging Face directory's weights, with the projections that read the same input stacked.

    Args:
      longest: of prompts and answers, in tokens.
    """
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def stacked(prefix: str, names: str) -> Linear:
        return linear(torch.cat([weights[f"{prefix}.{name}.weight"] for name in names]))

    def layer(stack: str, i: int) -> Layer:
        at = f"{stack}.block.{i}.layer"
        ffn = 2 if stack == "decoder" else 1
        parts: dict[str, Any] = {
            "norm": weights[f"{at}.0.layer_norm.weight"],
            "qkv": stacked(f"{at}.0.SelfAttention", "qkv"),
            "o": stacked(f"{at}.0.SelfAttention", "o"),
            "ffn_norm": weights[f"{at}.{ffn}.layer_norm.weight"],
            "up": linear(weights[f"{at}.{ffn}.DenseReluDense.wi.weight"]),
            "down": linear(weights[f"{at}.{ffn}.DenseReluDense.wo.weight"]),
        }
        if stack == "decoder":
            parts["cross_norm"] = weights[f"{at}.1.layer_norm.weight"]
            for name, letters in (("cross_q", "q"), ("cross_kv", "kv"), ("cross_o", "o")):
                parts[name] = stacked(f"{at}.1.EncDecAttention", letters)
        return Layer(**parts)

    def bias(stack: Any) -> Tensor:
        return stack.block[0].layer[0].SelfAttention.compute_bias(longest, longest).detach().contiguous()

    config = model.config
    return Member(
        heads=config.num_heads,
        eps=config.layer_norm_epsilon,
        embedding=weights["shared.weight"],
        encoder=tuple(layer("encoder", i) for i in range(config.num_layers)),
        encoder_norm=weights["encoder.final_layer_norm.weight"],
        decoder=tuple(layer("decoder", i) for i in range(config.num_decoder_layers)),
        decoder_norm=weights["decoder.final_layer_norm.weight"],
        encoder_bias=bias(model.encoder),
        decoder_bias=bias(model.decoder),
    )


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q [B, N, Q, H], k and v [B, N, S, H]; T5 does not scale its scores."""
    scores = q @ k.transpose(-1, -2)
    if bias is not None:
        scores += bias
    return scores.softmax(dim=-1) @ v


def encode(member: Member, ids: Tensor, hidden: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, N, T, H] of the prompts, for every layer of the decoder. `hidden` is added to scores."""
    b, t = ids.shape
    bias = member.encoder_bias[:, :, :t, :t]
    bias = bias if hidden is None else bias + hidden

    def heads(x: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(x.view(b, t, count, member.heads, -1).permute(2, 0, 3, 1, 4).unbind(0))

    x = F.embedding(ids, member.embedding).view(b * t, -1)
    for layer in member.encoder:
        q, k, v = heads(layer.qkv(norm(x, layer.norm, member.eps)), 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = layer.o(out.transpose(1, 2).reshape(b * t, -1), add=x)
        x = layer.down(layer.up(norm(x, layer.ffn_norm, member.eps), relu=True), add=x)
    x = norm(x, member.encoder_norm, member.eps)
    kept = []
    for layer in member.decoder:
        assert layer.cross_kv is not None
        k, v = heads(layer.cross_kv(x), 2)
        kept.append((k.contiguous(), v.contiguous()))
    return kept


class BestPeer:
    """All points at once, `chunk` prompts at a time; prompts of like length go together, so that little is padding.

    Args:
      linear: one of `LINEARS`.
      fused_attention: torch's fused attention over the text written so far, or plain products.
    """

    def __init__(
        self,
        members: Sequence[Member],
        head: Linear,
        prompts: Sequence[Sequence[int]],
        *,
        chunk: int,
        fused_attention: bool,
    ):
        self.members, self.head, self.prompts = members, head, prompts
        self.chunk, self.fused_attention = chunk, fused_attention

    @torch.inference_mode()
    def generate(self, points: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens = np.zeros((len(points), len(self.prompts), new_tokens), np.int64)
        order = sorted(range(len(self.prompts)), key=lambda b: len(self.prompts[b]))
        for start in range(0, len(order), self.chunk):
            rows = order[start : start + self.chunk]
            ids, mask = pad([self.prompts[b] for b in rows])
            tokens[:, rows] = self._decode(ids, mask, torch.from_numpy(points).float(), new_tokens).numpy()
        return tokens

    def _decode(self, ids: Tensor, mask: Tensor, points: Tensor, n: int) -> Tensor:
        b, p = len(ids), len(points)
        hidden = None if bool(mask.all()) else (1 - mask[:, None, None].float()) * LOWEST
        sources = [encode(member, ids, hidden) for member in self.members]
        used = [torch.nonzero(points[:, m])[:, 0] for m in range(len(self.members))]
        caches = [
            [torch.empty(2, b * len(own), member.heads, n, source[0][0].shape[-1]) for _ in member.decoder]
            for member, source, own in zip(self.members, sources, used, strict=True)
        ]
        feed = torch.zeros(b, p, dtype=torch.long)
        tokens = torch.empty(n, b, p, dtype=torch.long)
        for i in range(n):
            total = torch.zeros(b, p, self.members[0].embedding.shape[1])
            for m, (member, source, cache, own) in enumerate(zip(self.members, sources, caches, used, strict=True)):
                states = self._step(member, feed[:, own], i, cache, source, hidden)
                total[:, own] += points[own, m, None] * states
            feed = self.head(total.view(b * p, -1)).argmax(dim=-1).view(b, p)
            tokens[i] = feed
        return tokens.permute(2, 1, 0)

    def _step(
        self,
        member: Member,
        feed: Tensor,
        i: int,
        cache: Sequence[Tensor],
        source: Sequence[tuple[Tensor, Tensor]],
        hidden: Tensor | None,
    ) -> Tensor:
        """Last hidden states [B, P, D] after one token per row [B, P], which is written to slot i."""
        b, p = feed.shape
        heads, eps = member.heads, member.eps
        bias = member.decoder_bias[:, :, i : i + 1, : i + 1]
        x = F.embedding(feed.reshape(-1), member.embedding)
        for layer, kept, (k, v) in zip(member.decoder, cache, source, strict=True):
            assert layer.cross_norm is not None
            assert layer.cross_q is not None
            assert layer.cross_o is not None
            qkv = layer.qkv(norm(x, layer.norm, eps)).view(b * p, 3, heads, -1)
            kept[:, :, :, i] = qkv[:, 1:].transpose(0, 1)
            q, keys, values = qkv[:, 0, :, None], kept[0, :, :, : i + 1], kept[1, :, :, : i + 1]
            if self.fused_attention:
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)
            else:
                out = attend(q, keys, values, bias)
            x = layer.o(out.reshape(b * p, -1), add=x)
            # The points are queries of one product, so that a prompt's keys and values are read once for all of them.
            q = layer.cross_q(norm(x, layer.cross_norm, eps)).view(b, p, heads, -1).transpose(1, 2)
            out = attend(q, k, v, hidden)
            x = layer.cross_o(out.transpose(1, 2).reshape(b * p, -1), add=x)
            x = layer.down(layer.up(norm(x, layer.ffn_norm, eps), relu=True), add=x)
        return norm(x, member.decoder_norm, eps).view(b, p, -1)


def variants(
    directories: Sequence[Path], prompts: Sequence[Sequence[int]], new_tokens: int, chunks: Sequence[int]
) -> Iterator[tuple[str, BestPeer]]:
    """What the best peer tries. MKL's products have lost by so much that one variant with them is enough."""
    longest = max(new_tokens, *map(len, prompts))
    for name, linear in LINEARS.items():
        members = [read_member(directory, linear, longest) for directory in directories]
        head = linear(members[0].embedding)
        tried = itertools.product(chunks, (False, True)) if name == "oneDNN" else [(chunks[0], True)]
        for chunk, fused in tried:
            peer = BestPeer(members, head, prompts, chunk=chunk, fused_attention=fused)
            yield f"{name}, {chunk} prompts, {'sdpa' if fused else 'products'}", peer
