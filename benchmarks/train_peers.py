"""A PPO iteration of the weight agent in torch: what this program's training is compared with.

In: Hugging Face directories of Llama members with one vocabulary, an agent's parameters and unpadded prompts Int[B, T].
Out: `Rollout`s, and an agent that has learnt from them. End tokens are ignored, so that every decision is real.

Three ways to write the answers, and one way to learn from them:

- `OneByOne`, "reference": RLAE's published algorithm. One prompt at a time, and for every span the answer is written
  anew from the prompt (with a cache within that call, as a server has). What the publication does beyond that, a text
  encoder for the state and HTTP between the two, is left out: this peer is faster than what it stands for.
- `OneByOne`, "span": its later form. Only the span is written; prompt and text so far are read again.
- `BestActor`: all prompts at once, caches kept from span to span, compiled where that helps.
- `Learner`: clipped updates on one flat parameter vector, which all three share.

The agent is `rlae_jax.ppo.agent.PPOAgent` with its default observation. Its actor and critic read the same input, so
that here their first layers are one product.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks import peers
from rlae_jax.config import PPOConfig
from rlae_jax.ppo.dirichlet import SMALLEST_WEIGHT


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By Inductor, whose C++ wrapper keeps Python out of a call."""
    return torch.compile(function, dynamic=False, fullgraph=True, options={"cpp_wrapper": True})


# --- the agent ---


class Observation(NamedTuple):
    """See `rlae_jax.fusion.policy.Observation`."""

    hidden: tuple[Tensor, ...]  # [*B, D] of each member, already divided by its root mean square
    stats: Tensor  # [*B, K, 4]
    span: Tensor  # [*B]


class Decision(NamedTuple):
    """One span's; in a rollout with a leading P axis."""

    observation: Observation
    weights: Tensor  # [B, K]
    log_prob: Tensor  # [B]
    value: Tensor  # [B]


class Rollout(NamedTuple):
    decisions: Decision  # [P, B, ...]
    tokens: Tensor  # [B, N]


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Agent:
    """The network's parameters in one vector, so that a norm or a step of Adam is one operation."""

    def __init__(self, params: dict[str, Any], config: PPOConfig):
        actor, critic = params["actor"], params["critic"]
        arrays = {
            **{f"projection_{k}": params["projections"][f"member_{k}"] for k in range(len(params["projections"]))},
            "span": params["span_embedding"],
            "w1": np.concatenate([actor["w1"], critic["w1"]], axis=1),
            "b1": np.concatenate([actor["b1"], critic["b1"]]),
            "actor_w2": actor["w2"],
            "actor_b2": actor["b2"],
            "critic_w2": critic["w2"],
            "critic_b2": critic["b2"],
        }
        self.shapes: Shapes = tuple((name, tuple(array.shape)) for name, array in arrays.items())
        flat = np.concatenate([np.asarray(array, np.float32).ravel() for array in arrays.values()])
        self.flat = torch.from_numpy(flat).requires_grad_()
        self.floor = config.agent.concentration_floor
        self.explores = True  # draws weights, or takes their mean

    def apply(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Concentrations [B, K] and values [B]."""
        return apply_agent(self.flat, observation, self.shapes, self.floor)

    def decide(self, states: Sequence[Tensor], probs: Sequence[Tensor], span_log_probs: Tensor, span: int) -> Decision:
        """Weights for the next span.

        Args:
          states: each member's last hidden state [B, D].
          probs: each member's distribution [B, V].
          span_log_probs: each member's mean log-probability of the last span's tokens [B, K].
        """
        hidden = tuple(F.rms_norm(state, (state.shape[-1],), eps=1e-6) for state in states)
        index = torch.full((len(span_log_probs),), span)
        observation = Observation(hidden, member_stats(probs, span_log_probs), index)
        concentration, value = self.apply(observation)
        if self.explores:
            weights = torch.distributions.Dirichlet(concentration, validate_args=False).sample()
            weights = weights.clamp_min(SMALLEST_WEIGHT)
        else:
            weights = concentration
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return Decision(observation, weights, dirichlet_log_prob(concentration, weights), value)


def apply_agent(flat: Tensor, observation: Observation, shapes: Shapes, floor: float) -> tuple[Tensor, Tensor]:
    parts = flat.split([math.prod(shape) for _, shape in shapes])
    p = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes, strict=True)}
    inputs: list[Tensor] = []
    for k, hidden in enumerate(observation.hidden):
        inputs += [hidden @ p[f"projection_{k}"], observation.stats[:, k]]
    inputs.append(F.embedding(observation.span, p["span"]))
    actor, critic = torch.tanh(torch.addmm(p["b1"], torch.cat(inputs, dim=-1), p["w1"])).chunk(2, dim=-1)
    raw = torch.addmm(p["actor_b2"], actor, p["actor_w2"])
    return F.softplus(raw) + floor, torch.addmm(p["critic_b2"], critic, p["critic_w2"])[:, 0]


def member_stats(probs: Sequence[Tensor], span_log_probs: Tensor) -> Tensor:
    """[B, K, 4]; see `rlae_jax.fusion.decode.member_stats`."""
    mixture = sum(probs[1:], probs[0]) / len(probs)
    columns = []
    for k, p in enumerate(probs):
        entropy = torch.special.entr(p).sum(dim=-1)
        disagreement = -entropy - torch.special.xlogy(p, mixture).sum(dim=-1)
        columns.append(torch.stack([entropy, p.amax(dim=-1), span_log_probs[:, k], disagreement], dim=-1))
    return torch.stack(columns, dim=1)


def choose(probs: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The best token [B] under the weighted mean, and each member's log-probability of it [B, K]."""
    mean = probs[0] * weights[:, :1]
    for k in range(1, len(probs)):
        mean = torch.addcmul(mean, probs[k], weights[:, k : k + 1])
    token = mean.argmax(dim=-1)
    return token, torch.cat([p.gather(1, token[:, None]) for p in probs], dim=1).log()


def dirichlet_log_prob(concentration: Tensor, weights: Tensor) -> Tensor:
    terms = (concentration - 1.0) * weights.log() - torch.lgamma(concentration)
    return torch.lgamma(concentration.sum(dim=-1)) + terms.sum(dim=-1)


def dirichlet_entropy(concentration: Tensor) -> Tensor:
    total = concentration.sum(dim=-1)
    log_beta = torch.lgamma(concentration).sum(dim=-1) - torch.lgamma(total)
    pull = ((concentration - 1.0) * torch.digamma(concentration)).sum(dim=-1)
    return log_beta + (total - concentration.shape[-1]) * torch.digamma(total) - pull


# --- answers, one prompt at a time ---


class OneByOne:
    """transformers models and their own cache, one prompt and one span after the other.

    Args:
      regenerate: write the answer so far anew for each span, rather than read it.
    """

    def __init__(
        self, directories: Sequence[Path], agent: Agent, span_length: int, *, regenerate: bool, attention: str
    ):
        self.models = [
            transformers.LlamaForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation=attention
            ).eval()
            for directory in directories
        ]
        self.agent = agent
        self.span_length = span_length
        self.regenerate = regenerate

    @torch.inference_mode()
    def rollout(self, prompt_ids: np.ndarray, new_tokens: int) -> Rollout:
        answers = [self._answer(prompt, new_tokens) for prompt in torch.from_numpy(prompt_ids).long().split(1)]
        decisions = [_join(list(of_span), torch.cat) for of_span in zip(*(own for own, _ in answers), strict=True)]
        return Rollout(_join(decisions, torch.stack), torch.cat([tokens for _, tokens in answers]))

    def _answer(self, prompt: Tensor, new_tokens: int) -> tuple[list[Decision], Tensor]:
        decisions: list[Decision] = []
        tokens: list[Tensor] = []  # [1, 1] each
        log_probs: list[Tensor] = []  # [1, K] each
        for span, boundary in enumerate(range(0, new_tokens, self.span_length)):
            first = 0 if self.regenerate else boundary
            tokens, log_probs = tokens[:first], log_probs[:first]
            feed = torch.cat([prompt, *tokens], dim=1)
            caches = [transformers.DynamicCache(config=model.config) for model in self.models]
            for i in range(first, min(boundary + self.span_length, new_tokens)):
                states, probs = self._read(feed, caches)
                if i == boundary:
                    last = log_probs[boundary - self.span_length :] if span else [torch.zeros(1, len(self.models))]
                    decisions.append(self.agent.decide(states, probs, torch.cat(last).mean(dim=0, keepdim=True), span))
                token, chosen = choose(probs, decisions[i // self.span_length].weights)
                feed = token[:, None]
                tokens.append(feed)
                log_probs.append(chosen)
        return decisions, torch.cat(tokens, dim=1)

    def _read(self, feed: Tensor, caches: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        states, probs = [], []
        for model, cache in zip(self.models, caches, strict=True):
            state = model.model(feed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            states.append(state)
            probs.append(model.lm_head(state).softmax(dim=-1))
        return states, probs


def _join(decisions: Sequence[Decision], how: Callable[[Any], Tensor]) -> Decision:
    observations = [decision.observation for decision in decisions]
    hidden = tuple(how(states) for states in zip(*(o.hidden for o in observations), strict=True))
    observation = Observation(hidden, how([o.stats for o in observations]), how([o.span for o in observations]))
    of_all = zip(*(decision[1:] for decision in decisions), strict=True)
    return Decision(observation, *(how(list(leaves)) for leaves in of_all))


# --- answers, as well as torch can ---


def fill_cache(
    x: Tensor, layer: peers.LayerWeights, cache: peers.LayerCache, cos: Tensor, sin: Tensor, dims: peers.Dims
) -> None:
    """What is left of a prompt's last layer [B, T, D] where nobody reads its result."""
    b, t, _ = x.shape
    g = dims.groups
    projections = layer[1][g * dims.per_group * dims.head :]
    both = F.linear(peers.norm(x, layer[0], dims.eps), projections).view(b, t, 2 * g, dims.head).transpose(1, 2)
    cache[0][:, :, :t] = peers.rotate(both[:, :g], cos, sin)
    cache[1][:, :, :t] = both[:, g:]


class BestActor(peers.BestPeer):
    """`BestPeer` with an agent that sets the weights at every span.

    Args:
      what: what is compiled, as in `BestPeer`; beside that always the layers of the prefill and the choice of a token.
    """

    def __init__(
        self,
        members: Sequence[peers.Member],
        agent: Agent,
        batch: int,
        slots: int,
        span_length: int,
        what: str | None = None,
    ):
        super().__init__(members, batch, slots, what)
        self.agent = agent
        self.span_length = span_length
        self.prefill_layer = compiled(peers.prefill_layer) if what else peers.prefill_layer
        self.fill_cache = compiled(fill_cache) if what else fill_cache
        self.choose = compiled(choose) if what else choose
        self.read = compiled(self._read) if what == "step" else self._read

    def _read(
        self,
        feed: Tensor,
        caches: Sequence[Sequence[peers.LayerCache]],
        position: Tensor,
        used: int | None,
        hidden: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        states, probs = [], []
        for member, cache, (cos, sin) in zip(self.members, caches, self.rotations, strict=True):
            x = F.embedding(feed, member.embedding)
            cos_now, sin_now = cos.index_select(0, position), sin.index_select(0, position)
            for layer, layer_cache in zip(member.layers, cache, strict=True):
                x = self.layer(x, layer, layer_cache, cos_now, sin_now, position, used, hidden, member.dims)
            states.append(peers.norm(x, member.norm, member.dims.eps))
            probs.append(F.linear(states[-1], member.head).softmax(dim=-1))
        return states, probs

    def _prefill(self, ids: Tensor) -> None:
        t = ids.shape[1]
        for member, cache, (cos, sin) in zip(self.members, self.caches, self.rotations, strict=True):
            x = F.embedding(ids, member.embedding)
            for layer, layer_cache in zip(member.layers[:-1], cache[:-1], strict=True):
                x = self.prefill_layer(x, layer, layer_cache, cos[:t], sin[:t], member.dims)
            self.fill_cache(x, member.layers[-1], cache[-1], cos[:t], sin[:t], member.dims)

    @torch.inference_mode()
    def rollout(self, prompt_ids: np.ndarray, new_tokens: int) -> Rollout:
        ids = torch.from_numpy(prompt_ids).long()
        decisions: list[Decision] = []
        tokens: list[Tensor] = []
        span_log_probs = torch.zeros(len(ids), len(self.members))
        self._prefill(ids[:, :-1])
        feed = ids[:, -1]
        for i in range(new_tokens):
            at = ids.shape[1] + i - 1
            hidden = self.slots > at if self.static else None
            used = None if self.static else at + 1
            states, probs = self.read(feed, self.caches, self.slots[at : at + 1], used, hidden)
            if i % self.span_length == 0:
                span = i // self.span_length
                decisions.append(self.agent.decide(states, probs, span_log_probs / self.span_length, span))
                span_log_probs = torch.zeros_like(span_log_probs)
            feed, chosen = self.choose(probs, decisions[-1].weights)
            span_log_probs += chosen
            tokens.append(feed)
        return Rollout(_join(decisions, torch.stack), torch.stack(tokens, dim=1))


# --- learning ---


def exact_tokens(rollout: Rollout, references: Tensor) -> Tensor:
    """The reward [B]: 1.0 where the answer is the reference."""
    return (rollout.tokens == references).all(dim=1).float()


def ppo_loss(
    flat: Tensor,
    decision: Decision,
    advantage: Tensor,
    target: Tensor,
    shapes: Shapes,
    config: PPOConfig,
) -> Tensor:
    """See `rlae_jax.ppo.objective.ppo_loss`."""
    concentration, value = apply_agent(flat, decision.observation, shapes, config.agent.concentration_floor)
    ratio = torch.exp(dirichlet_log_prob(concentration, decision.weights) - decision.log_prob)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip, 1 + config.clip) * advantage)
    clipped = decision.value + (value - decision.value).clamp(-config.value_clip, config.value_clip)
    error = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
    entropy = dirichlet_entropy(concentration).mean()
    return -surrogate.mean() + config.value_weight * 0.5 * error.mean() - config.entropy_weight * entropy


class Learner:
    """Advantages and updates of an agent, which it changes in place."""

    def __init__(self, agent: Agent, config: PPOConfig, *, compiles: bool):
        self.agent = agent
        self.config = config
        self.loss: Callable[..., Tensor] = compiled(ppo_loss) if compiles else ppo_loss
        self.optimiser = torch.optim.Adam([agent.flat], lr=config.learning_rate, eps=1e-5, fused=True)

    def learn(self, rollout: Rollout, score: Tensor, epochs: int) -> None:
        decisions = rollout.decisions
        advantages, targets = self._advantages(score, decisions.value)
        advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var(correction=0) + 1e-8)
        samples = [x.flatten(0, 1) for x in (*decisions.observation.hidden, *decisions.observation[1:], *decisions[1:])]
        samples += [advantages.flatten(), targets.flatten()]
        members = len(decisions.observation.hidden)
        size = len(samples[-1]) // self.config.minibatches
        for _ in range(epochs):
            order = torch.randperm(len(samples[-1]))
            parts = [x.index_select(0, order).split(size) for x in samples]
            for i in range(self.config.minibatches):
                part = [x[i] for x in parts]
                observation = Observation(tuple(part[:members]), *part[members : members + 2])
                decision = Decision(observation, *part[members + 2 : members + 5])
                self._update(self.loss(self.agent.flat, decision, *part[-2:], self.agent.shapes, self.config))

    def _advantages(self, score: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Generalised advantages and value targets [P, B], the score being the last span's reward."""
        discount, decay = self.config.discount, self.config.discount * self.config.gae_lambda
        following = torch.cat([value[1:] * discount, score[None]])
        distance = torch.arange(len(value))[None] - torch.arange(len(value))[:, None]
        # A_p = sum over q >= p of (gamma lambda)^(q - p) delta_q, as one product.
        advantages = torch.where(distance >= 0, torch.pow(decay, distance), 0.0) @ (following - value)
        return advantages, advantages + value

    def _update(self, loss: Tensor) -> None:
        flat = self.agent.flat
        flat.grad = None
        loss.backward()
        assert flat.grad is not None
        flat.grad *= (self.config.gradient_norm / flat.grad.norm()).clamp(max=1.0)
        self.optimiser.step()
