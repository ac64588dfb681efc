"""The transformers library, of which only tokenizers are used: imported late, as that takes seconds, without torch."""

import importlib
import logging
from typing import Any

_ADVICE = "PyTorch was not found"


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVICE)


def import_transformers() -> Any:
    """The transformers package. On its import it would advise everybody to install torch, which nothing here needs;
    that line is left out, and all others come."""
    logging.getLogger("transformers").addFilter(_is_no_advice)
    return importlib.import_module("transformers")


def fast_tokenizer(backend: Any, **special_tokens: str) -> Any:
    """A transformers tokenizer around one of the tokenizers library; texts come back as they were, spaces included."""
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )
