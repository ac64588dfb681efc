"""The two real models of `benchmarks.real_models_files`, for tests, which are skipped where they cannot be had."""

import functools
from pathlib import Path

import pytest

from benchmarks.real_models_files import GEMMA3, SMOLLM2, RealModel, Unavailable, find

MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


@functools.cache
def _found(model: RealModel) -> Path | str:
    try:
        return find(model)
    except Unavailable as error:
        return str(error)


def real_model(name: str) -> Path:
    """The GGUF file of "smollm2" or "gemma3"; skips the test that asks where it cannot be had."""
    found = _found(MODELS[name])
    if isinstance(found, str):
        pytest.skip(f"a real model cannot be had: {found}")
    return found
