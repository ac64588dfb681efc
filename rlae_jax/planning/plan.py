"""A plan: whether members fit on a mesh of devices, how fast they could be, and what would help.

In: a `Workload`, a mesh's sizes, a device. Out: a `Plan`, which prints as tables and as JSON. By formula always; for
TPUs the compiler answers on request, for the programs that would run.
"""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.markup
import rich.table

from rlae_jax import hlo, report, sharding
from rlae_jax.errors import InputError
from rlae_jax.planning import formula, tpu
from rlae_jax.planning.devices import Device
from rlae_jax.planning.formula import Limits, Memory, Quantised
from rlae_jax.planning.workload import Workload

GIB = 2**30
USABLE = 0.95  # of a device's memory: runtimes and fragmentation take the rest
_MORE_SHARDS = (2, 4, 8, 16, 32, 64)
_LEAST_ANSWER = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledFigures:
    """What a compiler says of the program, per device."""

    total: int  # bytes
    arguments: int
    temporaries: int  # keys and values included
    cycles_per_step: int
    exchanges_per_step: int
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `make_plan` found; print it with `show`."""

    names: tuple[str, ...]
    workload: Workload
    mesh: Mapping[str, int]
    device: Device
    quantise: Quantised | None
    memory: Memory
    limits: Limits
    iterations: int
    compiled: CompiledFigures | None
    advice: tuple[str, ...]  # of what would fit, where this does not
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes per device at the largest moment: the compiler's where there are any."""
        return self.memory.total if self.compiled is None else self.compiled.total

    @property
    def fits(self) -> bool:
        """Whether a device holds that."""
        return self.total <= USABLE * self.device.memory * GIB

    @property
    def tokens_per_second(self) -> float:
        """Of all rows while they are written, at most."""
        return self.workload.batch / self.limits.step.seconds

    @property
    def spans_per_second(self) -> float:
        """Decisions of a batch, from its prompts to the updated agent, at most."""
        return self.workload.batch * self.workload.spans / self.limits.seconds

    @property
    def hours(self) -> float:
        """Of all iterations, at least."""
        return self.iterations * self.limits.seconds / 3600


def check(names: Sequence[str], workload: Workload, mesh: Mapping[str, int]) -> list[str]:
    """Whether members lie on a mesh of these sizes; what lies on it in an unexpected way is returned.

    Raises:
      InputError: sizes below 1, heads or rows that are not divided, texts longer than a member's context.
    """
    low = [f"{name}={size}" for name, size in mesh.items() if size < 1]
    if low:
        raise InputError(f"a plan's mesh needs whole numbers of at least 1, not {', '.join(low)}")
    abstract: Any = formula.abstract_mesh(**mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, config in zip(names, workload.members, strict=True):
            sharding.check_model(name, config, abstract)
    sharding.check_rows("batch", workload.batch, abstract)
    for name, config in zip(names, workload.members, strict=True):
        text = workload.prompt + workload.new
        if config.encoder is None and text > config.context:
            raise InputError(
                f"{name} was made for texts of {config.context:,} tokens, not {workload.prompt:,} + {workload.new:,}"
            )
    return [str(warning.message) for warning in caught]


def make_plan(
    names: Sequence[str],
    workload: Workload,
    mesh: Mapping[str, int],
    device: Device,
    *,
    quantise: Quantised | None = None,
    iterations: int = 0,
    compiled: bool = False,
) -> Plan:
    """The plan of a workload.

    Args:
      names: what the members are called.
      mesh: sizes of `data` and `model`.
      compiled: also ask the TPU compiler, which takes minutes for large members.

    Raises:
      InputError: see `check`; `compiled` for another device than a TPU, without libtpu, or of quantised members.
    """
    notes = check(names, workload, mesh)
    abstract = formula.abstract_mesh(**mesh)
    held = formula.memory(workload, abstract, quantise)
    plan = Plan(
        names=tuple(names),
        workload=workload,
        mesh=dict(mesh),
        device=device,
        quantise=quantise,
        memory=held,
        limits=formula.limits(workload, abstract, device, quantise),
        iterations=iterations,
        compiled=compile_program(workload, mesh, device, quantise) if compiled else None,
        advice=(),
        notes=tuple(dict.fromkeys(notes)),
    )
    return plan if plan.fits else dataclasses.replace(plan, advice=tuple(_what_fits(plan)))


def compile_program(
    workload: Workload, mesh: Mapping[str, int], device: Device, quantise: Quantised | None = None
) -> CompiledFigures:
    """The TPU compiler's answer, of an iteration of training if there is one and else of generating."""
    if quantise is not None:
        raise InputError("--compile plans members as they are stored in a checkpoint, without --quantise")
    devices = tpu.make_mesh(device.name, mesh[sharding.DATA], mesh[sharding.MODEL])
    lower = workload.lower_generate if workload.train is None else workload.lower_iterate
    began = time.perf_counter()
    program = lower(devices).compile()
    seconds = time.perf_counter() - began
    figures, module = program.memory_analysis(), hlo.parse(program.as_text() or "")
    assert figures is not None
    loop = module.loop_carrying(*workload.cache_shapes(devices))
    assert loop.body is not None
    fresh = figures.output_size_in_bytes - figures.alias_size_in_bytes
    return CompiledFigures(
        total=figures.argument_size_in_bytes + fresh + figures.temp_size_in_bytes,
        arguments=figures.argument_size_in_bytes,
        temporaries=figures.temp_size_in_bytes,
        cycles_per_step=module.cycles(loop.body),
        exchanges_per_step=hlo.collectives(module.inside(loop)).total(),
        compile_seconds=seconds,
    )


def _what_fits(plan: Plan) -> Iterator[str]:
    """Of each way to need less the first that is enough."""
    workload, mesh = plan.workload, dict(plan.mesh)
    room = USABLE * plan.device.memory * GIB

    def needs(workload: Workload, mesh: Mapping[str, int], quantise: Quantised | None) -> int:
        return formula.memory(workload, formula.abstract_mesh(**mesh), quantise).total

    def said(change: str, n: int) -> str:
        return f"{change}: {n / GIB:.1f} GiB per device"

    for size in _MORE_SHARDS:
        wider = mesh | {sharding.MODEL: size}
        whole = all(config.heads % size == 0 for config in workload.members)
        if size > mesh[sharding.MODEL] and whole and (n := needs(workload, wider, plan.quantise)) <= room:
            yield said(f"--mesh {sharding.DATA}={mesh[sharding.DATA]},{sharding.MODEL}={size}", n)
            break
    quantised: tuple[Quantised, ...] = () if any(formula.forms(workload, plan.quantise)) else ("int8", "int4")
    for kind in quantised:
        if (n := needs(workload, mesh, kind)) <= room:
            yield said(f"--quantise {kind}", n)
            break
    batch = workload.batch
    while batch > mesh[sharding.DATA] and batch % (2 * mesh[sharding.DATA]) == 0:
        batch //= 2
        if (n := needs(dataclasses.replace(workload, batch=batch), mesh, plan.quantise)) <= room:
            yield said(f"--batch {batch}", n)
            break
    new = workload.new
    while new > _LEAST_ANSWER:
        new //= 2
        if (n := needs(dataclasses.replace(workload, new=new), mesh, plan.quantise)) <= room:
            yield said(f"--new {new}", n)
            break


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds per device."""
    workload, limits = plan.workload, plan.limits
    return {
        "members": list(plan.names),
        "batch": workload.batch,
        "prompt": workload.prompt,
        "new": workload.new,
        "union": workload.union,
        "adapters": workload.adapters,
        "train": None if workload.train is None else workload.train.algorithm,
        "quantise": plan.quantise,
        "mesh": dict(plan.mesh),
        "device": dataclasses.asdict(plan.device),
        "bytes": {
            "parameters": plan.memory.parameters,
            "agent": plan.memory.agent,
            "cache": plan.memory.cache,
            "observations": plan.memory.observations,
            "moments": {name: moment._asdict() for name, moment in plan.memory.moments.items()},
            "total": plan.memory.total,
        },
        "compiled": None if plan.compiled is None else dataclasses.asdict(plan.compiled),
        "fits": plan.fits,
        "advice": list(plan.advice),
        "seconds": {
            "reading": limits.reading._asdict(),
            "step": limits.step._asdict(),
            "learning": limits.learning._asdict(),
            "batch": limits.seconds,
        },
        "tokens_per_second": plan.tokens_per_second,
        "spans_per_second": plan.spans_per_second,
        "iterations": plan.iterations,
        "hours": plan.hours,
        "notes": list(plan.notes),
    }


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}" if n >= 0.005 * GIB else f"{n / 2**20:.1f} MiB" if n else "-"


def _seconds(t: float) -> str:
    return f"{t:,.1f} s" if t >= 1 else f"{1e3 * t:.3g} ms"


def tables(plan: Plan) -> list[rich.console.RenderableType]:
    """What each device holds, how fast it could be, what would help."""
    workload, limits, device = plan.workload, plan.limits, plan.device
    count = plan.mesh[sharding.DATA] * plan.mesh[sharding.MODEL]
    where = f"{count} x {device.name}" if count > 1 else device.name
    sizes = sharding.as_text(plan.mesh)
    held = rich.table.Table(title=f"{' + '.join(map(rich.markup.escape, plan.names))} on {where} ({sizes})")
    held.add_column("GiB on each device")
    for column in ("held", "temporary", "together"):
        held.add_column(column, justify="right", no_wrap=True)
    base = plan.memory.parameters + plan.memory.agent
    forms = [form for form in dict.fromkeys(formula.forms(workload, plan.quantise)) if form]
    held.add_row(", ".join(["parameters", *forms]), _gib(plan.memory.parameters), "", "")
    if workload.train is not None:
        held.add_row("agent and optimiser", _gib(plan.memory.agent), "", "")
    held.add_section()
    for name, moment in plan.memory.moments.items():
        what = "observations" if moment is plan.memory.learning else "keys and values"
        held.add_row(f"{name}: {what}", *map(_gib, (moment.held, moment.temporaries, base + moment.total)))
    if plan.compiled is not None:
        held.add_section()
        figures = plan.compiled
        held.add_row("compiled", *map(_gib, (figures.arguments, figures.temporaries, figures.total)))
    held.add_section()
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    held.add_row(f"of {device.memory:g}, {USABLE:.0%} usable", "", verdict, _gib(plan.total))

    fast = rich.table.Table(title="at best", show_header=False)
    fast.add_column("")
    fast.add_column("", justify="right", no_wrap=True)
    fast.add_column("")
    rows = f"{workload.batch} x {workload.prompt:,} + {workload.new:,} tokens"
    fast.add_row(f"reading the prompts, {rows}", _seconds(limits.reading.seconds), _waits(limits.reading.bound))
    fast.add_row("a step of all rows", _seconds(limits.step.seconds), _waits(limits.step.bound))
    if plan.compiled is not None and device.clock:
        cycles = plan.compiled.cycles_per_step
        compiled = f"{cycles:,} cycles, {plan.compiled.exchanges_per_step} exchanges"
        fast.add_row("the compiler's step", _seconds(cycles / (device.clock * 1e9)), compiled)
    fast.add_row("tokens per second", f"{plan.tokens_per_second:,.0f}", "of all rows, while writing")
    if workload.train is not None:
        fast.add_row("learning", _seconds(limits.learning.seconds), _waits(limits.learning.bound))
        fast.add_row("spans per second", f"{plan.spans_per_second:,.0f}", "")
        parts = {
            "reading": limits.reading.seconds,
            "writing": limits.steps * limits.step.seconds,
            "learning": limits.learning.seconds,
        }
        share = ", ".join(f"{name} {part / limits.seconds:.0%}" for name, part in parts.items())
        fast.add_row(f"{plan.iterations} iterations", f"{plan.hours:.3g} h", share)
    lines = [f"would fit: {rich.markup.escape(line)}" for line in plan.advice]
    if not plan.fits and not plan.advice:
        lines = ["nothing that was tried alone would fit: more shards, fewer bits, fewer rows, shorter answers"]
    lines += [f"[yellow]note:[/yellow] {rich.markup.escape(line)}" for line in plan.notes]
    return [held, fast, *lines]


def _waits(bound: str) -> str:
    return f"waits for {bound}"


def show(plan: Plan) -> None:
    """Prints `tables` to the console."""
    for part in tables(plan):
        report.console.print(part)
