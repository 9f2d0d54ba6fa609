"""The page's markdown: texts and the elements that they become, and no text that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from harness import StartServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., "Page"]
pytestmark = [pytest.mark.slow, pytest.mark.system]

LINK = '<a href="https://x.org/" target="_blank" rel="noopener noreferrer">'
CASES = {
    "plain": "<p>plain</p>",
    "a **b** *c* ~~d~~": "<p>a <strong>b</strong> <em>c</em> <del>d</del></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "__a__ _b_ snake_case_name": "<p><strong>a</strong> <em>b</em> snake_case_name</p>",
    "2 * 3 * 4 and 2*3": "<p>2 * 3 * 4 and 2*3</p>",
    "`a*b*` and ``a`b``": "<p><code>a*b*</code> and <code>a`b</code></p>",
    "**`a`**": "<p><strong><code>a</code></strong></p>",
    "a ` b": "<p>a ` b</p>",
    r"\*a\*": "<p>*a*</p>",
    "one  \ntwo\nthree": "<p>one<br>two\nthree</p>",
    "# a #\ntext": "<h3>a</h3><p>text</p>",
    "#no": "<p>#no</p>",
    "[a](https://x.org)": f"<p>{LINK}a</a></p>",
    "<https://x.org>": f"<p>{LINK}https://x.org</a></p>",
    "see https://x.org.": f"<p>see {LINK}https://x.org</a>.</p>",
    "![a](https://x.org)": f"<p>{LINK}a</a></p>",
    "[a](javascript:x)": "<p>[a](javascript:x)</p>",
    "[a](//x.org)": "<p>[a](//x.org)</p>",
    "<b>a</b> &amp;": "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp;</p>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "---": "<hr>",
    "- a\n- b": "<ul><li><span>a</span></li><li><span>b</span></li></ul>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "3. a\n4. b": '<ol start="3"><li><span>a</span></li><li><span>b</span></li></ol>',
    "- a\n  - b\n- c": "<ul><li><span>a</span><ul><li><span>b</span></li></ul></li>"
    "<li><span>c</span></li></ul>",
    "1. a\n\n   b": "<ol><li><span>a</span><span>b</span></li></ol>",
    "a\n- b": "<p>a</p><ul><li><span>b</span></li></ul>",
    "\ue0000\ue001": "<p>\ufffd0\ufffd</p>",
}
LONG = ["`" * 10_000, "**a " * 4000, "[" * 10_000, "[a](" * 4000, "_a " * 5000, ">" * 10_000,
        "- " * 5000, "* a" * 4000, " " * 10_000 + "x", "|a" * 5000 + "\n" + "|-" * 5000]  # fmt: skip
DRAW = """
async (texts) => {
  const { LiveMarkdown } = await import("/page/markdown.js");
  return texts.map((text) => {
    const live = new LiveMarkdown();
    const began = performance.now();
    live.update(text);
    return [live.element.innerHTML, performance.now() - began];
  });
}
"""


def test_texts_become_elements(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start("x").url)
    drawn = page.evaluate(DRAW, list(CASES))
    wrong = {
        text: html
        for (text, wanted), (html, _) in zip(CASES.items(), drawn, strict=True)
        if html != wanted
    }
    assert not wrong


def test_no_text_takes_long(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start("x").url)
    for text, (_, took_ms) in zip(LONG, page.evaluate(DRAW, LONG), strict=True):
        assert took_ms < 2000, text[:20]


def test_growing_texts_are_what_they_are_at_once(start: StartServer, open_page: OpenPage) -> None:
    page = open_page(start("x").url)
    whole = "\n\n".join(CASES) + "\n\n```py\nx = 1\n```\n\nend"
    grown, at_once = page.evaluate(
        """
        async (text) => {
          const { LiveMarkdown } = await import("/page/markdown.js");
          const [grown, atOnce] = [new LiveMarkdown(), new LiveMarkdown()];
          for (let end = 0; end <= text.length; end += 3) grown.update(text.slice(0, end));
          grown.update(text);
          atOnce.update(text);
          return [grown.element.innerHTML, atOnce.element.innerHTML];
        }
        """,
        whole,
    )
    assert grown == at_once
