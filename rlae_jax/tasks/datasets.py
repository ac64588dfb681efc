"""Published benchmarks as tasks, from files on disk or from the Hub.

A benchmark is one record of `BENCHMARKS`: where its splits are, how a row becomes a question with its answer, and how
questions are put to a model. Prompts are blocks with an empty line between: an instruction, examples with their
answers (shots), the question. They look like

    Question: ...
    Answer:

and end without white space. What continues them starts with a space, here and in the shots' own answers, so that a
tokenizer sees the same words in both; rewards do not mind a missing one. With chat templates the continuation is a
message of its own and starts without.

Splits. Where train and test are at hand, test is the published one (or the published validation split, where test
answers are kept back), and dev is the published one or else is dealt from train by content. Where only one is at hand
it is dealt into three by content. A question of test stands in no other split, nor one of dev in train. Shots come from
train, or from a split that is published for them, and stand in no split.
"""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.tasks.base import SPLITS, Examples, Task
from rlae_jax.tasks.jsonl import content_hash, deal, split_of, template_fields
from rlae_jax.tasks.rewards import LETTERS, LIKELIHOOD, Reference, get_reward
from rlae_jax.tasks.rows import SUFFIXES, Findings, Row, read_rows
from rlae_jax.worker_script import described

_FIELDS = ("question", "options", "subject")


class Item(NamedTuple):
    """A question and its answer.

    Attributes:
      answer: what is right; for multiple choice a letter.
      worked: the answer as a shot gives it.
      choices: the texts of multiple choice.
      subject: of the question, where a benchmark has several.
    """

    question: str
    answer: Reference
    worked: str
    choices: tuple[str, ...] = ()
    subject: str = ""


class Layout(NamedTuple):
    """Columns in which a benchmark is found, and how to read a row of them. `read` may raise `ValueError`."""

    columns: tuple[str, ...]
    read: Callable[[Row], Item]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published data set and how it is put to a model.

    Attributes:
      hub, config: the Hub's id, and the name of the part that is used.
      splits: "train", "dev", "test" and "shots" to the names that they go by: the first on the Hub, any as a file.
      layouts: the first whose columns are there is used.
      instruction: the first block of a prompt; {about} is " about SUBJECT" or nothing.
      template: the block of a question; {question}, {options} (a line each: "A. ..."), {subject}.
      likelihood_template: the block where the texts of the options are compared rather than letters asked for.
      shots: how many examples a prompt has unless told otherwise.
    """

    hub: str
    config: str | None
    splits: Mapping[str, tuple[str, ...]]
    layouts: tuple[Layout, ...]
    reward: str
    max_new_tokens: int
    span_length: int
    stop: tuple[str, ...]
    instruction: str
    template: str = "Question: {question}\nAnswer:"
    likelihood_template: str | None = None
    shots: int = 5


def _read_gsm8k(row: Row) -> Item:
    steps, mark, answer = _text(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("its answer has no '#### NUMBER'")
    # Between << and >> stands what a calculator would be asked.
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    return Item(_text(row, "question"), answer.strip(), f"{steps}\n#### {answer.strip()}")


def _read_open(row: Row) -> Item:
    """Any of several short answers; TriviaQA's on the Hub are a dictionary."""
    answer = row["answer"]
    if isinstance(answer, dict):
        answer = [answer.get("value"), *answer.get("aliases", ())]
    answers = [answer] if isinstance(answer, str) else answer
    kept = tuple(dict.fromkeys(one for one in answers or () if isinstance(one, str) and one.strip()))
    if not kept:
        raise ValueError("it has no answer")
    return Item(_text(row, "question"), kept, kept[0])


def _choice(question: str, choices: Sequence[Any], place: int, subject: str = "") -> Item:
    texts = tuple(str(choice).strip() for choice in choices)
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"it has {len(texts)} options; expected 2 to {len(LETTERS)}")
    if not 0 <= place < len(texts):
        raise ValueError("its answer is none of its options")
    return Item(question, LETTERS[place], LETTERS[place], texts, subject.replace("_", " ").strip())


def _place(label: Any) -> int:
    """Of an option that is named by a letter, or by a number from 1 as some rows of ARC do."""
    label = str(label).strip().upper()
    if label.isdecimal():
        return int(label) - 1
    return LETTERS.find(label) if len(label) == 1 else -1


def _read_lettered(row: Row) -> Item:
    """One column per option."""
    choices = [row[letter] for letter in LETTERS if row.get(letter) is not None]
    subject = row.get("domain") or row.get("subject") or ""
    return _choice(_text(row, "question"), choices, _place(row["answer"]), str(subject))


def _read_mmlu(row: Row) -> Item:
    return _choice(_text(row, "question"), row["choices"], int(row["answer"]), str(row.get("subject") or ""))


def _read_arc(row: Row) -> Item:
    labels, texts = ([str(one) for one in row["choices"][key]] for key in ("label", "text"))
    if row["answerKey"] not in labels:
        raise ValueError("its answer is none of its options")
    return _choice(_text(row, "question"), texts, labels.index(row["answerKey"]))


def _read_piqa(row: Row) -> Item:
    return _choice(_text(row, "goal"), [row["sol1"], row["sol2"]], int(row["label"]))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {column} is {'empty' if isinstance(value, str) else 'no text'}")
    return value.strip()


_LETTERED = Layout(("question", "A", "B", "answer"), _read_lettered)
_OPEN = Layout(("question", "answer"), _read_open)
_CHOICES_TEMPLATE = "Question: {question}\n{options}\nAnswer:"
_CHOICES_INSTRUCTION = "The following are multiple choice questions (with answers){about}."
_OPEN_INSTRUCTION = "Answer each question with a name, a number or a few words."

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        hub="openai/gsm8k",
        config="main",
        splits={"train": ("train",), "test": ("test",)},
        layouts=(Layout(("question", "answer"), _read_gsm8k),),
        reward="gsm8k",
        max_new_tokens=256,
        span_length=8,
        # Worked answers have lines of their own.
        stop=("\nQuestion:",),
        instruction="Solve each problem step by step. End with #### and the answer as a number.",
    ),
    "mmlu": Benchmark(
        hub="cais/mmlu",
        config="all",
        splits={"train": ("auxiliary_train",), "dev": ("validation", "val"), "test": ("test",), "shots": ("dev",)},
        layouts=(Layout(("question", "choices", "answer"), _read_mmlu), _LETTERED),
        reward="multiple_choice",
        max_new_tokens=8,
        span_length=4,
        stop=("\n",),
        instruction=_CHOICES_INSTRUCTION,
        # No template for likelihoods: its questions often need the options to be seen, so that letters are compared.
        template=_CHOICES_TEMPLATE,
    ),
    "arc_challenge": Benchmark(
        hub="allenai/ai2_arc",
        config="ARC-Challenge",
        splits={"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)},
        layouts=(Layout(("question", "choices", "answerKey"), _read_arc), _LETTERED),
        reward="multiple_choice",
        max_new_tokens=8,
        span_length=4,
        stop=("\n",),
        instruction=_CHOICES_INSTRUCTION,
        template=_CHOICES_TEMPLATE,
        likelihood_template="Question: {question}\nAnswer:",
    ),
    "piqa": Benchmark(
        # The original, ybisk/piqa, is a script, which is never run.
        hub="baber/piqa",
        config=None,
        # Test answers are kept back.
        splits={"train": ("train",), "test": ("validation", "dev")},
        layouts=(Layout(("goal", "sol1", "sol2", "label"), _read_piqa), _LETTERED),
        reward="multiple_choice",
        max_new_tokens=8,
        span_length=4,
        stop=("\n",),
        instruction=_CHOICES_INSTRUCTION,
        template=_CHOICES_TEMPLATE,
        likelihood_template="Question: {question}\nAnswer:",
    ),
    "triviaqa": Benchmark(
        hub="mandarjoshi/trivia_qa",
        config="rc.nocontext",
        # Test answers are kept back.
        splits={"train": ("train",), "test": ("validation", "dev")},
        layouts=(_OPEN,),
        reward="triviaqa_match",
        max_new_tokens=24,
        span_length=4,
        stop=("\n",),
        instruction=_OPEN_INSTRUCTION,
    ),
    "natural_questions": Benchmark(
        hub="google-research-datasets/nq_open",
        config=None,
        # The open variant calls its test split validation.
        splits={"train": ("train",), "test": ("validation", "dev", "test")},
        layouts=(_OPEN,),
        reward="squad_match",
        max_new_tokens=24,
        span_length=4,
        stop=("\n",),
        instruction=_OPEN_INSTRUCTION,
    ),
}


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    subset: str | None = None,
    shots: int | None = None,
    template: str | None = None,
    chat: bool = False,
    reward: str | None = None,
    limit: int = 20_000,
) -> Task:
    """A benchmark as a task.

    Args:
      name: one of `BENCHMARKS`.
      data_dir: a directory with files such as train.jsonl and test.jsonl (or .csv, or SUBJECT_test.jsonl), or one with
        a directory of the benchmark's name; nothing is fetched then. None: the Hub, or what is cached of it.
      subset: one subject of mmlu, such as "world_religions".
      shots: examples in each prompt; by default what the benchmark's record says, and none with `chat`.
      template: instead of the record's; {question}, {options}, {subject}.
      chat: prompts are messages for the members' chat templates.
      reward: a name of `REWARDS`, "math_equivalence", "module:function", or "likelihood": nothing is sampled, and
        of multiple choice the likeliest option counts, of others how likely the (worked) answer is.
      limit: most training questions that are kept, the same ones whatever their order.

    Raises:
      InputError: an unknown benchmark, subset or reward; no files, or the Hub cannot be reached and nothing is cached;
        columns that are not there, unusable rows; too few examples for the shots.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; use one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    by_likelihood = reward == LIKELIHOOD
    reward_function = get_reward(benchmark.reward if reward is None or by_likelihood else reward)
    n_shots = (0 if chat else benchmark.shots) if shots is None else shots
    if n_shots < 0 or limit < 1:
        raise InputError(f"a task needs 0 shots or more and a limit above 0, not {n_shots} and {limit}")
    compares_texts = by_likelihood and benchmark.likelihood_template is not None
    form = _Form(
        # A plain question, as it is continued in ordinary text.
        "" if compares_texts else benchmark.instruction,
        _checked_template(template)
        or (benchmark.likelihood_template if compares_texts else None)
        or benchmark.template,
        compares_texts,
        chat,
    )
    reads_texts = by_likelihood and benchmark.reward != "multiple_choice"
    by_role = _from_hub(name, benchmark) if data_dir is None else _from_files(name, benchmark, Path(data_dir))
    if subset is not None:
        by_role = _only(name, by_role, subset)
    splits, examples = _deal(name, by_role, n_shots, limit)

    def make(items: Sequence[Item]) -> Examples:
        return Examples(
            [form.prompt(item, examples(item)) for item in items],
            [form.text(item) for item in items] if reads_texts else [item.answer for item in items],
            [form.options(item) for item in items] if benchmark.reward == "multiple_choice" else None,
        )

    return Task(
        name if subset is None else f"{name}:{subset}",
        {split: make(items) for split, items in splits.items()},
        reward_function,
        max_new_tokens=benchmark.max_new_tokens,
        span_length=benchmark.span_length,
        # A chat model ends its message itself, and may well begin it with a line of its own.
        stop=() if chat else benchmark.stop,
        chat=chat,
        by_likelihood=by_likelihood,
    )


@dataclasses.dataclass(frozen=True)
class _Form:
    """How items are written down."""

    instruction: str
    template: str
    compares_texts: bool
    chat: bool

    def prompt(self, item: Item, shots: Sequence[Item]) -> str:
        about = f" about {item.subject}" if item.subject else ""
        blocks = [self.instruction.format(about=about)] if self.instruction else []
        blocks += [self._block(shot) + self._gap + self._answer(shot) for shot in shots]
        return "\n\n".join([*blocks, self._block(item)])

    def options(self, item: Item) -> tuple[str, ...]:
        """What may follow a prompt."""
        gap = "" if self.chat else self._gap
        return tuple(gap + (text if self.compares_texts else LETTERS[i]) for i, text in enumerate(item.choices))

    def text(self, item: Item) -> str:
        """An answer as it may follow a prompt, with its steps if it has some."""
        return ("" if self.chat else self._gap) + self._answer(item)

    def _block(self, item: Item) -> str:
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False))
        return self.template.format_map({"question": item.question, "options": options, "subject": item.subject})

    @property
    def _gap(self) -> str:
        return "" if self.template[-1:].isspace() else " "

    def _answer(self, item: Item) -> str:
        return item.choices[LETTERS.index(item.worked)] if self.compares_texts else item.worked


def _checked_template(template: str | None) -> str | None:
    if template is None:
        return None
    fields = template_fields(template)
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise InputError(f"template {template!r}: there is no {{{unknown[0]}}}; use {', '.join(_FIELDS)}")
    if "question" not in fields:
        raise InputError(f"template {template!r}: it lacks {{question}}")
    return template


def _from_files(name: str, benchmark: Benchmark, directory: Path) -> dict[str, list[Item]]:
    """The items of every split that has files."""
    directory = directory / name if (directory / name).is_dir() else directory
    if not directory.is_dir():
        raise InputError(f"{name}: there is no directory {directory}")
    by_role = {}
    for role, names in benchmark.splits.items():
        paths = [
            path
            for stem in names
            for suffix in (form + packed for form in SUFFIXES for packed in ("", ".gz"))
            for path in (directory / f"{stem}{suffix}", *sorted(directory.glob(f"*_{stem}{suffix}")))
            if path.is_file()
        ]
        items: list[Item] = []
        for path in paths:
            rows, findings = read_rows(path)
            columns = list(dict.fromkeys(column for _, row in rows for column in row))
            items += _items(str(path), benchmark, columns, rows, findings)
        if items:
            by_role[role] = items
    if not by_role.keys() & {"train", "test"}:
        wanted = ", ".join(f"{stem}.jsonl" for role in ("train", "test") for stem in benchmark.splits[role])
        present = sorted(path.name for path in directory.iterdir())
        listing = ", ".join(present[:10]) + (", ..." if len(present) > 10 else "") or "nothing"
        raise InputError(f"{name}: no examples in {directory}; expected one of {wanted} (or .csv), found {listing}")
    return by_role


def _from_hub(name: str, benchmark: Benchmark) -> dict[str, list[Item]]:
    # Takes a second and more, and is not needed for files.
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one try after another, each in two lines

    by_role = {}
    for role, names in benchmark.splits.items():
        where = f"{benchmark.hub}{f' ({benchmark.config})' if benchmark.config else ''}, split {names[0]}"
        try:
            data = datasets.load_dataset(benchmark.hub, benchmark.config, split=names[0])
        except Exception as error:
            # Of many kinds: no network, no cache, an unknown split, a server's refusal, a full disk.
            raise InputError(
                f"{name}: {where} cannot be loaded from the Hub ({described(error)}); "
                "if this machine is offline, give a directory with its files"
            ) from error
        located = ((f"row {number}", row) for number, row in enumerate(data))
        by_role[role] = _items(where, benchmark, list(data.column_names), located, [])
    return by_role


def _items(where: str, benchmark: Benchmark, columns: Sequence[str], rows: Any, findings: Findings) -> list[Item]:
    layout = next((one for one in benchmark.layouts if set(one.columns) <= set(columns)), None)
    items = []
    if layout is not None:
        for place, row in rows:
            try:
                items.append(layout.read(row))
            except KeyError as error:
                findings.append(("rows that lack a column", f"{place} has no {error.args[0]!r}"))
            except (ValueError, TypeError, OverflowError) as error:
                findings.append(("rows that are no question with its answer", f"{place} ({error})"))
    if findings:
        raise grouped_error(f"{where}: unusable rows", findings)
    if layout is None:
        wanted = " or ".join(", ".join(one.columns) for one in benchmark.layouts)
        raise InputError(f"{where}: it lacks columns; needed are {wanted}, it has {', '.join(columns) or 'none'}")
    return items


def _only(name: str, by_role: Mapping[str, list[Item]], subset: str) -> dict[str, list[Item]]:
    """The items of one subject. Training questions of no subject are for all."""
    subject = subset.replace("_", " ")
    subjects = {item.subject for items in by_role.values() for item in items if item.subject}
    if subject not in subjects:
        has = f"use one of {', '.join(sorted(subjects))}" if subjects else f"{name} has none"
        raise InputError(f"{name}: subset {subset!r} is unknown; {has}")
    kept = {role: [item for item in items if item.subject in ("", subject)] for role, items in by_role.items()}
    return {role: items for role, items in kept.items() if items}


def _deal(
    name: str, by_role: Mapping[str, list[Item]], shots: int, limit: int
) -> tuple[dict[str, list[Item]], Callable[[Item], Sequence[Item]]]:
    """The three splits, and which shots go before an item."""
    if "train" in by_role and "test" in by_role:
        tested = _contents(by_role["test"])
        train = [item for item in by_role["train"] if content_hash(item.question) not in tested]
        if "dev" in by_role:
            dev = [item for item in by_role["dev"] if content_hash(item.question) not in tested]
        else:
            dev = [item for item in train if split_of(item.question) == "dev"]
            if not dev and len(_contents(train)) > 1:  # of few
                least = min(map(content_hash, (item.question for item in train)))
                dev = [item for item in train if content_hash(item.question) == least]
        splits = {"train": train, "dev": dev, "test": by_role["test"]}
    else:
        splits = {split: [] for split in SPLITS}
        items = by_role.get("test") or by_role["train"]
        for item, split in zip(items, deal([item.question for item in items]), strict=True):
            splits[split].append(item)
    tested, choosing = _contents(splits["test"]), _contents(splits["dev"])
    splits["train"] = [item for item in splits["train"] if content_hash(item.question) not in choosing]

    pool = [item for item in by_role.get("shots", ()) if content_hash(item.question) not in tested | choosing]
    pool = pool or splits["train"][:shots]
    if len(pool) < shots:
        raise InputError(f"{name}: {shots} shots need as many examples to show, there are {len(pool)}")

    @functools.cache
    def of_subject(subject: str) -> Sequence[Item]:
        own = [item for item in pool if item.subject == subject]
        return (own if len(own) >= shots else own + [item for item in pool if item.subject != subject])[:shots]

    shown = _contents(pool) if shots else set()
    train = [item for item in splits["train"] if content_hash(item.question) not in shown]
    # The least hashes: a sample that does not depend on the order, kept in the order of the file.
    bound = sorted(content_hash(item.question) for item in train)[limit - 1 : limit]
    splits["train"] = [item for item in train if not bound or content_hash(item.question) <= bound[0]]
    return splits, lambda item: of_subject(item.subject)


def _contents(items: Sequence[Item]) -> set[int]:
    return {content_hash(item.question) for item in items}
