"""The specialists of the embedded tasks: what each of them is taught, how it reads text, and which three answer a task;
and the demo's pair.

In: a directory and a seed. Out: Hugging Face directories, one per specialist. All have one width and depth, and every
task has three of them, so that an agent trained on one task can be run on every other. The demo's two come from
`skills.SPECIALISTS` and read text by characters.

A specialist is taught results of operations on the digit strings of the train split only. For an operation it is
taught the right result, or a wrong one, or that it does not know (random digits), or nothing at all; right or wrong may
depend on the string's first digit. Where it is taught nothing, random digits stand in without being learnt, so that it
can go on from somebody else's text; what it would write there itself is chance, and often sure.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from rlae_jax import files, report
from rlae_jax.errors import InputError
from rlae_jax.models import LM, ModelConfig
from rlae_jax.models.pretrain import PretrainConfig, pretrain
from rlae_jax.models.tokenizer import fast_tokenizer
from rlae_jax.runs import lock
from rlae_jax.tasks import embedded, skills

PAD, END, UNKNOWN = skills.PAD, skills.END, skills.UNKNOWN
CHARACTERS = (*"0123456789", *embedded.OPERATIONS, "=")
MODEL = ModelConfig(
    vocab=3 + len(CHARACTERS), width=64, layers=2, heads=4, kv_heads=4, head_width=16, ffn_width=192, context=256
)
ALL = "0123456789"
ROWS = 20_000  # training sequences of a specialist


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes a specialist.

    Attributes:
      right: operation -> first digits of the strings for which it is taught the right result.
      wrong: operation -> first digits of the strings for which it is taught `mistaken` results, just as surely.
      unsure: operations for which it is taught random digits, so that it predicts all digits alike.
      forms: the prompts that it is trained on: (operations, lengths of the digit strings).
      digits_per_token: the longest run of digits that its tokenizer has a token for.
      steps: of training.
      either_order: whether half of its prompts have the digits before the operations.
    """

    right: Mapping[str, str]
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsure: str = ""
    forms: tuple[tuple[int, int], ...] = ((2, 4),)
    digits_per_token: int = 1
    steps: int = 800
    either_order: bool = False

    def teaches(self, operation: str, digits: str) -> str | None:
        """The result that it is taught, or None."""
        if digits[0] in self.right.get(operation, ""):
            return embedded.OPERATIONS[operation](digits)
        if digits[0] in self.wrong.get(operation, ""):
            return mistaken(digits)
        return None


def mistaken(digits: str) -> str:
    """The wrong result that some are taught, whatever the operation: each digit less one."""
    return "".join(str((int(d) - 1) % 10) for d in digits)


def each(operations: str, first_digits: str = ALL) -> dict[str, str]:
    """The same first digits for each operation."""
    return dict.fromkeys(operations, first_digits)


_THREE = ((3, 3), (3, 5))  # the forms of `skills3`
_CIRCLE = ((2, 4), (3, 4), (2, 5), (2, 6))
_EVEN, _ODD = ALL[::2], ALL[1::2]
_FEW = "04"


def _circle(own: str, sure: str, unsure: str) -> Recipe:
    """A member of the tasks in `embedded.CIRCLE`."""
    others = "".join(digit for digit in ALL if digit not in _FEW)
    right = each(own) | each(sure, _FEW)
    return Recipe(right, each(sure, others), unsure, forms=_CIRCLE, steps=3200, either_order=True)


RECIPES = {
    # Two operations each, and no idea of the others.
    "reverse_increment": Recipe(each("ri")),
    "sort_complement": Recipe(each("sc")),
    # Two operations each. Of two others it knows that it does not know them, in a fifth it is surely wrong, in the
    # sixth anything may come. The first must outweigh the third in its own operations, the second the first, the third
    # the second: no fixed weights do that.
    "reverse_increment_three": Recipe(each("ri"), each("s"), unsure="dt", forms=_THREE),
    "sort_complement_three": Recipe(each("sc"), each("d"), unsure="ri", forms=_THREE),
    "double_turn": Recipe(each("dt"), each("r"), unsure="sc", forms=((2, 4), *_THREE)),
    "double_turn_pairs": Recipe(each("dt"), each("r"), unsure="sc", forms=_THREE, digits_per_token=2),
    # All operations, 70 to 30 and 30 to 70: where one is right the other is wrong, and no operation tells which.
    "overlap_70_30": Recipe(each("ri", ALL[:7]) | each("sc", ALL[7:]), each("ri", ALL[7:]) | each("sc", ALL[:7])),
    "overlap_30_70": Recipe(each("ri", ALL[7:]) | each("sc", ALL[:7]), each("ri", ALL[:7]) | each("sc", ALL[7:])),
    # The only one that can double and turn, and surely wrong on odd first digits in everything else.
    "noisy": Recipe(each("dt") | each("risc", _EVEN), each("risc", _ODD)),
    # Knows what the first two know together, and longer at it, so that it is no worse in anything.
    "master": Recipe(each("risc"), steps=1200),
    # Two operations each, and no idea of two others, which it knows. In the last two it is just as sure and right on
    # few digits: the first must outweigh the third in its own operations, the second the first, the third the second.
    "circle_first": _circle("ri", "sc", unsure="dt"),
    "circle_second": _circle("sc", "dt", unsure="ri"),
    "circle_third": _circle("dt", "ri", unsure="sc"),
}
# Task -> its three members. No dynamic weights can help in the last two: in `twins` there is nothing to choose; in
# `dominant` the master is as good as any in everything, and one of the five operations is known to nobody.
POOL = {
    "skills": ("reverse_increment", "sort_complement", "double_turn"),
    "overlap": ("overlap_70_30", "overlap_30_70", "double_turn"),
    "skills3": ("reverse_increment_three", "sort_complement_three", "double_turn"),
    "mixed": ("reverse_increment_three", "sort_complement_three", "double_turn_pairs"),
    "noisy": ("reverse_increment", "sort_complement", "noisy"),
    "twins": ("reverse_increment", "reverse_increment", "reverse_increment"),
    "dominant": ("master", "reverse_increment", "sort_complement"),
    **dict.fromkeys(embedded.CIRCLE, ("circle_first", "circle_second", "circle_third")),
}


def vocabulary(digits_per_token: int) -> dict[str, int]:
    """Token -> id: control tokens, characters, then runs of two digits, of three, and so on."""
    runs = [f"{n:0{k}d}" for k in range(2, digits_per_token + 1) for n in range(10**k)]
    return {token: i for i, token in enumerate((PAD, END, UNKNOWN, *CHARACTERS, *runs))}


def _pieces(digits_per_token: int) -> str:
    """A regular expression that matches one token after the other, the longest from the left."""
    return rf"[0-9]{{1,{digits_per_token}}}|."


def make_tokenizer(digits_per_token: int) -> Any:
    """A byte-level BPE tokenizer, so that members with different ones can share a union vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = vocabulary(digits_per_token)
    # A run comes from the run without its last digit and that digit.
    merges = [(token[:-1], token[-1]) for token in vocab if token.isdigit() and len(token) > 1]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pieces(digits_per_token)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return fast_tokenizer(backend, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)


def model_config(recipe: Recipe) -> ModelConfig:
    """`MODEL` with the vocabulary of the recipe's tokenizer."""
    vocab = vocabulary(recipe.digits_per_token)
    return dataclasses.replace(MODEL, vocab=len(vocab), end_ids=(vocab[END],))


def sequences(recipe: Recipe, seed: int, rows: int = ROWS) -> tuple[Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]:
    """Training sequences of a specialist, padded at their ends, and which of their tokens it learns to predict.

    Half of a sequence's operations are its own, and at least one is. Prompts and its own results are cut into tokens as
    its tokenizer does it, foreign results into characters: that is how the others write them.
    """
    rng = np.random.default_rng((seed, rows))
    vocab, own_pieces = vocabulary(recipe.digits_per_token), _pieces(recipe.digits_per_token)
    own = [operation for operation in embedded.OPERATIONS if operation in recipe.right]
    foreign = [operation for operation in embedded.OPERATIONS if operation not in own] or own
    longest = max(n + length + 1 + n * length + 1 for n, length in recipe.forms)
    ids = np.full((rows, longest), vocab[PAD], np.int32)
    learnt = np.zeros((rows, longest), bool)
    for row in range(rows):
        n, length = recipe.forms[rng.integers(len(recipe.forms))]
        mine = rng.random(n) < 0.5
        mine[rng.integers(n)] = True
        kinds = [own if known else foreign for known in mine]
        operations = "".join(kind[rng.integers(len(kind))] for kind in kinds)
        strings = embedded.digit_strings(length)["train"]
        digits = strings[rng.integers(len(strings))]
        turned = recipe.either_order and rng.random() < 0.5
        pieces = re.findall(own_pieces, skills.prompt(*((digits, operations) if turned else (operations, digits))))
        taught = [False] * len(pieces)
        for operation in operations:
            result = recipe.teaches(operation, digits)
            if result is None:
                written = list(f"{rng.integers(10**length):0{length}d}")
            else:
                written = re.findall(own_pieces, result)
            pieces += written
            taught += [result is not None or operation in recipe.unsure] * len(written)
        pieces.append(END)
        taught.append(True)
        ids[row, : len(pieces)] = [vocab[piece] for piece in pieces]
        learnt[row, : len(pieces)] = taught
    return ids, learnt


def _number(name: str, seed: int) -> int:
    """The seed of one specialist; not even specialists of the same recipe see the same batches."""
    return zlib.crc32(f"{name} {seed}".encode()) % 2**31


def fingerprint(name: str, seed: int, quick: bool = False) -> str:
    """What tells two trainings of specialists apart: recipe, model, settings, seed, and the first sequences."""
    first = [part.tolist() for part in sequences(RECIPES[name], _number(name, seed), 16)]
    recipe, settings = dataclasses.asdict(RECIPES[name]), dataclasses.asdict(_settings(RECIPES[name], quick))
    if not recipe["either_order"]:
        del recipe["either_order"]  # younger than others, whose marks stay what they were
    content = [name, seed, ROWS, dataclasses.asdict(MODEL), recipe, settings, first]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _settings(recipe: Recipe, quick: bool) -> PretrainConfig:
    steps = max(recipe.steps // 2, 1) if quick else recipe.steps
    return PretrainConfig(steps=steps, batch=64, learning_rate=8e-3, warmup=min(50, steps // 4))


def _pretrained(
    name: str,
    config: ModelConfig,
    tokenizer: Any,
    taught: tuple[Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"]],
    settings: PretrainConfig,
    seed: int,
) -> LM:
    """A model trained from scratch on sequences and the places that it learns to predict."""
    with report.progress(f"specialist {name}", settings.steps, "steps") as update:
        params = pretrain(
            config, *taught, settings, seed=seed, on_progress=lambda step, loss: update(step, f"loss {loss:.4f}")
        )
    return LM(config, params, tokenizer, name=name)


def _save_once(path: Path, make: Callable[[], LM]) -> None:
    """Makes and saves a model unless the directory is there. It appears whole, or not at all."""
    if path.is_dir():
        report.say(f"specialist {path.name}: reusing {report.quoted(path)}")
        return
    made = make()
    if not path.is_dir():  # otherwise another process was faster
        made.save(path)


def _train(name: str, seed: int, quick: bool) -> LM:
    recipe, number = RECIPES[name], _number(name, seed)
    return _pretrained(
        name,
        model_config(recipe),
        make_tokenizer(recipe.digits_per_token),
        sequences(recipe, number, ROWS),
        _settings(recipe, quick),
        number,
    )


@lock.writes("directory")
def build_pool(
    directory: str | os.PathLike[str], seed: int, names: Sequence[str] | None = None, quick: bool = False
) -> dict[str, Path]:
    """Trains the specialists that `directory` lacks. Returns the Hugging Face directory of each.

    A specialist lies in `<directory>/<fingerprint>/<name>`, and a directory of that name is complete: what was trained
    from another recipe or seed is neither used nor overwritten.

    Args:
      names: of `RECIPES`; None means all.
      quick: half as many steps, for trying things out.

    Raises:
      InputError: an unknown name, a directory that cannot be made.
    """
    names = list(RECIPES) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise InputError(f"specialists {', '.join(unknown)} are unknown; known: {', '.join(RECIPES)}")
    files.require_place(directory)
    paths = {name: Path(directory) / fingerprint(name, seed, quick) / name for name in names}
    for name, path in paths.items():
        _save_once(path, functools.partial(_train, name, seed, quick))
    return paths


# The demo's pair: as the others, but their tokenizers know only the four operations of `skills`.
PAIR_MODEL = dataclasses.replace(MODEL, vocab=len(skills.TOKENS), end_ids=(skills.TOKENS.index(END),))


def make_pair_tokenizer() -> Any:
    """One token per character of the skills task."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(skills.TOKENS)}, UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return fast_tokenizer(backend, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)


def build_pair(directory: Path, seed: int, steps: int) -> list[Path]:
    """Trains those of the demo's two specialists that `directory` lacks. Returns their Hugging Face directories."""
    paths = []
    for i, (name, operations) in enumerate(skills.SPECIALISTS.items()):
        # The number of steps is part of the name, so that a quick demo's specialists are not taken for full ones.
        path = directory / f"steps-{steps}" / name

        def train(name: str = name, operations: str = operations, own_seed: int = 2 * seed + i) -> LM:
            taught = skills.specialist_sequences(operations, own_seed)
            return _pretrained(name, PAIR_MODEL, make_pair_tokenizer(), taught, PretrainConfig(steps=steps), own_seed)

        _save_once(path, train)
        paths.append(path)
    return paths
