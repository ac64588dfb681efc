"""Names of methods."""

import rlae_jax as rj
from rlae_jax.evaluation.methods import member_names, unique_names


def test_repeated_names_are_numbered(make_lm):
    assert unique_names(["a", "b", "a", "a", "b"]) == ["a", "b", "a#2", "a#3", "b#2"]
    assert unique_names([]) == []
    same = rj.Ensemble([make_lm(0, name="model"), make_lm(1, name="model"), make_lm(2, name="other")])
    assert member_names(same) == ["single:model", "single:model#2", "single:other"]
