"""The chat in a real browser: it streams, stops, goes on, and runs nothing that a model wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from harness import RunningServer, StartServer, eventually
from scripted_engine import call

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., "Page"]
pytestmark = [pytest.mark.slow, pytest.mark.system]

SAID = """<think>
Sort, then sweep.
</think>

## Merging intervals

Sort by the beginning, then *sweep* once: **O(n log n)**, `in place`.

```python
def merge(intervals):
    # Sorted, an interval can only touch the last one kept.
    merged = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
```

| case | merged |
|---|--:|
| `[(1, 2), (2, 3)]` | 1 |

1. one
2. two
   - nested
"""
HOSTILE = """<script>window.ran = 1</script>
<img src=x onerror="window.ran = 2"> <svg onload="window.ran = 3"></svg>
[link](javascript:window.ran=4) ![picture](https://example.com/tracks.png) [data](data:text/html,x)

```html"><script>window.ran = 5</script>
<script>window.ran = 6</script>
```

| <b onclick="window.ran = 7">x</b> | y |
|---|---|
| <iframe srcdoc="<script>parent.ran = 8</script>"></iframe> | z |
"""


def ask(page: Page, text: str = "Merge intervals") -> None:
    page.wait_for_selector("#model:enabled")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".message.assistant:last-child .stats:not(:empty)")


def last(page: Page) -> Any:
    return page.locator(".message.assistant").last


def text_of(page: Page) -> str:
    """The last answer's text, without its reasoning."""
    return str(last(page).locator("> .markdown").inner_text())


def test_an_answer_streams_and_is_drawn(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start(SAID, 0.02).url)
    ask(page)
    # A part is seen before the whole is there: in one look, for more comes between two.
    page.wait_for_function(
        """() => document.querySelector(".message.assistant[aria-busy=true] h4")
            && !document.querySelector("table")
            && document.querySelector("#stop").checkVisibility()"""
    )
    answered(page)
    answer = last(page)
    assert answer.locator("h4").inner_text() == "Merging intervals"
    assert answer.locator(".markdown > p > strong").inner_text() == "O(n log n)"
    code = answer.locator("figure.code")
    assert code.locator("figcaption span").inner_text() == "python"
    assert SAID.split("```python\n")[1].split("\n```")[0] == code.locator("code").text_content()
    assert code.locator(".keyword").first.inner_text() == "def"
    assert answer.locator("td.right").inner_text() == "1"
    assert answer.locator("ol li ul li").inner_text() == "nested"
    assert re.search(r"\d+ tokens · .* tok/s · first after", answer.locator(".stats").inner_text())
    # Reasoning is folded, and opens.
    reasoning = answer.locator("details")
    assert not reasoning.locator(".markdown").is_visible()
    reasoning.locator("summary").click()
    reasoning.get_by_text("Sort, then sweep.").wait_for()


def test_stop_stops(start: StartServer, open_page: OpenPage) -> None:
    server = start("word " * 400, 0.02)
    page = open_page(server.url)
    for way in ("#stop", "Escape"):
        ask(page)
        page.locator("[aria-busy=true] > .markdown", has_text="word word").wait_for()
        assert server.engine.running
        page.click("#stop") if way == "#stop" else page.keyboard.press("Escape")
        answered(page)
        eventually(lambda: not server.engine.running)
        assert "stopped" in last(page).locator(".stats").inner_text()
        assert text_of(page).startswith("word word")


def test_nothing_that_a_model_writes_runs(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start(HOSTILE).url, complains=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, "<img src=x onerror='window.ran = 9'>")
    answered(page)
    assert page.evaluate("window.ran") is None
    texts = page.locator("#messages")
    assert texts.locator("script, img, iframe, b, svg").count() == 0
    assert "<script>window.ran = 1</script>" in texts.inner_text()
    links = texts.locator("a").evaluate_all("links => links.map(a => a.href)")
    # A picture is a link, and is not fetched.
    assert links == ["https://example.com/tracks.png"]
    assert not [url for url in asked if "example.com" in url]
    # Were it to become markup all the same, the browser would refuse it.
    refused = "try { document.body.innerHTML = '<b></b>'; 'set' } catch (error) { error.name }"
    assert page.evaluate(refused) == "TypeError"


def test_regenerate_edit_and_settings(start: StartServer, open_page: OpenPage) -> None:
    server = start("A short answer.")
    page = open_page(server.url)
    page.wait_for_selector("#model:enabled")
    page.click("#open-settings")
    page.fill("#setting-system", "Be brief.")
    page.fill("#setting-temperature", "0.25")
    page.fill("#setting-stop", "END")
    page.get_by_role("button", name="Done").click()
    ask(page, "first")
    answered(page)
    page.get_by_role("button", name="Regenerate").click()
    eventually(lambda: len(server.engine.submitted) == 2)
    answered(page)
    assert page.locator(".message").count() == 2
    prompts = server.engine.prompts
    assert prompts[0] == prompts[1]
    assert "Be brief." in prompts[0]
    params = server.engine.submitted[1][1]
    assert (params.temperature, params.stop) == (0.25, ("END",))
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#prompt") == "first"
    assert page.locator(".message").count() == 0
    ask(page, "second")
    answered(page)
    assert "second" in server.engine.prompts[-1]
    assert "first" not in server.engine.prompts[-1]


def test_tool_calls_are_shown_and_answered(start: StartServer, open_page: OpenPage) -> None:
    server = start(call("weather", '{"city": "Rome"}'))
    server.engine.turns.append("It is warm in Rome.")
    page = open_page(server.url)
    page.wait_for_selector("#model:enabled")
    page.click("#open-settings")
    page.fill(
        "#setting-tools",
        '[{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}]',
    )
    page.get_by_role("button", name="Done").click()
    ask(page, "Weather?")
    page.wait_for_selector(".results")
    box = page.locator(".call")
    assert box.locator("strong").inner_text() == "weather"
    assert box.locator("code").text_content() == '{\n  "city": "Rome"\n}'
    page.get_by_label("Result of weather").fill("31 degrees")
    page.get_by_role("button", name="Send results").click()
    page.get_by_text("It is warm in Rome.").wait_for()
    assert "31 degrees" in server.engine.prompts[-1]


def test_conversations_are_kept_and_can_be_deleted(start: StartServer, open_page: OpenPage) -> None:
    server = start("An answer.")
    page = open_page(server.url)
    for text in ("one", "two"):
        page.click("#new-chat")
        ask(page, text)
        answered(page)
    page.reload()
    page.wait_for_selector("#model:enabled")
    titles = page.locator("#conversations .open")
    assert titles.all_inner_texts() == ["two", "one"]
    titles.last.click()
    assert page.locator(".message.user .plain").inner_text() == "one"
    assert text_of(page) == "An answer."
    ask(page, "and again")
    answered(page)
    assert "An answer." in server.engine.prompts[-1]
    page.get_by_role("button", name="Delete two").click()
    page.reload()
    assert titles.all_inner_texts() == ["one"]


def test_a_question_outlives_its_page(start: StartServer, open_page: OpenPage) -> None:
    server = start("word " * 400, 0.02)
    page = open_page(server.url)
    ask(page, "Are you there?")
    page.locator("[aria-busy=true] > .markdown", has_text="word word").wait_for()
    page.reload()
    page.wait_for_selector("#model:enabled")
    eventually(lambda: not server.engine.running)
    server.engine.turns[:] = ["Here I am."]
    page.get_by_role("button", name="Are you there?", exact=True).click()
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert text_of(page) == "Here I am."
    assert page.title() == "Are you there? · octavo"
    # One that is deleted while it is being answered does not come back.
    server.engine.turns[:] = ["word " * 400]
    ask(page, "And now?")
    page.locator("[aria-busy=true] > .markdown", has_text="word word").wait_for()
    page.get_by_role("button", name="Delete Are you there?").click()
    eventually(lambda: not server.engine.running)
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.locator("#conversations .open").count() == 0


def test_a_long_answer_is_followed_until_one_scrolls(
    start: StartServer, open_page: OpenPage
) -> None:
    page = open_page(start("A line.\n\n" * 300, 0.01).url, viewport={"width": 800, "height": 500})
    ask(page)
    followed = """() => {
      const { scrollHeight, scrollTop, clientHeight } = document.getElementById("scroll");
      return scrollTop > 200 && scrollHeight - scrollTop - clientHeight < 60;
    }"""
    page.wait_for_function(followed)
    assert page.is_hidden("#to-end")
    page.hover("#messages")
    page.mouse.wheel(0, -400)
    page.wait_for_selector("#to-end:visible")
    page.wait_for_timeout(300)
    assert not page.evaluate(followed)
    page.click("#to-end")
    page.wait_for_function(followed)
    page.wait_for_selector("#to-end", state="hidden")


def test_the_picker_has_every_model(start: StartServer, open_page: OpenPage) -> None:
    names = ("one/same", "two/same", "org/Other-7B")
    server = start("An answer.", names=names)
    page = open_page(server.url)
    page.wait_for_selector("#model:enabled")
    options = page.locator("#model option")
    assert options.evaluate_all("all => all.map(o => o.value)") == [
        model["id"] for model in server.get("/v1/models").json["data"]
    ]
    # Short where that is enough.
    assert options.all_inner_texts() == ["one/same", "two/same", "Other-7B"]
    page.select_option("#model", "two/same")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    ask(page)
    answered(page)
    assert asked[0]["model"] == "two/same"
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.input_value("#model") == "two/same"


def test_it_asks_for_the_key(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start("Welcome.", api_key=("secret",)).url)
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-error:not(:empty)")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    ask(page)
    answered(page)
    assert text_of(page) == "Welcome."
    page.reload()
    page.wait_for_selector("#model:enabled")
    # For this visit alone, unless it is told to keep it.
    assert page.evaluate("localStorage.getItem('octavo.key')") is None
    page.goto(page.url.partition("#")[0] + "#live")
    page.wait_for_selector(".chart svg")
    assert page.locator("#notice").is_hidden()


def test_errors_are_shown(start: StartServer, open_page: OpenPage) -> None:
    server = start("x")
    page = open_page(server.url)
    ask(page, "long " * 30_000)
    page.get_by_text("maximum context length").wait_for()
    server.call(server.engine.die)
    eventually(lambda: not server.thread.is_alive())
    ask(page, "anyone there?")
    page.get_by_text("The server does not answer").wait_for()


def test_by_keyboard_alone(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start("An answer.").url)
    page.wait_for_selector("#model:enabled")
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert names[0] == "Skip to the content"
    expected = ["tab-chat", "tab-live", "model", "open-settings", "new-chat", "scroll"]
    assert [name for name in names if name in expected] == expected
    assert names[-1] == "prompt"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    answered(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen(start: StartServer, open_page: OpenPage, scheme: str) -> None:
    size = {"width": 360, "height": 700}
    page = open_page(start(SAID).url, viewport=size, color_scheme=scheme)
    for view in ("chat", "live"):
        page.click(f"#tab-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("#tab-chat")
    ask(page)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= 360
    assert not page.is_visible("#new-chat")
    page.click("#toggle-side")
    page.wait_for_selector("#new-chat:visible")
    page.click("#new-chat")
    page.wait_for_selector("#new-chat", state="hidden")
    assert contrast(page, ".quiet") >= 4.5
    assert contrast(page, "#send") >= 4.5


CONTRAST = """
(selector) => {
  const style = getComputedStyle(document.querySelector(selector));
  const ground = getComputedStyle(document.body).backgroundColor;
  const own = style.backgroundColor;
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const [a, b] = [light(style.color), light(own.endsWith(", 0)") ? ground : own)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}
"""


def contrast(page: Page, selector: str) -> float:
    """The contrast of a text with its ground, as WCAG 2 computes it."""
    return float(page.evaluate(CONTRAST, selector))


def test_it_waits_for_a_loading_model(start: StartServer, open_page: OpenPage) -> None:
    started = start("x")
    server = RunningServer(started.engine, started.lifecycle.config)
    try:
        page = open_page(server.url)
        page.get_by_text("The model is loading").wait_for()
        server.may_load.set()
        page.wait_for_selector("#model:enabled")
        assert page.locator("#notice").is_hidden()
    finally:
        server.stop()
