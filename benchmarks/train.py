"""How fast a weight agent is trained, against torch on the same members and prompts, and what it adds to decoding.

    python -m benchmarks.train [--quick] [--json PATH]

In: nothing but the package; the members are random models, which cost what trained ones cost when every answer runs to
its full length. Out:

- Environment steps (spans decided) per second of a PPO iteration: rollout of 256 prompts, reward, advantages, 4 epochs
  of 4 minibatches. Beside this program stand three peers in torch (see `train_peers.py`); those that take one prompt at
  a time are timed on a few prompts, the rest of which would take as long each, and on all updates.
- Whether both sides do the same: tokens and weights of the same agent, and the agent after the same updates.
- Seconds per iteration at the demo's own size.
- Updates per second where the reward is the likelihood of given texts, beside those where answers are written.
- The time that the agent adds to decoding with members of 134M parameters.
"""

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.common import Timing
from benchmarks.decode import LARGE, MEMBERS, QUIET, SMALL, same_start, write_members
from rlae_jax.fusion import decode
from rlae_jax.fusion.cutting import Cut
from rlae_jax.fusion.kept import Kept, keep
from rlae_jax.fusion.policy import Fixed
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.models import ModelConfig, transformer
from rlae_jax.ppo import given
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.specialists import PAIR_MODEL
from rlae_jax.tasks import skills

if TYPE_CHECKING:
    from benchmarks import peers, train_peers


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one iteration does."""

    members: ModelConfig
    prompts: int
    prompt_tokens: int
    new_tokens: int
    span_length: int

    @property
    def spans(self) -> int:
        return self.prompts * -(-self.new_tokens // self.span_length)


COMPARED = Workload(SMALL, 256, 64, 32, 4)
DEMO = Workload(PAIR_MODEL, 256, len(skills.prompt("ri", "0000")), skills.skills().max_new_tokens, skills.DIGITS)
ALONE = 2  # prompts on which the peers that take one at a time are timed
REQUIRED = {"reference": 100.0, "span": 15.0, "best": 1.5}
CONFIG = rj.PPOConfig.demo(prompts=COMPARED.prompts)

OVERHEAD_BATCH = 8
OVERHEAD_PROMPT = 16
OVERHEAD_TOKENS = 64
OVERHEAD_REQUIRED = 1.05


class Ours:
    """This program's iterations, one after another, on one batch."""

    def __init__(self, work: Workload, members: list[rj.LM]):
        self.work = work
        self.ensemble = rj.Ensemble(members)
        self.spec = self.ensemble.spec(
            policy=PPOAgent(CONFIG.agent),
            span_length=work.span_length,
            max_new_tokens=work.new_tokens,
            sample_weights=True,
            record=True,
            ignore_eos=True,
        )
        rng = np.random.default_rng(0)
        ids = rng.integers(0, work.members.vocab, (work.prompts, work.prompt_tokens), dtype=np.int32)
        references = rng.integers(0, work.members.vocab, (work.prompts, work.new_tokens), dtype=np.int32)
        lengths = np.full(work.prompts, work.new_tokens, np.int32)
        self.ids = ids
        prompts = prompts_from_arrays(ids, np.ones_like(ids), work.new_tokens)
        self.batch = ppo.Batch(prompts, references, lengths)
        self.seeds = np.zeros(1, np.uint32)
        self.state = ppo.init_learners(self.seeds, self.spec.policy, self.spec.dims, CONFIG)

    def iterate(self) -> None:
        self.state, metrics = ppo.iterate(self.state, self.ensemble.params, self.batch, self.seeds, self.spec, CONFIG)
        jax.block_until_ready((self.state, metrics))


def random_members(config: ModelConfig) -> list[rj.LM]:
    return [rj.LM(config, transformer.init_params(config, jax.random.key(k))) for k in range(MEMBERS)]


# --- against torch ---


def compare(rounds: int, budget: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Times all sides. Returns their rows, and the checks."""
    from benchmarks import train_peers

    with tempfile.TemporaryDirectory(prefix="rlae_jax-train-") as directory:
        paths = write_members(Path(directory), COMPARED.members)
        ours = Ours(COMPARED, [rj.load(path) for path in paths])
        agent = train_peers.Agent(jax.tree.map(lambda leaf: np.asarray(leaf[0]), ours.state.params), CONFIG)
        best = best_actor(paths, agent, ours)
        checks = same_work(paths, ours)
        alone = {name: one_by_one(paths, agent, ours, regenerate=name == "reference") for name in ("reference", "span")}
    references = torch_ids(ours.batch.references)
    experience = best.generate(ours.ids, COMPARED.new_tokens)
    learner = fastest_learner(agent, experience, train_peers.exact_tokens(experience, references))

    def learn(experience: "train_peers.Rollout") -> None:
        learner.generate((experience, train_peers.exact_tokens(experience, references)), CONFIG.epochs)

    few = ours.ids[:ALONE]
    callables: dict[str, Callable[[], Any]] = {
        "ours": ours.iterate,
        "best": lambda: learn(best.generate(ours.ids, COMPARED.new_tokens)),
        "learn": lambda: learn(experience),
        **{name: functools.partial(peer.generate, few, COMPARED.new_tokens) for name, peer in alone.items()},
    }
    for call in callables.values():
        call()
    others = common.OtherLoad()
    timings = common.time_alternating(callables, rounds=rounds, budget_seconds=budget)
    for name in alone:
        pairs = zip(timings[name].seconds, timings["learn"].seconds, strict=True)
        timings[name] = Timing(tuple(COMPARED.prompts / ALONE * writing + learning for writing, learning in pairs))
    learnt = timings.pop("learn")

    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles
        row: dict[str, Any] = {
            "kind": "iteration",
            "side": name,
            "spans": COMPARED.spans,
            "spans_per_second": {"median": COMPARED.spans / timing.median, "q25": COMPARED.spans / high}
            | {"q75": COMPARED.spans / low},
            "ratio": common.pairwise_ratio(timing, timings["ours"]),
            "seconds": list(timing.seconds),
            "cores_used_by_others": others.share(),
        }
        if name in REQUIRED:
            peer = best if name == "best" else alone[name]
            row["learning_seconds"] = learnt.median
            row["variants"] = {"rollout": _variants(peer), "learning": _variants(learner)}
            checks.append(common.check(f"steps_vs_{name}", row["ratio"], ">=", REQUIRED[name]))
        rows.append(row)
    return rows, checks


def _variants(peer: "peers.Peer") -> dict[str, Any]:
    return {"chosen": peer.variant, "seconds": peer.seconds, "failed": peer.failed}


def torch_ids(ids: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(ids)).long()


def best_actor(paths: list[Path], agent: "train_peers.Agent", ours: Ours) -> "peers.Peer":
    """The fastest `BestActor` on the batch itself."""
    from benchmarks import peers, train_peers

    members = [peers.read_member(path) for path in paths]
    slots = COMPARED.prompt_tokens + COMPARED.new_tokens
    variants: dict[str, Any] = {
        f"compiled {what}" if what else "eager": train_peers.BestActor(
            members, agent, COMPARED.prompts, slots, COMPARED.span_length, what
        ).rollout
        for what in (None, "step")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peers.fastest(variants, ours.ids, COMPARED.new_tokens)


def one_by_one(paths: list[Path], agent: "train_peers.Agent", ours: Ours, *, regenerate: bool) -> "peers.Peer":
    """The faster of the two attention codes of transformers."""
    from benchmarks import peers, train_peers

    variants: dict[str, Any] = {
        attention: train_peers.OneByOne(
            paths, agent, COMPARED.span_length, regenerate=regenerate, attention=attention
        ).rollout
        for attention in ("sdpa", "eager")
    }
    return peers.fastest(variants, ours.ids[:1], COMPARED.new_tokens)


def fastest_learner(agent: "train_peers.Agent", experience: "train_peers.Rollout", score: Any) -> "peers.Peer":
    """`generate(experience and score, epochs)` of the faster `Learner`."""
    from benchmarks import peers, train_peers

    variants: dict[str, Any] = {}
    for name, compiles in (("eager", False), ("compiled", True)):
        learner = train_peers.Learner(agent, CONFIG, compiles=compiles)
        variants[name] = lambda rollout_and_score, epochs, learner=learner: learner.learn(*rollout_and_score, epochs)
    return peers.fastest(variants, (experience, score), CONFIG.epochs)


def same_work(paths: list[Path], ours: Ours) -> list[dict[str, Any]]:
    """Whether all sides write and learn the same, given the same agent and weights that are its means.

    The agent's last layer is enlarged: a fresh agent's weights are nearly uniform, and would hide a wrong one. In a
    single minibatch the order of its samples, which the sides draw differently, does not matter.
    """
    import torch

    from benchmarks import peers, train_peers

    config = dataclasses.replace(CONFIG, minibatches=1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), ours.state.params)
    params["actor"]["w2"] = 100 * params["actor"]["w2"]
    spec = dataclasses.replace(ours.spec, sample_weights=False)
    prompts = prompts_from_arrays(ours.ids, np.ones_like(ours.ids), COMPARED.new_tokens, jax.random.key(0))
    written = jax.jit(ppo.rollout)(ours.ensemble.params, params, prompts, spec)
    score = np.random.default_rng(1).random(COMPARED.prompts, np.float32)
    state = ppo.LearnerState(params, ppo.make_optimiser(config).init(params), jnp.int32(0))
    learn = jax.jit(functools.partial(ppo.learn, spec=spec, config=config))
    learnt = train_peers.Agent(learn(state, written, score, jax.random.key(0))[0].params, config).flat.detach()

    agent = train_peers.Agent(params, config)
    agent.explores = False
    start = agent.flat.detach().clone()
    members = [peers.read_member(path) for path in paths]
    slots, ids, n = COMPARED.prompt_tokens + COMPARED.new_tokens, ours.ids, COMPARED.new_tokens
    rollouts = [train_peers.BestActor(members, agent, COMPARED.prompts, slots, COMPARED.span_length).rollout(ids, n)]
    for regenerate in (True, False):
        peer = train_peers.OneByOne(paths, agent, COMPARED.span_length, regenerate=regenerate, attention="sdpa")
        rollouts.append(peer.rollout(ids[:ALONE], n))
    train_peers.Learner(agent, config, compiles=False).learn(rollouts[0], torch.from_numpy(score), config.epochs)

    same, differences = [], []
    for theirs in rollouts:
        rows = slice(len(theirs.tokens))
        same.append(same_start(np.asarray(written.tokens)[rows], theirs.tokens.numpy()))
        differences.append(np.abs(np.swapaxes(written.weights, 0, 1)[:, rows] - theirs.decisions.weights.numpy()).max())
    change = torch.linalg.norm(agent.flat.detach() - learnt) / torch.linalg.norm(learnt - start)
    return [
        common.check("same_tokens", min(same), ">=", 1.0),
        common.check("same_weights", max(differences), "<=", 1e-3),
        common.check("same_update", float(change), "<=", 1e-2),
    ]


# --- this program alone ---


def demo_iteration(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds per iteration at the demo's size: its row and its check."""
    ours = Ours(DEMO, random_members(DEMO.members))
    ours.iterate()
    timing = Timing(tuple(common.seconds_of(ours.iterate) for _ in range(repeats)))
    row = {"kind": "demo", "prompts": DEMO.prompts, "seconds": list(timing.seconds), "median_s": timing.median}
    row["quartiles_s"] = list(timing.quartiles)
    return row, common.check("iteration_256", timing.median, "<=", 0.5)


def text_updates(repeats: int) -> dict[str, Any]:
    """Updates of an agent per second from given texts and from answers that are written, on the same members, prompts
    and answers, and how long reading took: a row."""
    ours = Ours(COMPARED, random_members(COMPARED.members))
    ours.iterate()
    references = np.asarray(ours.batch.references)
    cut = Cut(
        rows=ours.ids.tolist(),
        tokens=references.tolist(),
        prompts=[""] * COMPARED.prompts,
        text=np.arange(COMPARED.prompts),
        bytes=np.full(COMPARED.prompts, COMPARED.new_tokens),
    )
    kept: list[Kept] = []
    reads = ours.spec.policy.reads
    reading = common.seconds_of(lambda: kept.append(keep(ours.ensemble, cut, reads, COMPARED.span_length)))
    source = given.Given(kept[0], kept[0], CONFIG, CONFIG, ours.spec, ours.ensemble)
    state = ppo.init_learners(ours.seeds, ours.spec.policy, ours.spec.dims, CONFIG)

    def iterate() -> None:
        nonlocal state
        state, _, _ = source.iterate(state, ours.seeds, 0)
        jax.block_until_ready(state)

    iterate()
    updates = CONFIG.epochs * CONFIG.minibatches
    rates = {
        name: updates / Timing(tuple(common.seconds_of(call) for _ in range(repeats))).median
        for name, call in (("texts", iterate), ("written", ours.iterate))
    }
    return {"kind": "texts", "updates_per_second": rates, "reading_seconds": reading}


@jax.jit
def _begin(params: Any, ids: Any, spec: rj.DecodeSpec) -> rj.DecodeState:
    prompts = prompts_from_arrays(ids, jnp.ones_like(ids), spec.max_new_tokens, jax.random.key(0))
    return decode.prefill(params, prompts, spec)


@jax.jit
def _tokens(params: Any, state: rj.DecodeState, policy_params: Any, spec: rj.DecodeSpec) -> jax.Array:
    return decode.decode_spans(params, state, policy_params, spec).tokens


def _decode(params: Any, state: rj.DecodeState, policy_params: Any, spec: rj.DecodeSpec) -> None:
    _tokens(params, state, policy_params, spec).block_until_ready()


def agent_overhead(rounds: int, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decoding with members of 134M parameters under an agent and under uniform weights, prefill left out: its row and
    its check. The same state is decoded again and again, so that its caches are copied once per call, on all sides."""
    ensemble = rj.Ensemble(random_members(LARGE))
    ids = np.random.default_rng(0).integers(0, LARGE.vocab, (OVERHEAD_BATCH, OVERHEAD_PROMPT), dtype=np.int32)
    callables: dict[str, Callable[[], Any]] = {}
    agent = PPOAgent(CONFIG.agent)
    for name, policy, samples in (("uniform", Fixed(), False), ("mode", agent, False), ("sampled", agent, True)):
        spec = ensemble.spec(
            policy=policy,
            span_length=COMPARED.span_length,
            max_new_tokens=OVERHEAD_TOKENS,
            ignore_eos=True,
            sample_weights=samples,
        )
        state = _begin(ensemble.params, ids, spec)
        policy_params = policy.init(jax.random.key(0), spec.dims)
        callables[name] = functools.partial(_decode, ensemble.params, state, policy_params, spec)
        callables[name]()
    others = common.OtherLoad()
    timings = common.time_alternating(callables, rounds=rounds, budget_seconds=budget)
    ratios = {name: common.pairwise_ratio(timings[name], timings["uniform"]) for name in ("mode", "sampled")}
    row = {
        "kind": "overhead",
        "batch": OVERHEAD_BATCH,
        "new_tokens": OVERHEAD_TOKENS,
        "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        "ratios": ratios,
        "cores_used_by_others": others.share(),
    }
    return row, common.check("agent_overhead", max(ratios.values()), "<=", OVERHEAD_REQUIRED)


# --- tables ---


def print_iterations(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        rate = row["spans_per_second"]
        variants = "; ".join(found["chosen"] for found in row.get("variants", {}).values())
        cells.append(
            (
                row["side"],
                f"{rate['median']:,.1f} ({rate['q25']:,.1f} to {rate['q75']:,.1f})",
                f"{row['ratio']:.2f}",
                f"{1e3 * row['learning_seconds']:.0f}" if "learning_seconds" in row else "",
                variants,
                str(len(row["seconds"])),
                "?" if row["cores_used_by_others"] is None else f"{row['cores_used_by_others']:.0%}",
            )
        )
    title = (
        f"Spans per second of a PPO iteration, median (quartiles): two members of 0.3M, {COMPARED.prompts} prompts of "
        f"{COMPARED.prompt_tokens} tokens, answers of {COMPARED.new_tokens}, spans of {COMPARED.span_length}"
    )
    columns = ("side", "spans/s", "ours is faster by", "of which learning, ms", "variants", "rounds", "others")
    common.print_table(title, columns, cells)
    if any((row["cores_used_by_others"] or 0) > QUIET for row in rows):
        print("Other programs used the cores meanwhile. That slows torch several times more: run this again.")


def print_overhead(row: dict[str, Any]) -> None:
    cells = []
    for name, seconds in row["seconds"].items():
        timing = Timing(tuple(seconds))
        low, high = (OVERHEAD_BATCH * OVERHEAD_TOKENS / q for q in reversed(timing.quartiles))
        rate = OVERHEAD_BATCH * OVERHEAD_TOKENS / timing.median
        cells.append((name, f"{rate:.1f} ({low:.1f} to {high:.1f})", f"{row['ratios'].get(name, 1.0):.3f}"))
    title = (
        f"Tokens per second under weights that an agent sets, median (quartiles): 134M members, batch {row['batch']}"
    )
    common.print_table(title, ("weights", "tokens/s", "time against uniform"), cells)


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    common.require("torch", "transformers")
    from benchmarks import peers

    peers.setup()
    environment = common.environment()
    print("iterations ...", flush=True)
    iterations, checks = compare(5 if options.quick else 21, 60.0 if options.quick else 300.0)
    print_iterations(iterations)
    demo, demo_check = demo_iteration(5 if options.quick else 30)
    print(f"An iteration of {DEMO.prompts} prompts at the demo's size: {demo['median_s']:.3f} s")
    texts = text_updates(5 if options.quick else 30)
    rates = texts["updates_per_second"]
    print(
        f"Updates per second: {rates['texts']:.0f} from given texts (read once, {texts['reading_seconds']:.1f} s with "
        f"compilation; dev scored each time), {rates['written']:.0f} from written answers"
    )
    print("agent_overhead ...", flush=True)
    overhead, overhead_check = agent_overhead(3 if options.quick else 11, 60.0 if options.quick else 300.0)
    print_overhead(overhead)
    common.finish(
        [*iterations, demo, texts, overhead], [*checks, demo_check, overhead_check], environment, options.json_path
    )


if __name__ == "__main__":
    main()
