"""Options that several commands have, as dataclasses which a command takes whole and tyro flattens into its flags.

    def train(*, model: Annotated[TrainModels, OmitArgPrefixes], task: TaskFlags, ...):
        ensemble = model.load()

A command that offers less, or says more, narrows a field in a subclass of its own.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count, CountOr0, Seed

if TYPE_CHECKING:
    from rlae_jax.config import PPOConfig
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.tasks import Task

Models = Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]")]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class HeldOptions:
    """How weights, keys and values are held."""

    quantise: Literal["int8", "int4", "fp8"] | None = None
    """kernels of linear layers in fewer bits: int8 or fp8 with a scale per output, int4 with a scale per group of
    inputs (but for the kernels of values: int8). Default: as the checkpoint has them."""
    quantise_head: bool = False
    """the output head and the embedding table, too (int8 with int4)."""
    quantise_group: Literal[32, 64, 128] = 32
    """inputs that share a scale of int4, or the next smaller of these that divides a layer's inputs."""
    kv_dtype: Literal["int8", "fp8"] | None = None
    """keys and values in 8 bits, with a scale per token and head. Default: as --dtype."""
    check_finite: bool = True
    """refuse weights with a NaN or an infinity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberOptions:
    """Which models."""

    models: Models
    """Hugging Face directories, GGUF files or Hub ids (org/name)."""
    end_ids: Annotated[tuple[str, ...], arg(metavar="IDS [IDS ...]")] = ()
    """ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own."""
    dtype: Dtype = "float32"
    """of the parameters."""
    held: Annotated[HeldOptions, OmitArgPrefixes]

    def require_models(self) -> None:
        """Raises an `InputError` where none is given."""
        if not self.models:
            raise InputError("no models: give at least one directory or Hub id with --models")

    def read_end_ids(self, members: int) -> list[list[int]] | None:
        """--end-ids as lists of ids; None where there are none.

        Raises:
          InputError: what is no id; neither one list nor one per member.
        """
        if not self.end_ids:
            return None
        lists = []
        for text in self.end_ids:
            if not all(text.split(",")):
                raise InputError(f"--end-ids {text!r}: expected ids with commas between them, such as 50256 or 1,2")
            lists.append(
                [
                    ranges.read(part, CountOr0, f"--end-ids {text!r}, ids such as 50256 or 1,2: ")
                    for part in text.split(",")
                ]
            )
        if len(lists) not in (1, members):
            raise InputError(
                f"--end-ids: {len(lists)} lists for {members} members; give one per member, such as "
                f"--end-ids {' '.join(['1,2', *['0'] * (members - 1)])}"
            )
        return lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(MemberOptions):
    """Which models, and how they are fused."""

    adapters: Annotated[tuple[str, ...], arg(metavar="ADAPTER [ADAPTER ...]")] = ()
    """PEFT adapters (directories or Hub ids) of the one model given; each becomes a member."""
    fusion: Annotated[str, arg(metavar="NAME")] = "linear"
    """linear = mean of probabilities, loglinear = weighted mean of log-probabilities, topk[:k] = linear over each
    member's k (10) best tokens, primary[:member] = over the best of one member (0), proxy[:alpha] = the first of three
    members + alpha (1) * (second - third), in log-probabilities, hidden = sum of last hidden states, for --adapters."""

    def load(self) -> "Ensemble":
        """The ensemble.

        Raises:
          InputError: options that do not go together; what `load` and `Ensemble` raise.
        """
        from rlae_jax.fusion.codec import same_tokenizer
        from rlae_jax.fusion.ensemble import Ensemble
        from rlae_jax.fusion.operators import get_operator
        from rlae_jax.models import load

        self.require_models()
        if self.adapters and len(self.models) > 1:
            raise InputError(f"--adapters needs one base model, not {len(self.models)}")
        if self.fusion == "hidden" and not self.adapters:
            raise InputError("--fusion hidden sums states that one head reads: of --adapters of one model")
        count = len(self.adapters or self.models)
        lists = self.read_end_ids(count)
        get_operator(self.fusion, count)  # tells now, not after reading gigabytes
        of_all = None if lists is None else [i for ids in lists for i in ids]
        if self.adapters:
            base = load(self.models[0], dtype=self.dtype, **dataclasses.asdict(self.held))
            return Ensemble.from_adapters(base, self.adapters, self.fusion, end_ids=of_all)
        members = [load(model, dtype=self.dtype, **dataclasses.asdict(self.held)) for model in self.models]
        return Ensemble(members, self.fusion, end_ids=of_all if same_tokenizer(members) else lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TaskOptions:
    """Prompts, references and reward."""

    task: str | tuple[str, ...] | None = None
    data: Path | None = None
    """A file instead: JSON lines, a JSON list, .csv or .tsv, or one of them gzipped; split 80/10/10 by the prompts'
    content."""
    prompt_field: str = "prompt"
    """The prompt's field in the file."""
    answer_field: str = "answer"
    """The answer's field in the file, or a path such as answers.text; in JSON it may be a list, of which any counts."""
    reward: str | None = None
    """exact_match, last_number, gsm8k, multiple_choice, token_f1, squad_match, triviaqa_match, math_equivalence, or
    your own module:function (or file.py:function) of a text and a reference; or likelihood: nothing is written, but how
    likely the right answers are (of a benchmark its worked ones) is what agents learn from, and are evaluated by, in
    bits per byte; of multiple choice (mmlu, arc_challenge, piqa) the likeliest option is the answer. Default: the
    benchmark's; exact_match for a file."""
    text_field: str | None = None
    """With --reward likelihood: the file's rows are texts without prompts, in this field."""
    cut: Annotated[str | None, arg(metavar="RULE")] = None
    """With --reward likelihood and models of different tokenizers: how texts are cut into entries of the union.
    own[:K] = as model K's (0) tokenizer cuts them, longest = the longest entry from the left. Default: own; evaluate:
    all of them, reported apart."""
    data_dir: Path | None = None
    """A directory with the benchmark's files, NAME/SPLIT.jsonl; otherwise it comes from the Hub."""
    shots: CountOr0 | None = None
    """Examples before each question of a benchmark. Default: what suits it."""
    chat: bool = False
    """Prompts go through the models' chat templates."""
    max_new_tokens: Count | None = None
    """The longest answer. Default: the task's."""
    max_prompt_tokens: Count | None = None
    """Leave out prompts that have more tokens for some model, and say how many. Default: none is left out, and one
    that does not fit is an error."""

    def _load(self, name: str | None) -> "Task":
        """The task of this name or of the file, with what was given changed."""
        from rlae_jax.tasks import LIKELIHOOD, get_task, jsonl

        if (name is None) == (self.data is None):
            both = "" if name is None else ", not both"
            raise InputError(f"give either --task NAME (try skills) or --data FILE.jsonl{both}")
        if self.data is not None:
            foreign = [name for name in ("data_dir", "shots") if getattr(self, name) is not None]
            if foreign:
                raise InputError(f"--{foreign[0].replace('_', '-')} belongs to a benchmark, not to --data")
            task = jsonl(
                self.data,
                prompt_field=self.prompt_field,
                answer_field=self.answer_field,
                reward="exact_match" if self.reward is None else self.reward,
                chat=self.chat,
                text_field=self.text_field,
            )
        else:
            assert name is not None
            if self.text_field is not None:
                raise InputError("--text-field belongs to --data, not to a task")
            options = {option: getattr(self, option) for option in ("reward", "data_dir", "shots")}
            options = {option: value for option, value in options.items() if value is not None}
            task = get_task(name, **options | ({"chat": True} if self.chat else {}))
        if self.cut is not None:
            if self.reward != LIKELIHOOD:
                raise InputError(f"--cut is of texts that are read: give --reward {LIKELIHOOD}, too")
            task = dataclasses.replace(task, cut=self.cut)
        if self.max_new_tokens is not None:
            task = dataclasses.replace(task, max_new_tokens=self.max_new_tokens)
        return task

    def select(self, task: "Task", ensemble: "Ensemble") -> "Task":
        """The task without prompts that are longer than --max-prompt-tokens.

        Raises:
          InputError: none is left of a split.
        """
        from rlae_jax import report

        most = self.max_prompt_tokens
        if most is None:
            return task
        if self.text_field is not None:
            raise InputError("--max-prompt-tokens is of prompts, and texts alone have none")
        rows = {}
        for split, examples in task.splits.items():
            lengths = ensemble.lengths(ensemble.encode(examples.prompts, chat=task.chat)) if len(examples) else []
            rows[split] = [i for i, length in enumerate(lengths) if length <= most]
        for split, kept in rows.items():
            if task.splits[split].prompts and not kept:
                raise InputError(f"no {split} prompt has at most {most} tokens; give a larger number, or fewer --shots")
        counts = [(len(task.splits[split]), len(kept), split) for split, kept in rows.items()]
        left_out = [f"{n - kept} of {n} {split}" for n, kept, split in counts]
        if any(n > kept for n, kept, _ in counts):
            report.say(f"left out, as longer than {most} tokens: {', '.join(left_out)} prompts")
        return task.select(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(_TaskOptions):
    """Prompts, references and reward."""

    task: str | None = None
    """An embedded task (skills, overlap, skills3, mixed, noisy, twins, dominant; circle and circle_held, _long, _three,
    _turned, _digits) or a benchmark (gsm8k, mmlu, arc_challenge, piqa, triviaqa, natural_questions)."""

    def load(self) -> "Task":
        """The task, with what was given changed.

        Raises:
          InputError: neither a task nor a file, or both; what `get_task` and `jsonl` raise.
        """
        return self._load(self.task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksOptions(_TaskOptions):
    """Prompts, references and rewards of one or several tasks; what else is given goes for all of them."""

    task: Annotated[tuple[str, ...], arg(metavar="TASK [TASK ...]")] = ()
    """Embedded tasks (skills, overlap, skills3, mixed, noisy, twins, dominant; circle and circle_held, _long, _three,
    _turned, _digits) or benchmarks (gsm8k, mmlu, arc_challenge, piqa, triviaqa, natural_questions)."""

    def load_all(self) -> "list[Task]":
        """The tasks, with what was given changed.

        Raises:
          InputError: neither tasks nor a file, or both; what `get_task` and `jsonl` raise.
        """
        return [self._load(name) for name in self.task or (None,)]


TaskFlags = Annotated[TaskOptions, OmitArgPrefixes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """How an agent is trained.

    A subclass's fields are named as those of `PPOConfig` and of its `AgentConfig`; None takes the preset's.
    """

    algo: Literal["ppo", "mappo"] = "ppo"
    """ppo = one agent sets all weights, mappo = one agent per member sets its own."""
    agent: Literal["joint", "set"] = "joint"
    """joint = the agent knows members by their places, set = by what it reads of them, so that it can be used with more
    members than it was trained with, in another order, and with others."""
    preset: Literal["demo", "paper"] = "demo"
    """demo = quick steps for small models, paper = the published figures of RLAE."""
    iterations: Count | None = None
    """rollouts, each followed by updates. Default: the preset's."""
    seed: Seed = 0
    """of everything random."""

    def config(self) -> "PPOConfig":
        """The settings.

        Raises:
          InputError: values that are out of range, or do not go together.
        """
        from rlae_jax.config import ALGORITHMS, NETWORKS, AgentConfig

        preset = getattr(ALGORITHMS[self.algo], self.preset)
        changes = {
            name: value
            for name, value in vars(self).items()
            if name not in ("algo", "agent", "preset") and value is not None
        }
        of_agent = {"network": self.agent, **NETWORKS[self.agent]}
        of_agent |= {f.name: changes.pop(f.name) for f in dataclasses.fields(AgentConfig) if f.name in changes}
        config: PPOConfig = preset(**changes, agent=dataclasses.replace(preset().agent, **of_agent))
        return config
