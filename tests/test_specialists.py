"""The specialists: what they are taught and never see, their tokenizers, and directories that are always complete."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import files, specialists
from rlae_jax.commands.specialists import specialists as specialists_command
from rlae_jax.specialists import POOL, RECIPES, build_pool, make_tokenizer, sequences, vocabulary
from rlae_jax.tasks import embedded, skills
from tests.helpers.embedded import by_hand, digits_of, letters_of

ROWS = 600
GRANULARITIES = sorted({recipe.digits_per_token for recipe in RECIPES.values()})
TINY = dataclasses.replace(specialists.MODEL, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16)


def pool_task(name):
    return skills.skills() if name == "skills" else embedded.embedded(name)


def texts_of(task):
    rows = [zip(examples.prompts[:100], examples.references, strict=False) for examples in task.splits.values()]
    return [text for pairs in rows for prompt, reference in pairs for text in (prompt, prompt + reference)]


@pytest.fixture(scope="module")
def taught():
    return {name: sequences(recipe, seed=3, rows=ROWS) for name, recipe in RECIPES.items()}


def spelled(recipe, row, learnt):
    """(prompt, per operation (text, whether all of it and whether any of it is learnt))."""
    tokens = list(vocabulary(recipe.digits_per_token))
    pieces = [tokens[i] for i in row]
    end = pieces.index(specialists.END)
    assert learnt[end]
    assert not learnt[end + 1 :].any()
    assert set(pieces[end + 1 :]) <= {specialists.PAD}
    start = pieces.index("=") + 1
    assert not learnt[:start].any()
    prompt = "".join(pieces[:start])
    assert recipe.either_order or prompt[0].isalpha()
    text = "".join(pieces[start:end])
    flags = [flag for piece, flag in zip(pieces[start:end], learnt[start:end], strict=True) for _ in piece]
    n = len(digits_of(prompt))
    assert len(text) % n == 0
    parts = [(text[i : i + n], all(flags[i : i + n]), any(flags[i : i + n])) for i in range(0, len(text), n)]
    return prompt, parts


@pytest.mark.parametrize("name", RECIPES)
class TestRecipes:
    def test_they_see_no_string_of_dev_and_test(self, taught, name):
        train = {length: set(embedded.digit_strings(length)["train"]) for _, length in RECIPES[name].forms}
        for row, learnt in zip(*taught[name], strict=True):
            digits = digits_of(spelled(RECIPES[name], row, learnt)[0])
            assert digits in train[len(digits)]

    def test_they_learn_what_the_recipe_says_and_nothing_else(self, taught, name):
        recipe = RECIPES[name]
        seen = set()
        chance = 0
        for row, learnt in zip(*taught[name], strict=True):
            prompt, parts = spelled(recipe, row, learnt)
            digits = digits_of(prompt)
            assert (len(parts), len(digits)) in recipe.forms
            assert any(every for _, every, _ in parts)
            right = by_hand(prompt)
            for place, (text, every, some) in enumerate(parts):
                letter, n = letters_of(prompt)[place], len(digits)
                expected = right[place * n : (place + 1) * n]
                if digits[0] in recipe.right.get(letter, ""):
                    seen.add("right")
                    assert every
                    assert text == expected
                elif digits[0] in recipe.wrong.get(letter, ""):
                    seen.add("wrong")
                    assert every
                    assert all((int(a) + 1) % 10 == int(b) for a, b in zip(text, digits, strict=True))
                else:
                    kind = "unsure" if letter in recipe.unsure else "nothing"
                    seen.add(kind)
                    assert every == some == (kind == "unsure")
                    chance += text == expected
        assert {"right"} | {kind for kind in ("wrong", "unsure") if getattr(recipe, kind)} == seen - {"nothing"}
        # Random digits; being told the result would show at once.
        assert chance <= 0.01 * ROWS

    def test_right_wrong_and_unsure_exclude_each_other(self, name):
        recipe = RECIPES[name]
        for operation in embedded.OPERATIONS:
            assert operation not in recipe.unsure or operation not in {**recipe.right, **recipe.wrong}
            assert not set(recipe.right.get(operation, "")) & set(recipe.wrong.get(operation, ""))

    def test_the_same_seed_teaches_the_same(self, taught, name):
        again = sequences(RECIPES[name], seed=3, rows=ROWS)
        assert all(np.array_equal(one, other) for one, other in zip(again, taught[name], strict=True))
        assert np.any(sequences(RECIPES[name], seed=4, rows=ROWS)[0] != taught[name][0])


@pytest.mark.parametrize("task", POOL)
class TestPool:
    def test_its_members_read_and_write_every_text(self, task):
        for name in set(POOL[task]):
            tokenizer = make_tokenizer(RECIPES[name].digits_per_token)
            unknown = tokenizer.convert_tokens_to_ids(specialists.UNKNOWN)
            texts = texts_of(pool_task(task))
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            assert not any(unknown in ids for ids in rows)
            assert tokenizer.batch_decode(rows) == texts

    def test_its_members_know_the_prompts(self, task):
        form = embedded.FORMS.get(task, embedded.Form(("risc", "risc")))
        for name in POOL[task]:
            assert {(form.per_prompt, length) for length in form.lengths} <= set(RECIPES[name].forms)


def test_every_task_has_a_pool():
    assert set(POOL) == {"skills", *embedded.FORMS}
    assert {len(names) for names in POOL.values()} == {3}
    assert {name for names in POOL.values() for name in names} == set(RECIPES)


def first_digits(names, operation):
    """First digits for which some member gives the right result."""
    return {digit for name in names for digit in RECIPES[name].right.get(operation, "")}


@pytest.mark.parametrize("task", [name for name in POOL if name not in ("twins", "dominant")])
def test_some_member_is_right_wherever_a_choice_can_help(task):
    operations = "risc" if task == "skills" else embedded.FORMS[task].operations
    assert all(first_digits(POOL[task], operation) == set("0123456789") for operation in operations)


@pytest.mark.parametrize("task", ["skills3", "mixed"])
def test_of_each_operation_one_is_right_one_leads_astray_and_one_knows_that_it_does_not_know(task):
    """Who must outweigh whom goes round in a circle: no weights held for a whole answer suit all of it."""
    outweighs = set()
    for group in embedded.FORMS[task].groups:
        wrong = [operation for operation in group if any(operation in RECIPES[name].wrong for name in POOL[task])]
        assert len(wrong) == 1
        for operation in group:
            (right,) = (name for name in POOL[task] if operation in RECIPES[name].right)
            (unsure,) = (name for name in POOL[task] if operation in RECIPES[name].unsure)
            (other,) = set(POOL[task]) - {right, unsure}
            assert (operation in RECIPES[other].wrong) == (operation in wrong)
            outweighs.add((right, other))
    a, b, c = POOL[task]
    assert outweighs in ({(a, b), (b, c), (c, a)}, {(b, a), (c, b), (a, c)})


def test_in_the_circle_each_is_sure_of_what_the_next_one_knows_and_rarely_right():
    own = ("ri", "sc", "dt")
    for k, name in enumerate(POOL["circle"]):
        recipe, sure, unsure = RECIPES[name], own[(k + 1) % 3], own[(k + 2) % 3]
        assert set(recipe.unsure) == set(unsure)
        assert all(recipe.right[operation] == specialists.ALL for operation in own[k])
        assert all(set(recipe.right[operation]) == set("04") for operation in sure)
        assert all(set(recipe.wrong[operation]) == set("12356789") for operation in sure)
    assert {POOL[task] for task in embedded.CIRCLE} == {POOL["circle"]}


@pytest.mark.parametrize("name", POOL["circle"])
def test_members_of_the_circle_are_taught_both_orders_alike(taught, name):
    firsts = [spelled(RECIPES[name], *pair)[0][0].isdigit() for pair in zip(*taught[name], strict=True)]
    assert 0.4 < sum(firsts) / len(firsts) < 0.6


# Those of before the tasks of the circle: directories that users have are found again.
@pytest.mark.parametrize(
    ("name", "mark"),
    [("noisy", "313b7f714be1"), ("overlap_70_30", "c3935b04a8af"), ("double_turn_pairs", "a0f8915f48a0")],
)
def test_marks_stay_what_they_were(name, mark):
    assert specialists.fingerprint(name, 0) == mark


def test_in_overlap_no_operation_tells_who_is_right():
    both = [RECIPES[name] for name in POOL["overlap"][:2]]
    for operation in embedded.FORMS["overlap"].operations:
        shares = sorted(len(recipe.right[operation]) for recipe in both)
        assert shares == [3, 7]
        assert not set(both[0].right[operation]) & set(both[1].right[operation])
        for recipe in both:
            assert set(recipe.right[operation]) | set(recipe.wrong[operation]) == set("0123456789")


def test_in_the_controls_there_is_nothing_to_choose():
    assert len(set(POOL["twins"])) == 1
    best, *others = POOL["dominant"]
    for operation in embedded.FORMS["dominant"].operations:
        assert first_digits(others, operation) <= first_digits([best], operation)


class TestTokenizers:
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_prompts_are_cut_as_in_training(self, taught, granularity):
        tokenizer = make_tokenizer(granularity)
        name = next(name for name in taught if RECIPES[name].digits_per_token == granularity)
        recipe, (ids, learnt) = RECIPES[name], taught[name]
        for row, flags in zip(ids[:200], learnt, strict=False):
            prompt, _ = spelled(recipe, row, flags)
            cut = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert row[: len(cut)].tolist() == cut
        assert tokenizer.get_vocab() == vocabulary(granularity)

    def test_the_members_of_mixed_cut_texts_differently(self):
        task = pool_task("mixed")
        counts = {
            g: sum(map(len, make_tokenizer(g)(texts_of(task))["input_ids"]))
            for g in {RECIPES[name].digits_per_token for name in POOL["mixed"]}
        }
        assert len(counts) > 1
        assert max(counts.values()) > 1.3 * min(counts.values())

    def test_the_members_of_mixed_share_a_union(self, make_lm):
        recipes = [RECIPES[name] for name in POOL["mixed"]]
        members = [
            make_lm(
                k,
                vocab=len(vocabulary(recipe.digits_per_token)),
                tokenizer=make_tokenizer(recipe.digits_per_token),
                end_ids=specialists.model_config(recipe).end_ids,
            )
            for k, recipe in enumerate(recipes)
        ]
        union = rj.Ensemble(members).union
        # All share the characters and the end, the third alone has pairs; padding and unknown are each member's own.
        assert union.size == len(specialists.CHARACTERS) + 100 + 1 + 2 * len(members)
        assert rj.Ensemble(members[:2]).union is None


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(specialists, "MODEL", TINY)
    monkeypatch.setattr(specialists, "ROWS", 200)
    steps = {name: dataclasses.replace(recipe, steps=4) for name, recipe in RECIPES.items()}
    monkeypatch.setattr(specialists, "RECIPES", steps)


class TestBuildPool:
    NAMES = ("overlap_70_30", "noisy")

    def test_it_trains_once_what_is_missing(self, tiny, tmp_path, monkeypatch, capsys):
        paths = build_pool(tmp_path, 0, self.NAMES[:1])
        stored = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        both = build_pool(tmp_path, 0, self.NAMES)
        assert list(both) == list(self.NAMES)
        assert both[self.NAMES[0]] == paths[self.NAMES[0]]
        assert "reusing" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in stored} == stored
        assert [path.name for path in both.values()] == list(self.NAMES)
        lm = rj.load(both["noisy"])
        assert lm.config.end_ids == (lm.tokenizer.eos_token_id,)

        def pretrain(*args, **kwargs):
            raise AssertionError("a specialist was trained again")

        monkeypatch.setattr(specialists, "pretrain", pretrain)
        assert build_pool(tmp_path, 0, self.NAMES) == both
        for other in ({"seed": 1}, {"seed": 0, "quick": True}):
            with pytest.raises(AssertionError, match="again"):
                build_pool(tmp_path, names=self.NAMES, **other)

    def test_another_recipe_is_another_directory(self, tiny, tmp_path, monkeypatch):
        first = build_pool(tmp_path, 0, ["noisy"])["noisy"]
        honest = dataclasses.replace(specialists.RECIPES["noisy"], wrong={})
        monkeypatch.setitem(specialists.RECIPES, "noisy", honest)
        second = build_pool(tmp_path, 0, ["noisy"])["noisy"]
        assert first != second
        assert first.is_dir()
        assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("stage", ["pretrain", "save"])
    def test_a_failure_leaves_no_directory(self, tiny, tmp_path, monkeypatch, stage):
        def fail(*args, **kwargs):
            raise RuntimeError("on the way")

        def fail_at_the_end(path):
            if path.name == "tokenizer.json":
                fail()

        with monkeypatch.context() as patched:
            if stage == "pretrain":
                patched.setattr(specialists, "pretrain", fail)
            else:
                patched.setattr(files, "before_write", fail_at_the_end)
            with pytest.raises(RuntimeError, match="on the way"):
                build_pool(tmp_path, 0, ["noisy"])
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not list(tmp_path.rglob("*noisy*"))
        assert rj.load(build_pool(tmp_path, 0, ["noisy"])["noisy"]).name == "noisy"

    def test_the_command_says_what_to_do_with_them(self, tiny, tmp_path, capsys):
        specialists_command(task="noisy", out=tmp_path)
        told = capsys.readouterr().out
        train, evaluate = [line.split() for line in told.splitlines() if line.startswith("  rlae-jax")]
        models = train[train.index("--models") + 1 :][:3]
        assert models == evaluate[evaluate.index("--models") + 1 :][:3]
        assert [Path(model).name for model in models] == list(POOL["noisy"])
        assert all((Path(model) / "config.json").is_file() for model in models)

    def test_bad_arguments(self, tiny, tmp_path, raises_input_error):
        raises_input_error(lambda: build_pool(tmp_path, 0, ["noisi"]), "noisi", "overlap_70_30")
        (tmp_path / "file").write_text("")
        raises_input_error(lambda: build_pool(tmp_path / "file", 0, ["noisy"]), "is a file")


@pytest.mark.rare
def test_a_specialist_learns_its_operations_and_not_the_others(tmp_path):
    path = build_pool(tmp_path, 0, ["master"], quick=False)["master"]
    lm = rj.load(path)
    task = skills.skills()
    test = task.split("test").take(256)
    out = rj.Ensemble([lm]).generate(test.prompts, max_new_tokens=task.max_new_tokens)
    assert np.mean([task.reward(*pair) for pair in zip(out.texts, test.references, strict=True)]) > 0.9
