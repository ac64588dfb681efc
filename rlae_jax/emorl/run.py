"""A run's directory as commands see it: its base, its prompts, what its adapters were taught, and the adapters.

In: a directory that `train_adapters` made. Out: objects to search, evaluate and export with. What a command needs to
make prompts and objectives again, their names on the command line, lies in the run's files. They are data: a function
that they name is run only where the user names it again, or says that the run's code may run.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlae_jax import files, hosts, records
from rlae_jax.emorl import embedded
from rlae_jax.emorl.scorers import Objective, get_objectives, own_function
from rlae_jax.emorl.search import SearchRun
from rlae_jax.emorl.train import (
    ADAPTER,
    HELD,
    OBJECTIVES,
    TRAINING_FILE,
    WEIGHTINGS,
    AdapterRun,
    AdaptersRun,
    Target,
    check_targets,
)
from rlae_jax.errors import InputError, one_line
from rlae_jax.models import LM, Adapter, load, load_adapter
from rlae_jax.ppo.train import read_run
from rlae_jax.runs import lock
from rlae_jax.runs.directory import CONFIG_FILE, read_config
from rlae_jax.tasks import reflections
from rlae_jax.tasks.prompts import PromptSet, read_prompts

AGENT = "agent"  # the name of the agent's directory among the searches
_SHORT_NAME = re.compile(r"[\w.+:=,@-]{1,200}", re.ASCII)
# Adapters that are taught all objectives at once, by how these are weighted.
BASELINES = {"uniform_reward": "equal", "dynaopt": "dynaopt", "dynaopt_reference": "dynaopt_reference"}
assert set(BASELINES.values()) == set(WEIGHTINGS)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where prompts come from: a file, or "reflections" for the embedded ones."""

    path: records.Place
    layout: str = "auto"
    prompt_field: str = "prompt"

    def read(self) -> PromptSet:
        """The prompts.

        Raises:
          InputError: what `read_prompts` raises.
        """
        if self.path == reflections.NAME:
            return reflections.prompts()
        return read_prompts(self.path, self.layout, self.prompt_field)


def make_objectives(specs: Sequence[str], data: Data) -> list[Objective]:
    """What objectives' names stand for: with the embedded prompts their own ones come first.

    Raises:
      InputError: what `get_objectives` raises.
    """
    if data.path != reflections.NAME or not set(specs) & set(embedded.ALL):
        return get_objectives(specs)
    check_targets([Target(spec, ()) for spec in specs])
    return [embedded.objective(spec) if spec in embedded.ALL else get_objectives([spec])[0] for spec in specs]


def make_targets(specs: Sequence[str], baselines: Sequence[str], data: Data) -> list[Target]:
    """A target for every objective, and one for every baseline, which is taught all of these.

    Raises:
      InputError: no objectives, a name used twice, an unknown baseline, a baseline of one objective.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise InputError(f"baselines {', '.join(unknown)} are unknown; known: {', '.join(BASELINES)}")
    objectives = make_objectives(specs, data)
    if baselines and len(objectives) < 2:
        raise InputError(f"{baselines[0]} is taught several objectives at once; name at least two")
    targets = [Target(one.name, (one,), specs=(spec,)) for one, spec in zip(objectives, specs, strict=True)]
    targets += [Target(name, tuple(objectives), BASELINES[name], tuple(specs)) for name in baselines]
    check_targets(targets)
    return targets


@dataclasses.dataclass(frozen=True)
class Run:
    """What `emorl train` left.

    Args:
      functions: "module:function" or "file.py:function" of objectives that are the user's own, named by the user.
      allow_code: the functions that the directory names may run.

    Raises:
      InputError: no such directory, or one of another command.
    """

    directory: Path
    functions: Sequence[str] = ()
    allow_code: bool = False

    def __post_init__(self) -> None:
        if not self.directory.is_dir():
            raise InputError(f"{self.directory} is not there; rlae-jax emorl train --out {self.directory} makes it")
        self.config  # noqa: B018  told now

    @functools.cached_property
    def config(self) -> AdaptersRun:
        """The run's config.json."""
        return read_config(self.directory, AdaptersRun)

    @functools.cached_property
    def base(self) -> LM:
        """The base model.

        Raises:
          InputError: it is not where it was, or is another one now.
        """
        known = self.config.base
        held = {name: value for name in HELD if (value := getattr(known, name)) is not None}
        lm = load(known.path or known.name, **held)
        if lm.fingerprint() != known.sha256:
            raise InputError(f"{known.path} is not the base model that {self.directory} was trained from")
        return lm

    @functools.cached_property
    def data(self) -> Data:
        """Where the prompts come from.

        Raises:
          InputError: a run whose prompts were given as an object.
        """
        given = self.config.data
        if given is None:
            raise InputError(
                f"{self.directory} does not say where its prompts come from: it was made without a command"
            )
        return records.check(given, Data, self.directory / CONFIG_FILE, "data")

    @functools.cached_property
    def prompts(self) -> PromptSet:
        """The prompts.

        Raises:
          InputError: they are not those of the run.
        """
        prompts = self.data.read()
        if prompts.digest() != self.config.prompts.sha256:
            raise InputError(f"{self.data.path} is not what {self.directory} was trained on")
        return prompts

    def targets(self) -> dict[str, AdapterRun]:
        """The configuration of every adapter that is done, those of one objective first, as they were begun."""
        directories = [path.parent for path in self.directory.glob(f"{OBJECTIVES}/*/{ADAPTER}")]
        directories = [path for path in directories if (path / TRAINING_FILE).is_file()]  # what is written last
        configs = {path.name: read_config(path, AdapterRun) for path in directories}

        def order(name: str) -> tuple[Any, ...]:
            several = len(configs[name].objectives) > 1
            return several, (self.directory / OBJECTIVES / name / CONFIG_FILE).stat().st_mtime_ns, name

        return {name: configs[name] for name in sorted(configs, key=order)}

    def singles(self) -> list[str]:
        """The adapters of one objective.

        Raises:
          InputError: there are fewer than two.
        """
        names = [name for name, target in self.targets().items() if len(target.objectives) == 1]
        if len(names) < 2:
            raise InputError(
                f"{self.directory} has {len(names)} finished adapters of one objective; a fusion needs two: train "
                "more, or go on with emorl train --resume"
            )
        return names

    def objectives(self, names: Sequence[str]) -> list[Objective]:
        """The objectives of these adapters.

        Raises:
          InputError: an unknown adapter; a function of the directory's that the user neither named nor allowed, or one
            that it does not have; what `get_objectives` raises.
        """
        targets = self.targets()
        unknown = [name for name in names if name not in targets]
        if unknown:
            raise InputError(f"{self.directory} has no adapters {', '.join(unknown)}; it has {', '.join(targets)}")
        specs = [spec for name in names for spec in targets[name].specs]
        specs, data = self._with_functions(specs), self.data
        try:
            return make_objectives(specs, data)
        except InputError as error:
            raise InputError(
                f"{self.directory}: what its adapters were taught cannot be made again: {one_line(error, 600)}"
            ) from error

    def _with_functions(self, specs: Sequence[str]) -> list[str]:
        """What objectives' names stand for, functions as the user named them."""
        named = {own_function(spec): spec for spec in self.functions}
        asked = {own_function(spec): spec for spec in specs if own_function(spec)}
        if unknown := [spec for name, spec in named.items() if name not in asked]:
            has = f"its own are {', '.join(asked)}" if asked else "none of its objectives is one"
            raise InputError(f"{', '.join(unknown)} names no function that is an objective of {self.directory}: {has}")
        missing = [spec for name, spec in asked.items() if name not in named]
        if missing and not self.allow_code:
            raise InputError(
                f"{self.directory} asks to run code: {', '.join(missing)}. If you know it, name it again "
                f"(--objective {shlex.join(missing)}) or add --allow-code"
            )
        return [named.get(own_function(spec), spec) for spec in specs]

    def search_directory(self, name: str) -> Path:
        """Where a search of this name is, by default."""
        return self.directory / "search" / name

    def room_for_search(self, name: str, adapters: Sequence[str]) -> tuple[Path, Path | None]:
        """`search_directory`, and where an earlier search over other adapters went, which was there."""
        path = self.search_directory(name)
        if not (path / CONFIG_FILE).is_file():
            return path, None
        if name == AGENT:
            searched = [member.name for member in read_run(path).members]
        else:
            searched = read_config(path, SearchRun).adapters
        if searched == list(adapters):
            return path, None
        for adapter in searched:
            files.inside(path.parent, adapter, path / CONFIG_FILE)
        base = f"{name}-{'+'.join(searched)}"
        if not _SHORT_NAME.fullmatch(base):  # of no directory here
            base = f"{name}-{files.digest(searched)[:16]}"
        kept, number = path.with_name(base), 2
        while kept.exists():
            kept, number = path.with_name(f"{base}-{number}"), number + 1
        with lock.writing(path):
            hosts.wait()  # until all have seen what is there
            if hosts.is_first():
                path.rename(kept)
        return path, kept

    def adapter(self, name: str) -> Adapter:
        """An adapter, under its objective's name."""
        return dataclasses.replace(load_adapter(self.adapter_directory(name), self.base), name=name)

    def adapter_directory(self, name: str) -> Path:
        """Where an adapter is. Names come from the run's files, too.

        Raises:
          InputError: a name that leads out of the run.
        """
        return files.inside(self.directory / OBJECTIVES, name) / ADAPTER
