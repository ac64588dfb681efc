"""The page as the server hands it out and answers it, in headless Chromium: each sends what the other expects."""

import pytest

from tests.helpers.chromium import CHROMIUM, NO_CHROMIUM
from tests.helpers.serving import AGENT, MEMBERS, FakeEngine, answer, eventually, serving

playwright = pytest.importorskip("playwright.sync_api", reason=NO_CHROMIUM)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
WAIT = 10_000  # milliseconds


def test_the_page_and_the_server_understand_each_other():
    engine = FakeEngine(allowed=0)
    with playwright.sync_playwright() as started, serving(engine, api_key="sesame") as (url, *_):
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--disable-dev-shm-usage"])
        page, expect = browser.new_page(), playwright.expect
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        page.goto(url)
        page.get_by_label("key").fill("sesame")
        page.get_by_label("key").press("Enter")
        page.get_by_label("own answers").uncheck()
        prompt = page.get_by_label("Prompt", exact=True)
        for mode in ("Plain text", "Chat"):
            page.get_by_text(mode).click()
            prompt.fill("hello")
            prompt.press("Control+Enter")
            article = page.locator("article").first
            engine.allow(6)  # the server goes on no further until the page has shown these
            expect(article.locator(".token")).to_have_count(6)
            engine.allow(100)
            expect(page.get_by_role("status")).to_contain_text("Done")
            assert article.locator(".text").text_content() == answer("hello", 64)
            expect(article.locator(".column")).to_have_count(16)
            expect(article.locator(".legend .name")).to_have_text(list(MEMBERS))
            engine.allow(-engine.allowed)
        asked = [ticket.request for ticket in engine.tickets]
        assert [request.weights for request in asked] == [AGENT, AGENT]

        prompt.fill("hello")
        prompt.press("Control+Enter")
        engine.allow(2)
        expect(page.locator("article").first.locator(".token")).to_have_count(2)
        page.keyboard.press("Escape")
        eventually(lambda: engine.tickets[-1].ended.is_set())
        assert engine.tickets[-1].cancelled
        browser.close()
