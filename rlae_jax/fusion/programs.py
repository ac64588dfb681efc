"""The compiled programs of an ensemble, and the host's loop around the one that stops in between.

In: a checked call (`Job`). Out: `Answers` on the host, without the filling of its bucket. A call that needs to look at
what was written (stop strings, streaming) runs the loop a number of steps at a time, with the state donated between.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from rlae_jax.compilation import jit
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion import likelihood
from rlae_jax.fusion.decode import decoding_places, params_places
from rlae_jax.fusion.likelihood import Scores, Spans, Texts
from rlae_jax.fusion.prompts import Prompts, Row, fill_rows
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers, DecodeState, answers_of, repeat_rows
from rlae_jax.models import lora
from rlae_jax.sharding import ROWS, WHOLE, by_rows, to_host, use, whole


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A checked call: what is decoded, and how. Arrays have the batch's bucket of rows; `rows` has the real ones."""

    rows: list[Row]
    prompts: Prompts
    policy_params: Any
    spec: DecodeSpec
    params: tuple[Any, ...]
    samples: int  # answers per row, which share its prefill
    stop: tuple[str, ...]
    mesh: Mesh | None = None

    def fill(self) -> "Job":
        """The job with a choice of weights and adapters for the rows, too, that fill its bucket."""
        batch, filled = len(self.rows), self.prompts.batch
        policy_params, params = self.policy_params, self.params
        if getattr(self.spec.policy, "params_per_row", False) and len(policy_params) == batch:
            policy_params = np.repeat(fill_rows(np.asarray(policy_params), filled), self.samples, axis=0)
        policy_params = whole(policy_params, self.mesh)
        if not self.spec.shared_base:
            params = tuple(_fill_choice(p, batch, filled) for p in params)
        return dataclasses.replace(self, policy_params=policy_params, params=params)

    @property
    def answers(self) -> int:
        """How many answers are wanted."""
        return len(self.rows) * self.samples


def _fill_choice(params: Any, batch: int, filled: int) -> Any:
    """Parameters whose choice of adapters, one per row, covers the rows that fill a bucket."""
    if not isinstance(params, lora.Adapted) or params.weights.shape[0] != batch or batch == 1:
        return params
    missing = filled - batch
    return params._replace(weights=jnp.concatenate([params.weights, jnp.repeat(params.weights[:1], missing, axis=0)]))


@functools.partial(jit, static_argnames="samples")
def decode_batch(params: Any, prompts: Prompts, policy_params: Any, spec: DecodeSpec, samples: int) -> Answers:
    """From prompts to answers."""

    def run(params: Any, prompts: Prompts, policy_params: Any, spec: DecodeSpec) -> Answers:
        return decoding.decode_batch(params, prompts, policy_params, spec, samples)

    answers: Answers = by_rows(run, decoding_places(params, policy_params, spec))(params, prompts, policy_params, spec)
    return answers


@functools.partial(jit, static_argnames="samples")
def prefill(params: Any, prompts: Prompts, spec: DecodeSpec, samples: int) -> DecodeState:
    """The state before the first token."""

    def run(params: Any, prompts: Prompts, spec: DecodeSpec) -> DecodeState:
        state = decoding.prefill(params, prompts, spec)
        return state if samples == 1 else repeat_rows(state, samples)

    state: DecodeState = by_rows(run, (params_places(params, spec), ROWS, WHOLE))(params, prompts, spec)
    return state


@functools.partial(jit, donate_argnames="state")
def decode_until(
    params: Any, state: DecodeState, policy_params: Any, spec: DecodeSpec, until: Int[Array, ""]
) -> DecodeState:
    """The state at a later step."""
    places = (*decoding_places(params, policy_params, spec), WHOLE)
    later: DecodeState = by_rows(decoding.decode_spans, places)(params, state, policy_params, spec, until)
    return later


@jit
def lengthen(state: DecodeState, stopped: Bool[Array, " B"], old: DecodeSpec, longer: DecodeSpec) -> DecodeState:
    """Room for more steps, for the rows that wrote up to the last step and did not stop there."""
    longer_state: DecodeState = by_rows(_lengthen, (ROWS, ROWS, WHOLE, WHOLE))(state, stopped, old, longer)
    return longer_state


def _lengthen(state: DecodeState, stopped: Bool[Array, " B"], old: DecodeSpec, longer: DecodeSpec) -> DecodeState:
    # The next token's place is the step's: only rows that wrote up to the end go on.
    whole = state.steps == old.max_new_tokens

    def grow(by: int) -> Callable[[Array], Array]:
        return lambda leaf: jnp.pad(leaf, [(0, by) if axis == 1 else (0, 0) for axis in range(leaf.ndim)])

    steps = longer.max_new_tokens - old.max_new_tokens
    trajectory = jax.tree.map(grow(longer.spans - old.spans), state.trajectory)
    return state._replace(
        members=state.members.lengthen(old, longer),
        rows=state.rows._replace(limits=jnp.full_like(state.rows.limits, longer.max_new_tokens)),
        done=stopped | ~whole,
        tokens=grow(steps)(state.tokens),
        decisions=state.decisions._replace(trajectory=trajectory),
        scores=jax.tree.map(grow(steps), state.scores),
    )


@functools.partial(jit, static_argnames="top")
def read_given(params: Any, texts: Texts, policy_params: Any, spec: DecodeSpec, top: int) -> Scores:
    """The log-probabilities of given texts."""
    run = functools.partial(likelihood.read_given, top=top)
    scores: Scores = by_rows(run, decoding_places(params, policy_params, spec))(params, texts, policy_params, spec)
    return scores


@jit
def observe_given(params: Any, texts: Texts, begins: Any, spec: DecodeSpec) -> Spans:
    """What given texts are to the members."""
    places = (decoding_places(params, (), spec)[0], ROWS, ROWS, WHOLE)
    spans: Spans = by_rows(likelihood.observe_given, places)(params, texts, begins, spec)
    return spans


def on_host(answers: Answers, rows: int) -> Answers:
    """Answers as host arrays, without what fills their bucket."""
    kept: Answers = jax.tree.map(lambda leaf: leaf[:rows], to_host(answers))
    return kept


def run(job: Job) -> Answers:
    """Everything in one program."""
    with use(job.mesh):
        answers = decode_batch(job.params, job.prompts, job.policy_params, job.spec, job.samples)
        return on_host(answers, job.answers)


def run_in_chunks(
    job: Job,
    steps: int,
    stopped: Callable[[Answers], Bool[np.ndarray, " B"]] | None,
    start: DecodeState | None = None,
) -> Iterator[tuple[Answers, DecodeState]]:
    """Decodes `steps` steps at a time and yields what is written after each, and the state on the device, which the
    next one uses up.

    Args:
      stopped: tells which rows end with what they have written; None if none does.
      start: the state to go on from; by default that of the prompts.
    """
    if start is None:
        with use(job.mesh):
            state, until = prefill(job.params, job.prompts, job.spec, job.samples), 0
    else:
        state, until = start, int(np.max(to_host(start.clock)))
    while True:
        until += steps
        with use(job.mesh):
            state = decode_until(job.params, state, job.policy_params, job.spec, np.int32(until))
            answers = on_host(answers_of(state), job.answers)
            if stopped is not None:
                ends = np.zeros(len(state.done), bool)
                ends[: job.answers] = stopped(answers)
                state = state._replace(done=state.done | ends)
                answers = answers._replace(done=answers.done | ends[: job.answers])
        yield answers, state
        if np.all(answers.done):
            return
