"""`rlae-jax plan`: what it prints, and what it says of bad input before any work."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlae_jax.commands import main
from rlae_jax.planning.devices import DEVICES

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
PARAMETERS = 1_235_814_400  # of Llama 3.2 1B


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """model(field=value) -> a directory with a configuration and nothing else."""

    def write(name: str = "llama", **changes: Any) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG | changes))
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """run(*arguments) -> what plan prints as JSON."""

    def call(*arguments: str) -> Any:
        monkeypatch.setenv(main.CACHE_VARIABLE, "off")
        monkeypatch.setattr(sys, "argv", ["rlae-jax", "plan", *arguments, "--json"])
        main.main()
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(*arguments) -> the one line that plan says, with status 2."""

    def call(*arguments: str) -> str:
        monkeypatch.setenv(main.CACHE_VARIABLE, "off")
        monkeypatch.setattr(sys, "argv", ["rlae-jax", "plan", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
        return said

    return call


def test_a_pair_on_one_chip(model: Callable[..., str], run: Callable[..., Any]) -> None:
    path = model()
    made = run("--models", path, f"{path}/config.json", "--device", "v5e", "--batch", "8")
    assert made["members"] == ["llama", "llama"]
    assert made["bytes"]["parameters"] == 2 * 2 * PARAMETERS
    assert made["fits"]
    assert made["union"] == 0
    # A step reads all weights and the cache of 768 slots.
    read = 2 * 2 * PARAMETERS + made["bytes"]["cache"]
    assert made["seconds"]["step"] == {"seconds": pytest.approx(read / 819e9), "bound": "memory"}
    assert made["tokens_per_second"] == pytest.approx(8 / (read / 819e9))


def test_what_does_not_fit_is_told_with_what_would(model: Callable[..., str], run: Callable[..., Any]) -> None:
    made = run("--models", model(), "--device", "v5e", "--batch", "512", "--new", "1024")
    assert not made["fits"]
    assert made["bytes"]["total"] > 16 * 2**30
    assert [line.partition(":")[0] for line in made["advice"]] == ["--mesh data=1,model=2", "--batch 256", "--new 256"]


def test_training_says_hours_and_observations(model: Callable[..., str], run: Callable[..., Any]) -> None:
    made = run("--models", model(), model("other"), "--device", "h100", "--batch", "64", "--train")
    assert made["device"]["name"] == "H100"
    assert made["bytes"]["observations"] == 64 * 64 * 2 * 2048 * 4
    assert made["iterations"] == 200
    assert made["hours"] == pytest.approx(200 * made["seconds"]["batch"] / 3600)
    assert made["spans_per_second"] == pytest.approx(64 * 64 / made["seconds"]["batch"])


def test_different_vocabularies_are_different_tokenizers(model: Callable[..., str], run: Callable[..., Any]) -> None:
    pair = ("--models", model(), model("other", vocab_size=32_000), "--device", "v5p")
    assert run(*pair)["union"] == 160_256
    assert run(*pair, "--union", "140000")["union"] == 140_000
    assert run(*pair, "--union", "0")["bytes"]["total"] < run(*pair)["bytes"]["total"]


def test_key_value_heads_that_are_held_whole_are_noted(model: Callable[..., str], run: Callable[..., Any]) -> None:
    (note,) = run("--models", model(), "--device", "v5e", "--mesh", "model=16")["notes"]
    assert "8 key/value heads" in note


def test_states_are_counted(model: Callable[..., str], run: Callable[..., Any]) -> None:
    """Of three layers in four, and the same for a long prompt."""
    hybrid = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    arguments = ("--models", model("hybrid", **hybrid), "--device", "v5p", "--batch", "4", "--new", "24")
    short, long = (run(*arguments, "--prompt", str(n)) for n in (40, 1000))
    state = 12 * (2 * 3 * (2 * 16 + 32) * 128 + 4 * 32 * 128 * 128)
    per_token = 4 * 2 * 2 * 8 * 64
    assert [plan["bytes"]["cache"] for plan in (short, long)] == [4 * (state + per_token * n) for n in (64, 1024)]


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "int8"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "int8"),
    ],
)
def test_a_quantised_checkpoint_is_planned_as_it_is_held(
    model: Callable[..., str], run: Callable[..., Any], fails: Callable[..., str], settings: Any, form: str
) -> None:
    plain, quantised = model(), model("quantised", quantization_config=settings)
    assert (
        run("--models", quantised, "--device", "L4")["bytes"]
        == (run("--models", plain, "--device", "L4", "--quantise", form)["bytes"])
    )
    told = fails("--models", plain, quantised, "--device", "L4", "--quantise", "int8")
    assert "quantised is quantised already" in told


def test_int4_needs_groups(model: Callable[..., str], fails: Callable[..., str]) -> None:
    told = fails("--models", model(intermediate_size=8200), "--device", "L4", "--quantise", "int4")
    assert "layers.0.ffn.down has 8200" in told
    assert "int8 takes any" in told


def test_own_figures_of_a_device(model: Callable[..., str], run: Callable[..., Any]) -> None:
    figures = ("--memory", "10", "--bandwidth", "100", "--flops", "20")
    made = run("--models", model(), *figures)
    assert made["device"] == {"name": "device", "memory": 10.0, "bandwidth": 100.0, "flops": 20.0, "clock": 0.0}
    less = run("--models", model("other"), "--device", "L4", "--memory", "1")
    assert less["device"]["bandwidth"] == DEVICES["L4"].bandwidth
    assert not less["fits"]


def test_tables_show_every_moment(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(main.CACHE_VARIABLE, "off")
    arguments = ["--models", model(), "--device", "L4", "--train", "--algo", "mappo"]
    arguments += ["--batch", "8", "--quantise", "int8"]
    monkeypatch.setattr(sys, "argv", ["rlae-jax", "plan", *arguments])
    main.main()
    said = capsys.readouterr().out
    for part in ("reading prompts", "writing answers", "observations", "int8", "fits", "200 iterations", "spans per"):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--device", "v5"), ("'v5' is not known", "did you mean v5", "RTX4090")),
        ((), ("no device", "--bandwidth")),
        (("--device", "v5e", "--mesh", "model=3"), ("32 heads", "model=3", "1, 2, 4, 8, 16, 32")),
        (("--device", "v5e", "--mesh", "data=3", "--batch", "8"), ("batch 8", "data=3", "6 or 9")),
        (("--device", "v5e", "--mesh", "data=-1"), ("at least 1", "data=-1")),
        (("--device", "v5e", "--batch", "0"), ("--batch 0",)),
        (("--device", "v5e", "--memory", "0"), ("--memory 0",)),
        (("--device", "v5e", "--new", "9000"), ("8,192", "9,000")),
        (("--device", "v5e", "--iterations", "9"), ("--train",)),
        (("--device", "H100", "--compile"), ("H100",)),
        (("--device", "v5e", "--compile", "--quantise", "int8"), ("--quantise",)),
        (("--device", "v5e", "--adapters", "2", "--union", "9"), ("--adapters",)),
    ],
)
def test_bad_input(
    model: Callable[..., str], fails: Callable[..., str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    said = fails("--models", model(), *arguments)
    for part in parts:
        assert part in said


def test_unreadable_configurations(model: Callable[..., str], fails: Callable[..., str], tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    broken.write_text("{")
    assert str(broken) in fails("--models", str(broken), "--device", "v5e")
    other = tmp_path / "settings.json"
    other.write_text("{}")
    assert "called config.json" in fails("--models", str(other), "--device", "v5e")
    assert "NoSuch" in fails("--models", model("odd", architectures=["NoSuch"]), "--device", "v5e")
    assert "no such directory" in fails("--models", "nowhere/at-all", "--device", "v5e").lower()
