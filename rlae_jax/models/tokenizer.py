"""The transformers library, of which only tokenizers are used: imported late, as that takes seconds, without torch."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlae_jax.errors import InputError, Interrupted, one_line

_ADVICE = "PyTorch was not found"


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVICE)


def import_transformers() -> Any:
    """The transformers package. On its import it would advise everybody to install torch, which nothing here needs;
    that line is left out, and all others come."""
    logging.getLogger("transformers").addFilter(_is_no_advice)
    return importlib.import_module("transformers")


@contextlib.contextmanager
def told(where: Path | str, what: str = "no readable tokenizer") -> Iterator[None]:
    """Whatever these libraries raise inside, as an `InputError` in one line. A panic of the tokenizers library is no
    `Exception`.

    Args:
      where: the directory or the file, or whose tokenizer it is.
    """
    try:
        yield
    except (InputError, Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{where}: {what} ({type(error).__name__}: {one_line(error)})") from error


def check_usable(tokenizer: Any, probes: list[str]) -> None:
    """Raises whatever a tokenizer raises that was made but cannot be used, or an `InputError`."""
    vocab = tokenizer.get_vocab()
    if not vocab:
        raise InputError("it has no tokens")
    for part in ("bos", "eos", "pad", "unk"):
        name, i = f"{part}_token", getattr(tokenizer, f"{part}_token_id")
        if i is not None and (isinstance(i, bool) or not isinstance(i, int)):
            raise InputError(f"{name} {getattr(tokenizer, name)!r} is no token")
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise InputError(f"chat_template is {template!r:.40}, no text")
    for ids in tokenizer(probes)["input_ids"]:
        tokenizer.decode(ids, skip_special_tokens=True)
    _ = tokenizer.special_tokens_map, tokenizer.added_tokens_decoder


def fast_tokenizer(backend: Any, **special_tokens: str) -> Any:
    """A transformers tokenizer around one of the tokenizers library; texts come back as they were, spaces included."""
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )
