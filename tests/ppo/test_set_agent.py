"""The set agent: attention against loops, members in another order, more members, others; learning whom to trust."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import records
from rlae_jax.ablate import configured
from rlae_jax.config import NETWORKS, AgentConfig, MAPPOConfig, PPOConfig
from rlae_jax.evaluation import load_agents, transfer_matrix
from rlae_jax.fusion.policy import BoundPolicy, Dims, Observation, Policy
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent, SetAgent
from rlae_jax.ppo.train import AgentRun, check_members, read_run
from tests.helpers import toys
from tests.helpers.agents import SMALL
from tests.helpers.run_files import AGENT
from tests.helpers.tokenizers import byte_level, sentencepiece

ALL = ("hidden", "stats", "span", "prompt", "agreement")
READS = [ALL, ("stats", "agreement"), ("hidden",), ("agreement",), ("prompt", "span")]
TRAINED = (6, 4, 6)


def observe(widths, batch=5, seed=0):
    """What a policy sees of members of these widths."""
    rng, k = np.random.default_rng(seed), len(widths)
    alike = rng.uniform(0, 1, (batch, k, k))
    observation = Observation(
        hidden=tuple(rng.normal(0, 1, (batch, width)) for width in widths),
        stats=rng.normal(0, 1, (batch, k, 4)),
        span=rng.integers(0, 3, batch),
        prompt=rng.normal(0, 1, (batch, k)),
        agreement=np.where(np.eye(k, dtype=bool), 1, (alike + alike.transpose(0, 2, 1)) / 2),
    )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32 if leaf.dtype == int else jnp.float32), observation)


def keep(observation, reads):
    return Observation(*(value if name in reads else () for name, value in observation._asdict().items()))


def permute(observation, order):
    """The same with the members in another order."""
    order = list(order)
    return observation._replace(
        hidden=tuple(observation.hidden[i] for i in order) if observation.hidden else (),
        stats=observation.stats[:, order] if "stats" in named(observation) else (),
        prompt=observation.prompt[:, order] if "prompt" in named(observation) else (),
        agreement=observation.agreement[:, order][:, :, order] if "agreement" in named(observation) else (),
    )


def named(observation):
    return [name for name, value in observation._asdict().items() if not isinstance(value, tuple)]


def make(reads=ALL, several=False, **fields):
    return SetAgent(AgentConfig.of_set(reads=reads, **SMALL | {"projection": 8} | fields), several)


def scramble(params, seed=0):
    """Every parameter at random: in fresh ones many are 0."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32) for leaf in leaves)


@functools.cache
def parts(reads, several=False, **fields):
    agent = make(reads, several, **fields)
    return agent, scramble(agent.init(jax.random.key(0), Dims(TRAINED, 3))), jax.jit(agent.apply)


def by_hand(params, config, seen, b):
    """Concentrations [K] and the value of a row, a number at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    seen = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[b], seen)
    reads, attention = config.reads, params["attention"]
    k = len(seen.agreement) if "agreement" in reads else len(seen.hidden)

    def mlp(net, x):
        return np.tanh(x @ net["w1"] + net["b1"]) @ net["w2"] + net["b2"]

    xs = []
    for m in range(k):
        read = []
        if "hidden" in reads:
            h, width = seen.hidden[m], len(seen.hidden[m])
            known = f"width_{width}" in params["projections"] and np.any(h != 0)
            projected = np.zeros(config.projection)
            if known:
                projected = h / np.sqrt(np.mean(h**2) + 1e-6) @ params["projections"][f"width_{width}"]
            read += [*projected, float(known)]
        own = [seen.stats] if "stats" in reads else []
        own += [seen.prompt[:, None] / np.mean(np.abs(seen.prompt))] if "prompt" in reads else []
        for column in own:
            read += list(column[m])
        for column in own:
            above = column - column.mean(axis=0)
            read += list(above[m] / np.sqrt(np.mean(above**2, axis=0) + 1e-4))
        read += list(params["span_embedding"][int(seen.span)]) if "span" in reads else []
        xs.append(np.array(read) @ attention["token"] + attention["bias"])
    alpha, pool = [], []
    for j in range(k):
        heads = []
        for h in range(4):
            scores, values = [], []
            for m in range(k):
                if m == j:
                    continue
                q, key = (
                    (xs[i] / np.sqrt(np.mean(xs[i] ** 2) + 1e-6)) @ attention[name][:, h]
                    for i, name in ((j, "query"), (m, "key"))
                )
                score, value = q @ key / np.sqrt(len(q)), xs[m] @ attention["value"][:, h]
                if "agreement" in reads:
                    score += seen.agreement[j, m] * attention["agreement_score"][h]
                    value = value + seen.agreement[j, m] * attention["agreement_value"][h]
                scores.append(np.exp(score))
                values.append(value)
            shares = [score / sum(scores) for score in scores]
            nothing = np.zeros(attention["value"].shape[2])
            heads.append(sum((s * v for s, v in zip(shares, values, strict=True)), nothing))
        everything = np.concatenate([xs[j], *heads])
        alpha.append(np.log1p(np.exp(mlp(params["actor"], everything)[0])) + config.concentration_floor)
        pool.append(np.tanh(everything @ params["pool"]))
    return np.array(alpha), mlp(params["critic"], np.mean(pool, axis=0))[0]


@pytest.mark.parametrize("reads", [ALL, ("hidden",)], ids="+".join)
@pytest.mark.parametrize("widths", [TRAINED, (4,), (5, 6), (6, 6, 4, 9)], ids=str)
def test_it_is_what_loops_say(reads, widths):
    """Also with another number of members, one alone, and widths that were not there in training."""
    agent, params, apply = parts(reads, hidden_dropout=0.0)
    observation = keep(observe(widths), reads)
    distribution, value = apply(params, observation)
    for b in range(5):
        alpha, expected = by_hand(params, agent.config, observation, b)
        np.testing.assert_allclose(distribution.concentration[b], alpha, rtol=2e-5)
        assert float(value[b]) == pytest.approx(expected, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("several", [False, True], ids=["ppo", "mappo"])
@pytest.mark.parametrize("reads", READS, ids="+".join)
def test_members_in_another_order_have_their_weights_in_that_order(reads, several):
    _, params, apply = parts(reads, several)
    for seed, widths in enumerate([TRAINED, (6, 5, 4, 6)]):
        observation = keep(observe(widths, seed=seed), reads)
        distribution, value = apply(params, observation)
        alpha = np.asarray(distribution.concentration)
        if reads != ("hidden",):  # of which nothing is known of the width 5
            assert np.all(np.ptp(alpha, axis=1) > 1e-4)
        for order in itertools.islice(itertools.permutations(range(len(widths))), 1, 24, 4):
            other, same = apply(params, permute(observation, order))
            np.testing.assert_allclose(other.concentration, alpha[:, list(order)], rtol=1e-5)
            np.testing.assert_allclose(same, value, rtol=1e-5, atol=1e-6)
            weights = [one.to_weights(one.mode()) for one in (other, distribution)]
            np.testing.assert_allclose(weights[0], weights[1][:, list(order)], rtol=1e-5)


def test_every_members_likelihood_is_its_own():
    """With MAPPO; and whoever chooses the spans' lengths sees all members alike."""
    agent, params, apply = parts(ALL, True, span_lengths=(2, 4))
    assert isinstance(agent, Policy)
    observation = observe(TRAINED)
    distribution, _ = apply(params, observation)
    action = jax.jit(lambda keys: distribution.sample(keys))(jax.random.split(jax.random.key(0), 5))
    assert distribution.log_prob(action).shape == (5, 3 + 1)
    order = [2, 0, 1]
    other, _ = apply(params, permute(observation, order))
    moved = distribution.log_prob(action)[:, [*order, 3]]
    np.testing.assert_allclose(other.log_prob(action[:, [*order, 3]]), moved, rtol=1e-4, atol=1e-5)
    _, params, apply = parts(ALL)
    single, _ = apply(params, observation)
    assert single.log_prob(single.mode()).shape == (5,)


def test_parameters_do_not_know_the_members():
    agent = make()
    first = agent.init(jax.random.key(3), Dims((6, 4), 3))
    for widths in ((4, 6), (4, 6, 4, 6), (6, 6, 4)):
        other = agent.init(jax.random.key(3), Dims(widths, 3))
        jax.tree.map(np.testing.assert_array_equal, first, other)
    assert agent.init(jax.random.key(3), Dims((6,), 3))["projections"].keys() == {"width_6"}


def test_hidden_states_that_say_nothing():
    """Of a width that training had not, of a member that was not there, or switched off: it is all the same."""
    agent, params, apply = parts(ALL)
    observation = observe((6, 4, 9), seed=1)
    zeros = tuple(jnp.zeros_like(h) if k else h for k, h in enumerate(observation.hidden))
    expected = apply(params, observation._replace(hidden=zeros))
    stranger = agent.for_members((True, False, True))
    assert stranger != agent
    assert agent.for_members((True, True)) == agent
    found = jax.jit(stranger.apply)(params, observation)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert not np.allclose(apply(params, observation)[1], expected[1])


def test_settings(raises_input_error):
    raises_input_error(lambda: AgentConfig(network="sets"), "joint, set", "'sets'")
    raises_input_error(lambda: AgentConfig(network="set", reads=("span",)), "agreement, hidden, stats or prompt")
    raises_input_error(lambda: AgentConfig.of_set(distribution="logistic_normal"), "Dirichlet")
    raises_input_error(lambda: AgentConfig.of_set(share_actors=True), "share_actors")
    raises_input_error(lambda: AgentConfig(hidden_dropout=0.5), "set agents")
    raises_input_error(lambda: AgentConfig.of_set(hidden_dropout=1.0), "hidden_dropout is 1.0")
    assert "agreement" in AgentConfig.of_set().reads
    assert AgentConfig(**NETWORKS["joint"]) == AgentConfig()
    assert [c(agent=AgentConfig.of_set()).method for c in (PPOConfig, MAPPOConfig)] == [
        "rlae_ppo_set",
        "rlae_mappo_set",
    ]
    assert ppo.make_policy(MAPPOConfig(agent=AgentConfig.of_set())) == SetAgent(AgentConfig.of_set(), True)


def test_it_can_be_varied(raises_input_error):
    for base in (PPOConfig(), PPOConfig(agent=AgentConfig.of_set())):
        found = [configured(base, {"agent.network": name}).agent for name in ("set", "joint")]
        assert found == [AgentConfig.of_set(), AgentConfig()]
    few = AgentConfig(reads=("stats",))
    expected = AgentConfig.of_set(reads=("stats",))
    assert configured(PPOConfig(agent=few), {"agent.network": "set"}).agent == expected
    assert configured(PPOConfig(), {"agent.network": "set", "agent.reads": ("stats",)}).agent == expected
    raises_input_error(lambda: configured(PPOConfig(), {"agent.network": "sets"}), "joint, set")


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0]]


@pytest.fixture(scope="module")
def three(make_lm):
    narrow = {"width": 12, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 6}
    return [make_lm(0, layers=1), make_lm(1, **narrow), make_lm(2, layers=1)]


def bound(reads, several, widths, spans):
    agent = make(reads, several)
    return BoundPolicy(agent, scramble(agent.init(jax.random.key(0), Dims(widths, spans))), Dims(widths, spans), 2)


@pytest.mark.parametrize(
    ("reads", "several"),
    [(ALL, False), pytest.param(("stats", "agreement"), True, marks=pytest.mark.rare)],
    ids=["hidden", "without"],
)
def test_an_ensemble_in_another_order_writes_the_same(three, reads, several):
    policy, order = bound(reads, several, (16, 12), 4), [2, 0, 1]
    ids, mask = pad_rows(PROMPTS, 8)
    one, other = (
        rj.Ensemble(members, end_ids=(4,)).generate(
            prompt_ids=ids, prompt_mask=mask, weights=policy, max_new_tokens=6, ignore_eos=True
        )
        for members in (three, [three[i] for i in order])
    )
    assert one.tokens == other.tokens
    np.testing.assert_allclose(other.weights, one.weights[:, :, order], atol=1e-4)
    assert np.ptp(one.weights) > 0.05


@pytest.mark.rare
def test_an_ensemble_over_a_union_in_another_order(make_lm):
    tokenizers = byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "é"])
    pair = [
        make_lm(k, layers=1, vocab=len(t), tokenizer=t, end_ids=(t.eos_token_id,)) for k, t in enumerate(tokenizers)
    ]
    policy = bound(ALL, False, (16,), 3)
    one, other = (
        rj.Ensemble(members).generate(["ab the", "th"], policy, max_new_tokens=6, ignore_eos=True)
        for members in (pair, pair[::-1])
    )
    assert one.texts == other.texts
    np.testing.assert_allclose(other.weights, one.weights[:, :, ::-1], atol=1e-4)


class TestTraining:
    @pytest.fixture(scope="class")
    def pair(self, make_chain_lm, make_tokenizer):
        return toys.members(make_chain_lm, make_tokenizer)

    @pytest.fixture(scope="class")
    def config(self):
        agent = AgentConfig.of_set(projection=16, span_embedding=4, ffn_width=32)
        return dataclasses.replace(toys.SETTINGS, iterations=10, eval_every=5, learning_rate=1e-2, agent=agent, seeds=2)

    @pytest.fixture(scope="class")
    def run(self, pair, config, tmp_path_factory):
        out = tmp_path_factory.mktemp("set") / "run"
        return out, rj.train_seeds(rj.Ensemble(pair), toys.task(), config, out)

    def test_it_learns_whom_to_trust_when_in_any_order(self, run, pair):
        """Both members have the same hidden states: only their statistics tell them apart."""
        test = toys.task().splits["test"]
        for policy in run[1]:
            for members in (pair, pair[::-1]):
                assert rj.Ensemble(members).generate(test.prompts, policy, max_new_tokens=2).texts == test.references

    def test_its_run_is_read_again(self, run, pair, config):
        out, policies = run
        assert read_run(out).settings.agent == config.agent
        for seed, policy in enumerate(policies):
            loaded = rj.load_policy(out, seed=seed)
            jax.tree.map(np.testing.assert_array_equal, loaded.params, policy.params)
            assert loaded.members == policy.members == rj.Ensemble(pair).fingerprints

    def test_more_members_and_others(self, run, pair, make_lm):
        """Three where two were trained, in another order, of another width; the new are read without their states."""
        policy = run[1][0]
        v = len(toys.CHARACTERS) + 1
        new = [make_lm(1, vocab=v, width=w, heads=2, tokenizer=pair[0].tokenizer, end_ids=(toys.END,)) for w in (8, v)]
        for members in ([pair[1], *new, pair[0]], pair[:1]):
            out = rj.Ensemble(members).generate(["ab", "ch"], policy, max_new_tokens=2)
            assert out.weights.shape[2] == len(members)
            assert np.all(np.isfinite(out.weights[:, 0]))
        of_params = policy.params["projections"].keys()
        assert of_params == {f"width_{v}"}
        assert rj.Ensemble([pair[0], new[1]]).bind(policy, 1, 1).policy.known == (True, False)
        assert rj.Ensemble(pair[::-1]).bind(policy, 1, 1).policy == policy.policy

    @pytest.mark.rare
    def test_transfer_and_serving(self, run, pair, make_lm):
        """Over other numbers of members than in training."""
        policies, task = run[1], toys.task()
        new = make_lm(1, vocab=len(toys.CHARACTERS) + 1, tokenizer=pair[0].tokenizer, end_ids=(toys.END,))
        pools = {"two": rj.Ensemble(pair), "three": rj.Ensemble([new, *pair])}
        tasks = {name: dataclasses.replace(task, name=name) for name in pools}
        matrix = transfer_matrix({"toy": policies}, pools, tasks, limit=4)
        assert np.shape(matrix["per_seed"]) == (1, 2, 2)
        expected = pools["three"].generate(["ab", "ch"], policies[0], max_new_tokens=2, ignore_eos=True)
        with rj.Engine(pools["three"], slots=2, context=64, policies={"agent": policies[0]}) as engine:
            options = SamplingOptions(max_new_tokens=2, ignore_eos=True)
            asked = [rj.Request(prompt=prompt, weights="agent", options=options) for prompt in ("ab", "ch")]
            answers = [engine.submit(one).result(100) for one in asked]
        assert [one.tokens[0] for one in answers] == expected.tokens

    def test_new_members_are_told_once(self, run, pair, make_lm):
        out, v = run[0], len(toys.CHARACTERS) + 1
        new = make_lm(1, vocab=v, tokenizer=pair[0].tokenizer, end_ids=(toys.END,), name="new")
        check_members(out, rj.Ensemble(pair[::-1]))
        ensemble = rj.Ensemble([pair[0], new, pair[1]])
        with pytest.warns(UserWarning, match="trained with left, right; new to its agent: new .read without") as told:
            agents = load_agents(ensemble, toys.task(), [out])
        assert len(told) == 1
        assert agents.keys() == {"rlae_ppo_set"}
        assert len(agents["rlae_ppo_set"]) == 2

    def test_a_joint_agents_members_are_as_before(self, pair, raises_input_error):
        agent = PPOAgent(toys.SMALL_AGENT)
        ensemble = rj.Ensemble(pair)
        dims = Dims(ensemble.widths, 2)
        policy = BoundPolicy(agent, agent.init(jax.random.key(0), dims), dims, 1)
        raises_input_error(
            lambda: rj.Ensemble([*pair, pair[0]]).generate(["ab"], policy, max_new_tokens=2),
            "13, 13, 13]",
            "set agent",
        )

    @pytest.mark.rare
    def test_hidden_states_are_hidden_in_training_alone(self, pair):
        agent = make(hidden_dropout=0.4, reads=("hidden", "stats"))
        ensemble = rj.Ensemble(pair)
        for record in (True, False):
            spec = ensemble.spec(policy=agent, max_new_tokens=2, span_length=1, record=record, sample_weights=True)
            params = scramble(agent.init(jax.random.key(0), spec.dims))
            ids, mask = pad_rows([[i % 8, (i // 8) % 8] for i in range(64)], 8)
            state = jax.jit(rj.decode)(ensemble.params, ids, mask, params, jax.random.key(1), spec)
            if record:
                seen = state.trajectory.observation
                shown = np.stack([np.any(np.asarray(h) != 0, axis=-1) for h in seen.hidden])[
                    :, np.asarray(state.span_mask())
                ]
                assert np.all(np.abs(shown.mean(axis=1) - 0.6) < 0.2)
                assert abs(np.mean(shown[0] & shown[1]) - 0.36) < 0.2  # each by itself
                flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)
                again = agent.apply(params, flat)[1].reshape(64, 2)
                np.testing.assert_allclose(again, state.trajectory.value, atol=1e-5)


def test_runs_of_before_are_read():
    value = records.plain(AGENT)
    for name in ("network", "hidden_dropout"):
        del value["settings"]["agent"][name]
    assert records.check(value, AgentRun, "run") == AGENT


def learn_whom_to_trust(agent, draw, iterations=60, rows=128):
    """Trains an agent that is paid the weight on the member whose first statistic is the highest."""
    config = PPOConfig(epochs=1, minibatches=1, learning_rate=2e-2, agent=agent.config)
    spec = rj.DecodeSpec(members=(), policy=agent)
    dims = Dims((1, 1), 1)

    def step(state, key):
        draw_key, row_key, learn_key = jax.random.split(key, 3)
        observation = draw(draw_key, rows)
        distribution, value = agent.apply(state.params, observation)
        action = distribution.sample(jax.random.split(row_key, rows))
        experience = ppo.Rollout(
            jax.tree.map(lambda leaf: leaf[:, None], observation),
            action[:, None],
            distribution.to_weights(action)[:, None],
            distribution.log_prob(action)[:, None],
            value[:, None],
            jnp.ones((rows, 1), bool),
            jnp.zeros((rows, 1), jnp.int32),
            jnp.ones(rows, jnp.int32),
            jnp.ones(rows, bool),
        )
        score = paid(distribution.to_weights(action), observation)
        return ppo.learn(state, experience, score, learn_key, spec, config)[0], None

    start = ppo.init_learner(jax.random.key(0), agent, dims, config)
    state, _ = jax.jit(lambda start: jax.lax.scan(step, start, jax.random.split(jax.random.key(1), iterations)))(start)

    def score(observation):
        distribution, _ = agent.apply(state.params, observation)
        return float(jnp.mean(paid(distribution.to_weights(distribution.mode()), observation)))

    return score


def paid(weights, observation):
    best = jnp.argmax(observation.stats[..., 0], axis=1)
    return jnp.take_along_axis(weights, best[:, None], axis=1)[:, 0]


def statistics(key, rows, members=2, place=None):
    """Statistics of which the first is high for one member: at a place, or anywhere."""
    noise, where = jax.random.split(key)
    best = jax.random.randint(where, (rows,), 0, members) if place is None else jnp.full((rows,), place)
    stats = 0.3 * jax.random.normal(noise, (rows, members, 4))
    stats = stats.at[..., 0].add(2.0 * jax.nn.one_hot(best, members))
    return Observation((), stats, ())


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.rare)], ids=["ppo", "mappo"])
def test_it_learns_whom_to_trust_wherever_they_stand(several):
    """Of three members, too, where it was trained with two; a joint agent that was trained with the same order of
    members fails in another."""
    fixed = functools.partial(statistics, place=0)
    agent = SetAgent(AgentConfig.of_set(reads=("stats",), projection=8, ffn_width=16), several)
    score = learn_whom_to_trust(agent, fixed)
    key = jax.random.key(7)
    for members, place in ((2, 0), (2, 1), (3, None)):
        assert score(statistics(key, 256, members, place)) > 0.9
    if not several:
        joint = learn_whom_to_trust(PPOAgent(AgentConfig(reads=("stats",), ffn_width=16)), fixed)
        assert joint(fixed(key, 256)) > 0.9
        assert joint(statistics(key, 256, 2, 1)) < 0.3
