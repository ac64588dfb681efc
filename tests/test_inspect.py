"""What is said of members before they run: figures against arrays and caches that exist, and plain warnings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from rlae_jax import report
from rlae_jax.inspect_members import Inspection, inspect_members, show
from rlae_jax.models import LM, load, transformer
from rlae_jax.models.cache import cache_bytes
from rlae_jax.models.config import Experts, ShortConvolution
from rlae_jax.models.lm import read_tokenizer
from tests.helpers.tokenizers import byte_level, sentencepiece


@pytest.fixture
def mixed(make_lm: Callable[..., LM]) -> list[LM]:
    """A byte-level and a SentencePiece member without byte fallback, the latter with a second end token."""
    one = byte_level([b"ab", b" a", b"abc"])
    two = sentencepiece(["▁", "a", "b", "ab"], byte_fallback=False)
    return [
        make_lm(0, tokenizer=one, vocab=300, tokens=len(one), end_ids=(one.eos_token_id,), name="one"),
        make_lm(1, tokenizer=two, vocab=7, tokens=7, end_ids=(1, 2), name="two", context=2048),
    ]


def printed(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> str:
    console = rich.console.Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(report, "console", console)
    show(inspection)
    console.file.close()
    return console.export_text()


def test_mixed_tokenizers(mixed: list[LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect_members(mixed, bandwidth_gb_s=2.0, batch=3, tokens=10, cache=tmp_path)
    one, two = found.members
    assert not found.same_tokenizer
    # 256 bytes, three words and the end; "<unk>" and "<s>" are the second member's own.
    assert found.union_size == 260 + 2
    assert [one.vocabulary, two.vocabulary] == [260, 7]
    assert [one.partners, two.partners] == [4 / 259, 1.0]
    # It can write " ", "a", "b", "ab" and with two tokens " a".
    assert found.entries_off == 259 - 5
    assert [one.mean_tokens, one.max_tokens] == [1.0, 1]
    assert [two.mean_tokens, two.max_tokens] == [6 / 5, 2]
    assert two.p95_tokens == pytest.approx(np.percentile([1, 1, 1, 1, 2], 95))
    assert [one.unspellable_bytes, two.unspellable_bytes] == [0, 243 - 3]
    assert two.end_tokens == ("</s> (2)", "<s> (1)")
    text = "\n".join(found.warnings)
    assert "only 1.5% of one's tokens" in text
    assert "two cannot write 240" in text
    assert "512 tokens and two for 2048" in text
    shown = printed(found, monkeypatch)
    for part in ("260", "262", "254", "</s> (2)", "private end tokens", "<s> (1)", "1.5%", "warning:"):
        assert part in shown


def test_memory(mixed: list[LM], tmp_path: Path) -> None:
    """Bytes are those of arrays that exist, and tokens per second follow from them."""
    read = 0
    for lm in mixed:
        ids = jnp.ones((3, 10), jnp.int32)
        kept = transformer.Model(lm.config, lm.params).read_prompt(ids, jnp.ones_like(ids))
        arrays = jax.tree.leaves((lm.params, kept.layers))
        read += sum(np.asarray(leaf).nbytes for leaf in arrays)
        layers = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(kept.layers))
        assert cache_bytes(lm.config, 10) == layers / 3
    found = inspect_members(mixed, bandwidth_gb_s=2.0, batch=3, tokens=10, cache=tmp_path)
    assert found.read_bytes == read
    assert found.tokens_per_second == pytest.approx(3 * 2e9 / read)


def test_half_precision_and_bare_lists(make_lm: Callable[..., LM]) -> None:
    lm = make_lm(0, dtype="bfloat16")
    assert cache_bytes(lm.config, 10) == cache_bytes(make_lm(0).config, 10) / 2
    assert inspect_members([lm]).same_tokenizer


def test_one_same_tokenizer(make_lm: Callable[..., LM], make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that no union could hold; a chat template on one side alone is worth a warning."""
    members = [
        make_lm(k, tokenizer=make_tokenizer("abc", chat_template=template), vocab=4, tokens=4, end_ids=(3,), name=name)
        for k, (name, template) in enumerate([("base", None), ("chat", "{{ messages }}")])
    ]
    found = inspect_members(members)
    assert found.same_tokenizer
    assert found.union_size == 4
    assert found.members[0].partners is None
    assert "one same tokenizer" in printed(found, monkeypatch)
    assert any("chat has a chat template and base has none" in line for line in found.warnings)
    quiet = dataclasses.replace(members[1], name="other")
    assert inspect_members([members[1], quiet], tokens=100).warnings == ()


def test_what_does_not_fit_is_said(make_lm: Callable[..., LM], make_tokenizer: Any, mixed: list[LM]) -> None:
    bare = make_lm(2, name="bare", vocab=23)
    found = inspect_members([mixed[0], bare], tokens=1000)
    text = "\n".join(found.warnings)
    assert "bare has no tokenizer" in text
    assert "bare has no end token" in text
    assert "cannot be fused" in text
    assert "bare was made for 512 tokens, not 1000" in text
    assert found.union_size is None
    words = make_lm(3, tokenizer=make_tokenizer("ab"), vocab=3, tokens=3, end_ids=(2,), name="words")
    found = inspect_members([mixed[0], words])
    assert any("no union vocabulary" in line and "words" in line for line in found.warnings)
    endless = dataclasses.replace(mixed[1], config=dataclasses.replace(mixed[1].config, end_ids=()))
    assert any("give end ids" in line for line in inspect_members([mixed[0], endless]).warnings)


def test_end_ids_beyond_the_vocabulary_and_the_same_model_twice(make_lm: Callable[..., LM]) -> None:
    lm = make_lm(0, vocab=40)
    assert inspect_members([lm, lm]).warnings == inspect_members([lm]).warnings
    found = inspect_members([lm], [[3, 99]]).warnings
    assert any("40 ids" in line and "[99]" in line for line in found)


def test_real_tokenizers(make_lm: Callable[..., LM], shared: Path, tmp_path: Path) -> None:
    members = []
    for name in ("gpt2", "mistral_v3"):
        tokenizer = read_tokenizer(shared / "tokenizers" / name)
        lm = make_lm(0, tokenizer=tokenizer, width=4, heads=1, kv_heads=1, vocab=len(tokenizer), name=name)
        ends = (tokenizer.eos_token_id,)
        members.append(dataclasses.replace(lm, config=dataclasses.replace(lm.config, end_ids=ends)))
    found = inspect_members(members, tokens=500, cache=tmp_path)
    assert [round(member.partners or 0, 2) for member in found.members] == [0.42, 0.67]
    assert [member.max_tokens for member in found.members] == [16, 64]
    assert found.entries_off == 0
    assert found.warnings == ()


def test_bad_input(mixed: list[LM], raises_input_error: Callable[..., str]) -> None:
    raises_input_error(lambda: inspect_members([]), "at least one")
    raises_input_error(lambda: inspect_members(mixed, batch=0), "batch is 0; expected")
    raises_input_error(lambda: inspect_members(mixed, [[1]]), "1 lists for 2 members")


def test_how_a_checkpoint_is_held(make_lm: Callable[..., LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lm(0, vocab=64, width=64, heads=4, head_width=16, ffn_width=96).save(tmp_path / "plain")
    found = inspect_members([load(tmp_path / "plain", quantise=kind) for kind in (None, "int8", "int4")])
    full, eight, four = found.members
    assert {member.family for member in found.members} == {"llama"}
    assert full.weights == "float32"
    assert eight.weights == "float32, 14 x int8"
    assert four.weights == "float32, 12 x int4 in groups of 32, 2 x int8"  # values stay in int8
    assert full.parameter_bytes > 2 * eight.parameter_bytes > 2 * four.parameter_bytes
    size = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert full.disk_bytes == eight.disk_bytes == size
    assert full.parameter_bytes <= size < 1.2 * full.parameter_bytes
    assert "int4 in groups of 32" in printed(found, monkeypatch)


def test_experts_are_told(make_lm: Callable[..., LM]) -> None:
    """A step of one row reads two of eight experts."""
    spec = Experts(number=8, active=2, width=400, layers=(1,))
    lm, dense = make_lm(0, experts=spec), make_lm(0)
    one = 4 * 3 * spec.width * lm.config.width
    found, many = (inspect_members([lm], batch=batch, tokens=1) for batch in (1, 64))
    (member,) = found.members
    assert member.experts is not None
    assert member.experts.startswith("2 of 8 per token in 1 of 2 layers: ")
    assert member.parameter_bytes > 8 * one
    assert found.read_bytes == member.parameter_bytes - 6 * one + member.cache_bytes
    assert many.read_bytes == pytest.approx(member.parameter_bytes + 64 * member.cache_bytes, rel=1e-4)
    assert inspect_members([dense]).members[0].experts is None


def test_states_are_told(make_lm: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the same however long the text is."""
    lm = make_lm(0, recurrent=ShortConvolution(layers=(0,), taps=4))
    (short,), (long,) = (inspect_members([lm], tokens=n).members for n in (1, 101))
    state, per_token = 4 * 3 * lm.config.width, 4 * 2 * 2 * 4
    assert [short.cache_bytes, long.cache_bytes] == [state + per_token, state + 101 * per_token]
    assert short.recurrent == "1 of 2 layers: 192 B of states per row"
    assert short.recurrent in printed(inspect_members([lm]), monkeypatch)
    assert inspect_members([make_lm(0)]).members[0].recurrent is None


def test_windows_are_told(make_lm: Callable[..., LM]) -> None:
    local = make_lm(0, window=8, local_layers=(0,))
    assert [member.windows for member in inspect_members([local]).members] == ["1 of 2 layers: 8"]
