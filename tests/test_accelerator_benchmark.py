"""The benchmark of accelerators in tiny shapes on the CPU: every part runs, what was measured survives, and the peers
do the same work."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rlae_jax as rj
from benchmarks import accelerator, accelerator_cases, device
from benchmarks.accelerator_cases import FULL, SMALL_SHAPES, TINY, TINY_UNTIED
from rlae_jax import files


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*arguments) -> what the command leaves in its file, in one round a case."""
    monkeypatch.setattr(accelerator, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(accelerator_cases, "CASE_SECONDS", 0.0)
    path = tmp_path / "accelerator.json"

    def call(*arguments):
        accelerator.main(["--json", str(path), "--tiny", *arguments])
        return json.loads(path.read_text())

    return call


def by_case(content):
    return {row["case"]: row for row in content["rows"]}


def test_decode(run):
    rows = by_case(run("--part", "decode"))
    assert rows["copy"]["bytes_per_second"] > 0
    for case in ("decode_tiny_b2", "decode_tiny untied_b1"):
        assert rows[case]["kernels_step"] > 20
        assert rows[case]["compile_s"] > 0
        assert "fraction" in rows[case]


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param("train", marks=pytest.mark.rare), "adapters", "search"])
def test_the_other_parts(run, part):
    row = run("--part", part)["rows"][-1]
    assert row["part"] == part
    assert row["ms_quartiles"][0] <= row["ms_quartiles"][1]
    assert "error" not in row


@pytest.mark.rare
def test_mixed(run, shared, monkeypatch):
    monkeypatch.setenv("RLAE_JAX_SHARED", str(shared))
    row = run("--part", "mixed")["rows"][-1]
    assert row["kernels_step"] > row["kernels_same"]


def test_mixed_needs_shared_files(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLAE_JAX_SHARED", str(tmp_path / "nowhere"))
    row = run("--part", "mixed")["rows"][-1]
    assert "RLAE_JAX_SHARED" in row["skipped"]
    assert row["skipped"] in capsys.readouterr().out


@pytest.fixture
def measures(monkeypatch):
    """Cases a, b and c of part copy in place of all others; what each does may be set, and those run are listed."""
    done, does = [], {}

    def case(name, seconds=0.0):
        def measure(_):
            done.append(name)
            return does.get(name, lambda: {"bytes_per_second": 1.0})()

        return accelerator.Case(name, "copy", seconds, measure)

    monkeypatch.setattr(accelerator, "all_cases", lambda _: [case("a"), case("b"), case("c", 60.0)])
    return done, does


def fail(error):
    raise error


def test_what_was_measured_survives_and_is_not_measured_again(run, measures, tmp_path):
    done, does = measures
    does["b"] = lambda: fail(SystemExit)  # as if it were killed
    with pytest.raises(SystemExit):
        run()
    kept = json.loads((tmp_path / "accelerator.json").read_text())
    assert list(by_case(kept)) == ["a"]
    does["b"] = lambda: fail(MemoryError("no room"))
    assert by_case(run())["b"]["error"] == "MemoryError: no room"
    del does["b"]
    assert all(map(accelerator.measured, run()["rows"]))
    assert done == ["a", "b", "b", "c", "b"]
    run("--again")
    assert done[-3:] == ["a", "b", "c"]


def test_no_case_begins_that_would_not_end_in_time(run, measures):
    done, _ = measures
    rows = by_case(run("--minutes", "0.5"))
    assert done == ["a", "b"]
    assert "60 s are not left" in rows["c"]["skipped"]
    assert accelerator.measured(by_case(run("--minutes", "2"))["c"])
    assert accelerator.measured(by_case(run("--minutes", "0.5", "--again"))["c"])  # as it was
    assert done == ["a", "b", "c", "a", "b"]


def test_figures_of_different_devices_stay_apart(run, measures, tmp_path):
    run()
    path = tmp_path / "accelerator.json"
    content = json.loads(path.read_text())
    content["environment"]["devices"] = ["gpu:another"]
    files.write_json(path, content)
    with pytest.raises(SystemExit, match="another"):
        run()


ROW = {"case": "decode_1B_b1", "part": "decode", "fraction": 0.75, "ratio_loop": 9.0, "ratio_best": 1.1}
ROW |= {"ms": 2.0, "ms_quartiles": [1.9, 2.1], "kernels_step": 500, "compile_s": 12.0, "program_gb": 5.0}
ROW |= {"peak_gb": 6.0, "loop_ms": 18.0, "best_ms": 2.2, "peers": {"chosen": "graph", "failed": {}}}


def test_checks_and_the_page(tmp_path):
    environment = {"devices": ["gpu:one"], "shapes": "full", "versions": {"jax": "1", "python": "3"}}
    results = accelerator.Results(tmp_path / "results.json", environment)
    case = accelerator.Case("decode_1B_b1", "decode", 0, lambda _: {})
    results.add(case, ROW)
    results.add(dataclasses.replace(case, name="decode_1B_b2"), {"error": "no room"})
    checks = {check["name"]: check["ok"] for check in json.loads(results.path.read_text())["checks"]}
    assert checks == {"gpu_1B_b1": True, "loop_1B_b1": False, "best_1B_b1": True}
    accelerator.main(["--json", str(results.path), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    for part in ("gpu:one", "jax 1", "2 (1.9 to 2.1)", "decode_1B_b2: FAILED, no room", "| loop_1B_b1 | 9 | >= 10 |"):
        assert part in text
    accelerator.main(["--json", str(tmp_path / "none.json"), "--page", str(tmp_path / "empty.md")])
    assert "Nothing is measured yet" in (tmp_path / "empty.md").read_text()


HLO = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p)
}

%long (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %g = f32[2]{0} get-tuple-element(%p), index=1
  %a = f32[2]{0:T(128)} fusion(%g), kind=kLoop, calls=%fused
  %b = f32[2]{0} custom-call(%a), custom_call_target="gemm"
  ROOT %t = (s32[], f32[2]{0}) tuple(%g, %b)
}

%short (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %p = (s32[], f32[2]{0}) parameter(0)
}

%commands (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %c = f32[2]{0} copy(%p)
  ROOT %f = f32[2]{0} fusion(%c), kind=kLoop, calls=%fused
}

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[2]{0} get-tuple-element(%p), index=1
  %y = f32[2]{0} call(%x), to_apply=%commands
  %c = (s32[], f32[2]{0}) conditional(%i, %p, %p), branch_computations={%short, %long}
  ROOT %t = (s32[], f32[2]{0}) tuple(%i, %y)
}

%condition (p: (s32[], f32[2])) -> pred[] {
  %p = (s32[], f32[2]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %once = f32[2]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %w = (s32[], f32[2]{0}) while(%p), condition=%condition, body=%body
}
"""


def test_kernels_of_a_loop():
    """The copy and the fusion of what is called, and the two of the longer branch; what runs once does not count."""
    assert device.loop_kernels(HLO) == 4
    assert device.loop_kernels(HLO.replace("while(", "custom-call(")) == 0


def test_bytes_of_a_step():
    """By hand: TINY has one layer of width 16, one key/value head of 8, and bfloat16 numbers."""
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert device.step_bytes([device.random_lm(TINY, 0)], 3, 10) == 2 * (512 * 16 + layer + 16) + 3 * 10 * 2 * 8 * 2
    assert device.step_bytes([device.random_lm(TINY_UNTIED, 0)], 0, 0) == 2 * (512 * 16 + layer + 16)


def test_random_members_are_of_the_right_scale():
    config = dataclasses.replace(TINY, width=64, heads=8, dtype="float32")
    lm = device.random_lm(config, 0)
    assert np.std(lm.logits(np.arange(64).reshape(4, 16))) == pytest.approx(1.0, rel=0.2)
    o = lm.params["layers"][0]["attention"]["o"]["kernel"]
    assert np.std(o) == pytest.approx(64**-0.5, rel=0.05)
    other = device.random_lm(config, 1)
    assert not np.array_equal(lm.params["embedding"], other.params["embedding"])


@pytest.mark.parametrize("config", [TINY, TINY_UNTIED], ids=["tied", "untied"])
def test_peers_on_the_device_write_the_same(torch, config):
    from benchmarks import peers

    config = dataclasses.replace(config, layers=2, kv_heads=1, dtype="float32")
    lms = [device.random_lm(config, seed) for seed in range(2)]
    prompts = accelerator_cases.random_rows(config, 3, 8)
    ours = rj.Ensemble(lms).generate(prompt_ids=prompts, max_new_tokens=6, ignore_eos=True).tokens
    members = [peers.member_on_device(lm) for lm in lms]
    models = [peers.transformers_model(member, config) for member in members]
    np.testing.assert_array_equal(peers.transformers_loop(models)(prompts, 6), ours)
    np.testing.assert_array_equal(peers.best_on_device(members, prompts, 6).generate(prompts, 6), ours)
    shared = models[0].model.layers[0].self_attn.k_proj.weight
    assert shared.untyped_storage().data_ptr() == members[0].layers[0][1].untyped_storage().data_ptr()


def test_every_part_has_cases():
    for shapes in (SMALL_SHAPES, FULL):
        cases = accelerator.all_cases(shapes)
        assert {case.part for case in cases} == set(accelerator.PARTS)
        assert len({case.name for case in cases}) == len(cases)
    names = {case.name for case in accelerator.all_cases(FULL)}
    assert {case for _, case, *_ in accelerator.REQUIRED} <= names
    assert set(accelerator.QUICK_CASES) <= names
    assert jax.eval_shape(lambda: device.random_params(TINY, 0)).keys() == device.random_params(TINY, 0).keys()
