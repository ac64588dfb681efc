"""What the server hands out for the page, and a page's picture as a file, without a browser."""

import json
import re

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.serving.html import PAGE, PAGE_HEADERS, generation_html


def test_files_are_the_pages_own():
    """No inline script or style, nothing from elsewhere."""
    assert sorted(PAGE) == ["/", "/page/draw.js", "/page/page.css", "/page/page.js"]
    everything = b"".join(body for body, _ in PAGE.values()).decode()
    assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", everything, flags=re.MULTILINE)
    index = PAGE["/"][0].decode()
    assert not re.search(r"<style|<script(?! type=\"module\" src)|\son\w+=|style=", index)
    assert "innerHTML" not in everything
    assert "'unsafe" not in PAGE_HEADERS["Content-Security-Policy"]


def test_numbers_that_json_lacks(make_lm, make_tokenizer):
    tokenizer = make_tokenizer("abcd")
    ensemble = rj.Ensemble([make_lm(0, vocab=5, layers=1, tokenizer=tokenizer)])
    generation = ensemble.generate(["ab"], max_new_tokens=2, scores=True, ignore_eos=True)
    generation.member_scores[...] = -np.inf
    document = generation_html(ensemble, generation, ["ab"])
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', document)
    [answer] = json.loads(data, parse_constant=lambda name: pytest.fail(name))["answers"]
    assert [token["member_logprobs"] for token in answer["tokens"]] == [[None], [None]]
    assert "".join(token["text"] for token in answer["tokens"]) == generation.texts[0]
