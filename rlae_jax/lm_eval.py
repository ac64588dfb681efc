"""Ensembles as a model of lm-evaluation-harness (the package lm-eval), registered as `rlae_jax` when this is imported:

    import rlae_jax.lm_eval
    lm_eval.simple_evaluate("rlae_jax", model_args={"models": ["A", "B"], "policy": "runs/x"}, tasks=["arc_challenge"])
    lm_eval.simple_evaluate(rlae_jax.lm_eval.EnsembleLM(ensemble, weights=[1, 2]), tasks=["arc_challenge"])

In: the harness's requests. Out: its results. Tasks are the harness's, unchanged: with one tokenizer texts are cut into
tokens by its own rules, so that numbers are comparable to those of its other models; with different tokenizers a
continuation is scored in the entries of their union.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from rlae_jax import ranges, report
from rlae_jax.errors import InputError
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.prompts import Row, pad_rows
from rlae_jax.fusion.weights import Weights
from rlae_jax.models import chat_templates, load
from rlae_jax.ppo.policies import get_policy
from rlae_jax.ppo.train import check_members
from rlae_jax.ranges import Count, Weight

_log = logging.getLogger(__name__)
_LONGEST = 256  # answer of tasks that do not say how long it may be, as in the harness


@register_model("rlae_jax")
class EnsembleLM(TemplateLM):  # type: ignore[misc]  # the harness has no annotations that are checked
    """An ensemble under the harness.

    Args:
      models: an ensemble; or directories, GGUF files or Hub ids, as a list or with semicolons between them.
      weights: as `Ensemble.generate` takes them; in a string numbers with semicolons between them.
      policy: a run's directory, or the name of a policy without training, instead of weights.
      span_length: L; by default the policy's.
      batch_size: prompts that are answered together. Scoring makes its own batches.
      options: of `Ensemble` (fusion, end_ids) and of `load` (dtype, quantise, ...), for models that are given by name.

    Raises:
      InputError: what `load`, `Ensemble` and policies raise; an encoder-decoder; members without a tokenizer.
    """

    def __init__(
        self,
        models: Ensemble | str | Sequence[str],
        *,
        weights: Weights = None,
        policy: str | None = None,
        span_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        fusion: Any = "linear",
        end_ids: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        del max_batch_size, device  # JAX chooses the device
        if not isinstance(models, Ensemble):
            names = models.split(";") if isinstance(models, str) else list(models)
            models = Ensemble([load(name, **options) for name in names], fusion, end_ids=end_ids)
        if weights is not None and policy is not None:
            raise InputError("give either weights or a policy")
        if policy is not None:
            weights = get_policy(policy)
            if Path(policy).is_dir():
                check_members(policy, models)
        elif isinstance(weights, str) and weights[:1].isdigit():
            weights = [ranges.read(part, Weight, "weights ") for part in weights.split(";")]
        if not models.continues:
            raise InputError("the harness scores continuations of prompts, which an encoder-decoder does not write")
        self.ensemble, self.weights, self.span_length = models, weights, span_length
        self.tokenizer = models.tokenizer
        self.batch_size = 32 if batch_size in (None, "auto") else ranges.read(str(batch_size), Count, "batch_size ")

    @property
    def max_length(self) -> int:
        """The longest text in tokens."""
        return self.ensemble.context

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests under."""
        return "+".join(lm.name for lm in self.ensemble.members).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        ends: Sequence[int] = self.ensemble.member_ends[0]
        own = self.tokenizer.eos_token_id
        return own if own is not None or not ends else ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The first member's ids; a text that begins with the token that its tokenizer puts there has it once."""
        del kwargs
        begins = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = begins is None or not string.startswith(begins)
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Raises:
          InputError: members with different tokenizers or templates, which would need texts of their own.
        """
        if self.ensemble.codec.own_prompts(True):
            raise InputError("members with different tokenizers or chat templates cannot read one chat's text")
        first = self.ensemble.members[0]
        goes_on = not add_generation_prompt
        return chat_templates.render(self.tokenizer, first.name, [chat_history], goes_on=goes_on)[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation its log-probability, and whether it is what would be written greedily."""
        if self.ensemble.union is None:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found
        pairs = [self._union_pair(*request.args) for request in requests]
        return self._score(*zip(*pairs, strict=True), keys=[request.args for request in requests])

    def _union_pair(self, context: str, continuation: str) -> tuple[Row, list[int]]:
        """A context in every member's ids and its continuation in entries, cut as the harness does: spaces at the end
        of a context belong to what continues it."""
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        if not context:
            return self.ensemble.codec.start(), self.ensemble.codec.continuation("", continuation, False)
        (row,) = self.ensemble.encode([context])
        return row, self.ensemble.codec.continuation(context, continuation, True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        del kwargs
        keys, contexts, continuations = zip(*requests, strict=True)
        return self._score(contexts, continuations, keys=keys)

    def _score(
        self, rows: Sequence[Row], tokens: Sequence[list[int]], *, keys: Sequence[Any] | None = None
    ) -> list[tuple[float, bool]]:
        """The results of pairs of a context and its continuation; what `keys` has is kept for the harness's cache."""
        rows = [self._cut(row, own) for row, own in zip(rows, tokens, strict=True)]
        prompts = self._texts(rows)
        with report.progress("scoring", len(rows), "texts") as update:
            scores = self.ensemble.score_tokens(
                *(rows, tokens, self.weights, self.span_length),
                prompts=prompts,
                top=1,
                on_progress=lambda done: update(done, ""),
            )
        results = []
        for i, (one, own) in enumerate(zip(scores, tokens, strict=True)):
            # Where two are as likely the first one would be written; the harness, too, asks for the likeliest.
            result = float(one.fused.sum(dtype="float64")), bool((one.top_tokens[:, 0] == own).all())
            results.append(result)
            if keys is not None:
                self.cache_hook.add_partial("loglikelihood", keys[i], result)
        return results

    def _cut(self, row: Row, tokens: Sequence[int]) -> Row:
        """A context without its beginning where it does not fit, as in the harness."""
        spelled = self.ensemble.codec.spell(tokens)
        if isinstance(row[0], int):
            return self._cut_ids(row, spelled[0])
        return tuple(self._cut_ids(ids, own) for ids, own in zip(row, spelled, strict=True))

    def _cut_ids(self, ids: list[int], spelled: tuple[list[int], list[int]]) -> list[int]:
        room = self.max_length - sum(spelled[1][:-1])
        if len(ids) > room > 0:
            _log.warning("a context of %d tokens loses its beginning: %d fit", len(ids), room)
            return ids[-room:]
        return ids

    def _texts(self, rows: Sequence[Row]) -> list[str] | None:
        """The contexts as text, where members' ids differ: a policy may read it."""
        if self.ensemble.union is None:
            return None
        texts: list[str] = self.tokenizer.batch_decode([row[0] for row in rows])
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each request's text, in windows as wide as the members' context. With one tokenizer
        these are the harness's; with several each begins with the last entry before it."""
        del disable_tqdm
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = list(itertools.chain.from_iterable(windows))
        scores = iter(self._score(*map(list, zip(*pairs, strict=True))) if pairs else ())
        totals = []
        for request, own in zip(requests, windows, strict=True):
            totals.append(float(sum(score for score, _ in itertools.islice(scores, len(own)))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _windows(self, text: str) -> list[tuple[Row, list[int]]]:
        if self.ensemble.union is None:
            ids = self.tok_encode(text, add_special_tokens=False)
            whole = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            return list(map(utils.make_disjoint_window, whole))
        windows: list[tuple[Row, list[int]]] = []
        row, own, sizes = self.ensemble.codec.start(), list[int](), [1] * len(self.ensemble.members)
        for entry in self.ensemble.codec.continuation("", text, False) if text else ():
            spelled = [ids for ids, _ in self.ensemble.codec.spell([entry])]
            if own and any(size + len(ids) > self.max_length for size, ids in zip(sizes, spelled, strict=True)):
                windows.append((row, own))
                last = self.ensemble.codec.spell(own[-1:])
                # A member for which the last entry is nothing begins again.
                row = tuple(ids or first for (ids, _), first in zip(last, self.ensemble.codec.start(), strict=True))
                own, sizes = [], list(map(len, row))
            own.append(entry)
            sizes = [size + len(ids) for size, ids in zip(sizes, spelled, strict=True)]
        return [*windows, (row, own)] if own else windows

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each request's context, up to its stop strings."""
        del disable_tqdm
        texts: dict[int, str] = {}
        options = [normalize_gen_kwargs(dict(request.args[1]), _LONGEST) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), -len(requests[i].args[0])))
        with report.progress("writing", len(requests), "answers") as update:
            for _, same in itertools.groupby(order, key=lambda i: repr(options[i])):
                indices = list(same)
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    written = self._write([requests[i].args[0] for i in batch], dict(options[batch[0]]))
                    for i, text in zip(batch, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    update(len(texts), "")
        return [texts[i] for i in range(len(requests))]

    def _write(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Answers to contexts, under the harness's options."""
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        longest = int(options["max_gen_toks"])
        if longest >= self.max_length:
            raise InputError(f"max_gen_toks {longest} leaves no room for a prompt: the context is {self.max_length}")
        asked: dict[str, Any] = {
            "max_new_tokens": longest,
            "temperature": float(options.get("temperature") or 0.0),
            "span_length": self.span_length,
            "stop": [text for text in stop if text not in self._end_texts],
        }
        # What else the harness's options may hold belongs to other libraries.
        shared = ("top_k", "top_p", "min_p", "repetition_penalty")
        asked |= {name: value for name, value in options.items() if name in shared}
        room = self.max_length - longest
        if self.ensemble.union is None:
            rows = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
            ids, mask = pad_rows(rows, max(map(len, rows)))
            return self.ensemble.generate(prompt_ids=ids, prompt_mask=mask, weights=self.weights, **asked).texts
        return self.ensemble.generate([self._shorten(text, room) for text in contexts], self.weights, **asked).texts

    @property
    def _end_texts(self) -> set[str]:
        """The special tokens that end every answer anyway."""
        special = self.ensemble.codec.special_tokens
        return {special[i] for i in self.ensemble.end_ids if i in special}

    def _shorten(self, text: str, room: int) -> str:
        """A text without as much of its beginning as does not fit."""
        while (n := self.ensemble.lengths(self.ensemble.encode([text]))[0]) > room:
            text = text[max(len(text) * (n - room) // n, 1) :]
        return text
