"""Vocabularies as byte strings: what tokens stand for, how a tokenizer spells them, and the union of several."""

from rlae_jax.fusion.vocabulary.spelling import spell_texts as spell_texts
from rlae_jax.fusion.vocabulary.tokens import token_bytes as token_bytes
from rlae_jax.fusion.vocabulary.union import UnionVocabulary as UnionVocabulary
from rlae_jax.fusion.vocabulary.union import build as build
from rlae_jax.fusion.vocabulary.union import load_or_build as load_or_build
