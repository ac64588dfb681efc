"""The page's files as the server hands them out, and the page's picture as a file of its own: answers of `generate`,
every token coloured by the member that favoured it, drawn by the same code (`page/draw.js`) in the same style."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.fusion.generation import Generation

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

# The files by the path under which they are served: what is in them, and its type.
PAGE: dict[str, tuple[bytes, str]] = {
    "/" if path.name == "index.html" else f"/page/{path.name}": (
        path.read_bytes(),
        f"{_TYPES[path.suffix]}; charset=utf-8",
    )
    for path in sorted(_FOLDER.iterdir())
}

# Nothing runs or is fetched but these files, from the server itself, and no other site shows the page in a frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_ENDS = {"stop": "ended by itself", "length": "length limit reached", "error": "a prediction was not finite"}


def generation_html(
    ensemble: "Ensemble", generation: "Generation", prompts: Sequence[str], *, chat: bool = False
) -> str:
    """Answers as one HTML document that needs nothing beside it.

    Args:
      generation: what the ensemble's `generate` returned for the prompts, with `scores=True`; several samples of a
        prompt stand one after another.
    """
    assert generation.scores is not None
    assert generation.member_scores is not None
    codec, rows = ensemble.codec, ensemble.encode(prompts, chat=chat)
    samples = len(generation.texts) // len(prompts)
    answers = []
    for b, (text, chosen) in enumerate(zip(generation.texts, generation.chosen, strict=True)):
        spans = generation.spans[b, : len(chosen)].tolist()
        # A token's text is what it adds to what is before it: decoded alone it would lose a space, or half a character.
        begun = codec.decode([rows[b // samples]] * len(chosen), [chosen[:n] for n in range(1, len(chosen) + 1)])
        columns = (_gains(begun, text), spans, generation.scores[b], generation.member_scores[b])
        tokens = [
            {"text": gained, "span": span, "logprob": _number(fused), "member_logprobs": list(map(_number, members))}
            for gained, span, fused, members in zip(*columns, strict=False)  # scores go on to the longest answer's end
        ]
        weights = [{"span": p, "weights": list(map(_number, generation.weights[b, p]))} for p in sorted(set(spans))]
        ends = _ENDS[generation.finish_reasons[b]]
        answers.append({"prompt": prompts[b // samples], "ends": ends, "spans": weights, "tokens": tokens})
    return _document([lm.name for lm in ensemble.members], answers)


def _gains(begun: Sequence[str], text: str) -> list[str]:
    """What each token adds to the text, of what was decoded up to it; joined they are the text. A character belongs to
    the token that completes it, and what a stop string cut to none."""
    gains, shown = [], 0
    for start in begun:
        settled = start.rstrip("\ufffd")
        while not text.startswith(settled):
            settled = settled[:-1]
        gains.append(text[shown : len(settled)])
        shown = max(shown, len(settled))
    if gains:
        gains[-1] += text[shown:]
    return gains


def _number(value: Any) -> float | None:
    """A number of JSON, which has no infinity."""
    return round(float(value), 5) if math.isfinite(value) else None


def _document(members: Sequence[str], answers: Sequence[dict[str, Any]]) -> str:
    style, draw = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "draw.js"))
    data = json.dumps({"members": members, "answers": answers}, ensure_ascii=False).replace("<", "\\u003c")
    script = (
        f'{draw}\ndrawFile(document.querySelector("main"), JSON.parse(document.getElementById("data").textContent));\n'
    )
    only = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    names = html.escape(" + ".join(members))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{only}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{names} · rlae-jax</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body class="file">
<header class="top"><h1>rlae-jax</h1><p>{names}</p></header>
<main></main>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """Of a script or style, as a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
