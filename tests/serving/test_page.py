"""The page in headless Chromium, with a server whose answers are made up: type, stream, read who wrote what, move a
slider, see errors; and the same picture as a file."""

import math
import random
import re

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.serving.api import Catalogue
from rlae_jax.serving.engine import Engine
from rlae_jax.serving.html import generation_html
from tests.helpers.chromium import CHROMIUM, NO_CHROMIUM
from tests.helpers.page_server import WORDS, PageServer, written
from tests.helpers.serving import serving

playwright = pytest.importorskip("playwright.sync_api", reason=NO_CHROMIUM)
expect = playwright.expect
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
WAIT = 10_000  # milliseconds, of a machine that does much else
SLOW = 60_000  # where something is compiled first
AGENT = "runs/agent"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """tab(address, **options of a context) -> a page there. In the end nothing that the content security policy forbids
    was tried, and no script failed."""
    contexts, complaints = [], []

    def visit(address, **options):
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None
        )
        tab.goto(address)
        return tab

    expect.set_options(timeout=WAIT)
    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


def favoured(token):
    """The member of the greatest share of a token's probabilities, and its lead; None where all are about alike."""
    p = [0.0 if logprob is None else math.exp(logprob) for logprob in token["member_logprobs"]]
    share = max(p) / sum(p)
    lead = (share - 1 / len(p)) / (1 - 1 / len(p))
    return (p.index(max(p)) if lead >= 0.1 else None), share


# Whether an element, from its upper edge to its lower, is inside the window and nothing lies over it, once what is in
# the page is laid out.
SEEN = """async element => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const {left, right, top, bottom} = element.getBoundingClientRect();
  return [top + 2, bottom - 2].every(y => element.contains(document.elementFromPoint((left + right) / 2, y)));
}"""


def seen(locator):
    return locator.evaluate(SEEN)


def ask(tab, prompt, *, alone=False):
    if not alone:
        tab.get_by_role("checkbox", name="own answers").uncheck()
    tab.get_by_label("Prompt", exact=True).fill(prompt)
    tab.get_by_label("Prompt", exact=True).press("Control+Enter")
    return tab.locator("article").first


class TestWriting:
    def test_an_answer_is_streamed_into_the_page(self, tab, server):
        page = tab(server.url)
        article = ask(page, "wait")
        tokens = article.locator(".token")
        expect(tokens).to_have_count(8)  # while the server still writes
        assert "".join(tokens.all_text_contents()) == "".join(t["text"] for t in written(2)["tokens"][:8])
        expect(page.get_by_role("status")).to_have_text("Writing…")
        expect(page.get_by_role("button", name="Write")).to_be_disabled()
        server.go.set()
        expect(page.get_by_role("status")).to_contain_text("Done: ")
        assert article.locator(".text").text_content() == WORDS
        expect(article.locator(".prompt")).to_have_text("wait")
        expect(page.get_by_role("button", name="Write")).to_be_enabled()
        [(path, request)] = server.asked
        assert path == "/v1/completions"
        assert request == {
            **{"prompt": "wait", "model": AGENT, "max_tokens": 64, "temperature": 0, "seed": 0, "stream": True},
            "rlae": {"attribution": True},
        }

    def test_chat_and_the_members_own_answers(self, tab, server):
        page = tab(server.url)
        page.get_by_text("Chat").click()
        article = ask(page, "Tell me a story", alone=True)
        own = article.locator(".own")
        expect(own).to_have_count(2)
        expect(page.get_by_role("status")).to_contain_text("Done")
        for box, name in zip(own.all(), server.members, strict=True):
            expect(box.get_by_role("heading")).to_have_text(name)
            assert box.locator(".text").text_content() == WORDS
        assert {path for path, _ in server.asked} == {"/v1/chat/completions"}
        assert sorted(request["model"] for _, request in server.asked) == sorted([AGENT, *server.members])
        assert all(
            request["messages"] == [{"role": "user", "content": "Tell me a story"}] for _, request in server.asked
        )

    def test_stop_ends_the_request(self, tab, server):
        page = tab(server.url)
        article = ask(page, "wait")
        expect(article.locator(".token")).to_have_count(8)
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        expect(article.locator(".headline .meta")).to_have_text("stopped after 8 tokens")
        assert server.left.wait(WAIT / 1000)

    def test_escape_stops_too_and_no_members_have_a_chat_template(self, tab):
        with PageServer(chat=False) as server:
            page = tab(server.url)
            expect(page.get_by_label("Chat")).to_be_disabled()
            article = ask(page, "wait")
            expect(article.locator(".token")).to_have_count(8)
            page.keyboard.press("Escape")
            expect(page.get_by_role("status")).to_have_text("Stopped.")

    def test_an_answer_below_the_form_grows_in_sight(self, tab):
        with PageServer(text=(WORDS * 3).strip()) as server:  # higher than the window
            page = tab(server.url, viewport={"width": 360, "height": 640})
            for stays in (True, False):
                server.go.clear()
                page.evaluate("scrollTo(0, 0)")
                article = ask(page, "wait", alone=True)
                tokens = article.locator(".text").first.locator(".token")
                expect(tokens).to_have_count(8)
                assert seen(tokens.last)
                assert seen(page.get_by_role("button", name="Stop"))
                if not stays:
                    page.evaluate("scrollTo(0, 0)")
                server.go.set()
                expect(page.get_by_role("status")).to_contain_text("Done")
                assert seen(tokens.last) == stays
            assert page.evaluate("scrollY") == 0


class TestAttribution:
    def test_every_token_has_the_colour_of_who_favoured_it(self, tab):
        members = ["a", "b", "c", "d", "e"]
        with PageServer(members) as server:
            page = tab(server.url)
            article = ask(page, "Go")
            expect(page.get_by_role("status")).to_contain_text("Done")
            shown = article.locator(".token").evaluate_all("tokens => tokens.map(t => t.dataset.colour ?? null)")
            answer = written(5, seed=len(AGENT))
            expected = [favoured(token)[0] for token in answer["tokens"]]
            assert [None if colour is None else int(colour) for colour in shown] == expected
            assert set(expected) == {None, 0, 1, 2, 3, 4}
            # Not by colour alone: five kinds of underlines, and of fills.
            lines = article.locator(".legend .name").evaluate_all(
                "names => names.map(n => getComputedStyle(n).textDecorationStyle)"
            )
            assert lines == ["solid", "dashed", "dotted", "double", "wavy"]
            fills = "swatches => swatches.map(s => getComputedStyle(s).backgroundImage)"
            assert len(set(article.locator(".legend .swatch").evaluate_all(fills)[:5])) == 5

    def test_the_strip_shows_every_spans_weights(self, tab, server):
        page = tab(server.url)
        article = ask(page, "Go")
        expect(page.get_by_role("status")).to_contain_text("Done")
        answer = written(2, seed=len(AGENT))
        columns = article.locator(".column")
        assert columns.count() == len(answer["spans"])
        measure = "cs => cs.map(c => [c.style.flexGrow, ...[...c.children].map(p => p.getBoundingClientRect().height)])"
        counts = [sum(t["span"] == span["span"] for t in answer["tokens"]) for span in answer["spans"]]
        for (grow, *heights), span, count in zip(columns.evaluate_all(measure), answer["spans"], counts, strict=True):
            assert int(grow) == count
            np.testing.assert_allclose(np.array(heights) / sum(heights), span["weights"], atol=0.03)  # a gap of a pixel
        columns.nth(1).hover()
        card = article.get_by_role("tooltip")
        for weight in answer["spans"][1]["weights"]:
            expect(card).to_contain_text(f"{weight:.3f}")
        expect(article.locator(".token.current")).to_have_count(4)
        expect(columns.nth(1)).to_have_attribute("aria-label", re.compile(r"Span 2: storyteller 0\.\d\d, poet 0\.\d\d"))

    @pytest.mark.parametrize("way", ["pointer", "keyboard"])
    def test_the_numbers_of_a_token(self, tab, server, way):
        page = tab(server.url)
        article = ask(page, "Go")
        expect(page.get_by_role("status")).to_contain_text("Done")
        answer = written(2, seed=len(AGENT))
        card = article.get_by_role("tooltip")
        expect(card).to_be_hidden()
        for i in (0, 1, 5):
            if way == "pointer":
                article.locator(".token").nth(i).hover()
            elif i == 0:
                page.get_by_role("button", name="Write").press("Tab")  # Stop is disabled, so that the answer is next
            else:
                page.keyboard.press("ArrowRight" if i == 1 else "ArrowDown")
                if i == 5:
                    page.keyboard.press("ArrowRight")
            token = answer["tokens"][i]
            weights = answer["spans"][token["span"]]["weights"]
            expect(card).to_contain_text(f"token {i + 1} · span {token['span'] + 1}")
            rows = card.locator("tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")
            by_member = zip(server.members, token["member_logprobs"], weights, strict=True)
            assert rows == [
                [name, "", f"{math.exp(log):.3f}", f"−{-log:.2f}", f"{weight:.2f}"] for name, log, weight in by_member
            ] + [["together", "", f"{math.exp(token['logprob']):.3f}", f"−{-token['logprob']:.2f}", ""]]
            member, share = favoured(token)
            if member is None:
                expect(card).to_contain_text("About alike")
            else:
                expect(card).to_contain_text(f"Favoured by {server.members[member]}: {share:.0%}")
        if way == "keyboard":
            page.keyboard.press("Escape")
            expect(card).to_be_hidden()
            page.keyboard.press("Tab")
            expect(article.locator(".column").first).to_be_focused()

    def test_shares_against_a_plain_computation(self, tab, server):
        page = tab(server.url)
        rng = random.Random()
        rows = [[rng.uniform(-9, 0) for _ in range(rng.randint(2, 5))] for _ in range(50)]
        found = page.evaluate("rows => import('/page/draw.js').then(draw => rows.map(draw.shares))", rows)
        for row, shares in zip(rows, found, strict=True):
            p = np.exp(row)
            np.testing.assert_allclose(shares, p / p.sum(), rtol=1e-9)
        edges = [[-2000, -2001], [None, -3.0], [None, None]]
        far, lacking, nobody = page.evaluate("rows => import('/page/draw.js').then(d => rows.map(d.shares))", edges)
        np.testing.assert_allclose(far, [1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
        assert lacking == [0, 1]
        assert nobody is None


class TestWeights:
    def test_sliders_set_fixed_weights_beside_the_agents(self, tab, server):
        page = tab(server.url)
        ask(page, "Go")
        expect(page.get_by_role("status")).to_contain_text("Done")
        answer = written(2, seed=len(AGENT))
        by_token = np.array([answer["spans"][token["span"]]["weights"] for token in answer["tokens"]])
        for told, mean in zip(page.locator(".slider small").all(), by_token.mean(axis=0), strict=True):
            expect(told).to_have_text(f"{AGENT}: {mean:.2f} on average")
        one, other = page.get_by_role("slider").all()
        one.focus()
        page.keyboard.press("End")
        other.focus()
        page.keyboard.press("Home")
        for _ in range(25):
            page.keyboard.press("ArrowRight")
        expect(page.get_by_role("radio", name="Fixed")).to_be_checked()
        expect(page.locator(".slider .value")).to_have_text(["100 of 125 = 0.80", "25 of 125 = 0.20"])
        expect(other).to_have_attribute("aria-valuetext", "25 of 125 = 0.20")
        article = ask(page, "Go")
        expect(page.get_by_role("status")).to_contain_text("Done")
        request = server.asked[-1][1]
        assert request["model"] == "pair"
        np.testing.assert_allclose(request["rlae"]["weights"], [0.8, 0.2])
        expect(article.get_by_role("heading", level=2)).to_have_text("Fixed weights 0.80 : 0.20")
        expect(page.locator("article")).to_have_count(2)  # the agent's answer stays beside it
        other.press("Home")
        one.press("Home")
        ask(page, "Go")
        expect(page.get_by_role("alert")).to_contain_text("All sliders are at 0")


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "told"),
        [
            ("busy", "The server is busy; try again in a moment. 64 requests wait already <b>"),
            pytest.param(
                "break", "The server ended the connection before the answer was finished.", marks=pytest.mark.rare
            ),
            ("fault", "The answer could not be finished: the device is gone"),
        ],
    )
    def test_in_plain_words_and_the_page_goes_on(self, tab, server, prompt, told):
        page = tab(server.url)
        article = ask(page, prompt)
        expect(page.get_by_role("alert")).to_have_text(told)
        if prompt == "busy":
            expect(page.locator("article")).to_have_count(0)
        else:
            expect(article.locator(".headline .meta")).to_have_text("not finished")
            expect(article.locator(".token")).to_have_count(8)
        ask(page, "Go")
        expect(page.get_by_role("status")).to_contain_text("Done")
        expect(page.get_by_role("alert")).to_be_hidden()

    @pytest.mark.parametrize("size", [(1280, 700), (360, 640)])
    def test_seen_where_they_happen_and_gone_with_the_next_change(self, tab, server, size):
        page = tab(server.url, viewport=dict(zip(("width", "height"), size, strict=True)))
        page.get_by_text("Options").click()
        assert seen(page.get_by_label("Tokens"))
        ask(page, "busy", alone=True)
        alert, status = page.get_by_role("alert"), page.get_by_role("status")
        expect(alert).to_contain_text("The server is busy")
        assert seen(alert)
        assert seen(page.get_by_role("button", name="Write"))
        expect(page.get_by_text("The answer appears here")).to_be_visible()
        page.get_by_label("Seed").fill("1")
        expect(alert).to_be_hidden()
        ask(page, "Go")
        expect(status).to_contain_text("Done")
        page.get_by_label("Tokens").fill("0")
        expect(status).to_be_empty()
        page.get_by_text("Options").click()
        ask(page, "Go")
        expect(page.get_by_label("Tokens")).to_be_focused()  # where the browser says what is wrong with it

    def test_a_server_that_is_gone(self, tab):
        with PageServer() as server:
            page = tab(server.url)
            expect(page.get_by_role("slider")).to_have_count(2)
        ask(page, "Go")
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")

    def test_a_key_is_asked_for(self, tab):
        with PageServer(key="right") as server:
            page = tab(server.url)
            expect(page.get_by_role("alert")).to_have_text("The server wants an API key.")
            field = page.get_by_label("API key")
            expect(field).to_be_focused()
            field.fill("wrong")
            field.press("Tab")
            expect(page.get_by_role("alert")).to_have_text("The server does not know this API key.")
            field.fill("right")
            field.press("Tab")
            expect(page.get_by_role("slider")).to_have_count(2)
            expect(page.get_by_role("alert")).to_be_hidden()
            ask(page, "Go")
            expect(page.get_by_role("status")).to_contain_text("Done")


MARKUP = "<img src=x onerror=alert(1)> </script><script>alert(2)</script> <b>bold</b> &amp; 'quotes' \"too\""


class TestSafety:
    def test_markup_is_text(self, tab):
        with PageServer([MARKUP, "poet"], text=MARKUP, policies=()) as server:
            page = tab(server.url)
            article = ask(page, MARKUP, alone=True)
            expect(page.get_by_role("status")).to_contain_text("Done")
            assert article.locator(".text").first.text_content() == MARKUP
            assert page.locator("img, main script, b").count() == 0
            article.locator(".token").first.hover()
            expect(article.get_by_role("tooltip").first).to_contain_text(MARKUP)


class TestReaders:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_narrow_and_with_enough_contrast(self, tab, server, scheme):
        page = tab(server.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
        article = ask(page, "Go", alone=True)
        expect(page.get_by_role("status")).to_contain_text("Done")
        article.locator(".token").nth(6).hover()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        card = article.get_by_role("tooltip").first.bounding_box()
        assert card["x"] >= 0
        assert card["x"] + card["width"] <= 360
        # WCAG's ratio of text to what lies behind it, of a token whose tint is strongest: painted by a canvas, as the
        # browser computes it.
        ratios = article.locator(".token[data-colour]").evaluate_all(CONTRAST)
        assert min(ratios) >= 4.5


CONTRAST = """tokens => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const light = (...colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(c => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = getComputedStyle(tokens[0].closest('.panel')).backgroundColor;
  return tokens.map(token => {
    const style = getComputedStyle(token);
    const back = light(panel, style.backgroundColor), ink = light(style.color);
    return (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
  });
}"""


def test_with_the_engine_itself(tab, make_lm, make_tokenizer):
    """What the page shows is what `generate` gives: texts, numbers, weights; and what the server says of a mistake."""
    tokenizer = make_tokenizer([*"abcdefghijklmnopqrstu "])
    fields = {"vocab": len(tokenizer), "layers": 1, "context": 64, "tokenizer": tokenizer, "end_ids": ()}
    ensemble = rj.Ensemble([make_lm(seed, name=name, **fields) for seed, name in enumerate(("one", "two"))])
    policies = {"confidence": "confidence"}
    engine = Engine(ensemble, slots=4, context=64, policies=policies)
    catalogue = Catalogue.create(engine, name="pair", fusion="linear", policies=policies, created=1)
    with serving(engine, catalogue) as (url, *_):
        page = tab(url)
        page.get_by_text("Options").click()
        page.get_by_label("Tokens").fill("9")
        article = ask(page, "abc", alone=True)
        expect(page.get_by_role("status")).to_contain_text("Done", timeout=SLOW)
        shown = [text.text_content() for text in article.locator(".text").all()]
        asked = {"max_new_tokens": 9, "scores": True}
        agents = ensemble.generate(["abc"], "confidence", **asked)
        alone = [ensemble.generate(["abc"], weights, max_new_tokens=9).texts[0] for weights in ([1, 0], [0, 1])]
        assert shown == [agents.texts[0], *alone]
        expect(article.locator(".column").first).to_be_visible()
        assert article.locator(".headline + .prompt + div .column").count() == 9  # it decides anew at every step
        page.get_by_role("slider").first.fill("90")
        page.get_by_role("slider").last.fill("30")
        article = ask(page, "abc")
        expect(page.locator("article")).to_have_count(2)
        expect(page.get_by_role("status")).to_contain_text("Done", timeout=SLOW)
        fixed = ensemble.generate(["abc"], [3, 1], **asked)
        assert article.locator(".text").text_content() == fixed.texts[0]
        assert article.locator(".column").count() == 3
        article.locator(".token").nth(5).hover()
        card = article.get_by_role("tooltip")
        for logprob in (fixed.scores[0, 5], *fixed.member_scores[0, 5]):
            expect(card).to_contain_text(f"−{-logprob:.2f}")
        expect(card).to_contain_text("0.75")
        page.get_by_label("Tokens").fill("1000")
        ask(page, "abc")
        expect(page.get_by_role("alert")).to_contain_text("1000")


class TestFile:
    def test_a_generation_is_drawn_as_the_page_draws_it(self, tab, make_lm, make_tokenizer, tmp_path):
        """Read back out of the drawing: every token's text, numbers and colour."""
        tokenizer = make_tokenizer([*"abcdefghijklmnop <>/", "</script>"])
        fields = {"vocab": len(tokenizer), "layers": 1, "tokenizer": tokenizer, "sharpness": 8.0}
        members = [make_lm(seed, name=f"<b>{seed}", **fields) for seed in (0, 1)]
        ensemble = rj.Ensemble(members)
        prompts = ["ab</script>", "cd"]
        options = {"max_new_tokens": 7, "span_length": 3, "ignore_eos": True, "temperature": 1.0, "samples": 2}
        generation = ensemble.generate(prompts, [1, 3], scores=True, **options)
        path = tmp_path / "out.html"
        path.write_text(generation_html(ensemble, generation, prompts), encoding="utf-8")
        page = tab(path.as_uri())
        articles = page.locator("article").all()
        assert [article.locator(".prompt").text_content() for article in articles] == [p for p in prompts for _ in "ab"]
        for b, article in enumerate(articles):
            assert article.locator(".text").text_content() == generation.texts[b]
            assert article.locator(".token").count() == len(generation.chosen[b])
            assert article.locator(".column").count() == 3
            expected = [favoured({"member_logprobs": row.tolist()})[0] for row in generation.member_scores[b]]
            shown = article.locator(".token").evaluate_all("tokens => tokens.map(t => t.dataset.colour ?? null)")
            assert [None if colour is None else int(colour) for colour in shown] == expected
            article.locator(".token").nth(4).hover()
            card = article.get_by_role("tooltip")
            expect(card).to_contain_text("token 5 · span 2")
            expect(card).to_contain_text(f"−{-generation.scores[b, 4]:.2f}")
            expect(card).to_contain_text("0.75")
        assert page.locator("b").count() == 0
        lefts = "items => new Set(items.map(item => item.getBoundingClientRect().left)).size"
        assert articles[0].locator(".legend .numbers").evaluate_all(lefts) == 1  # they stand in a column
