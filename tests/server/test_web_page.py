"""The page's files: what is served, with which headers, to whom, and that they stay small and plain."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness import RunningServer, StartServer

from octavo.server.web_page import MEDIA_TYPES, page_files

FOLDER = Path(__file__).parents[2] / "python" / "octavo" / "server" / "page"
MAX_BYTES = 150_000
# Ways to turn text into markup or programs.
DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    r"|DOMParser|createContextualFragment|setHTML|javascript:"
)


class Tags(HTMLParser):
    """Every element's name and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_and_its_files_are_served(server: RunningServer) -> None:
    answer = server.get("/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.body == (FOLDER / "index.html").read_bytes()
    names = {path.name for path in FOLDER.iterdir()}
    assert names == set(page_files())
    for name in names:
        answer = server.get(f"/page/{name}")
        assert answer.status == 200
        assert answer.headers["content-type"] == MEDIA_TYPES[name.rpartition(".")[2]]
        assert answer.body == (FOLDER / name).read_bytes()
    assert server.request("HEAD", "/").body == b""


def test_every_file_comes_with_the_policy(server: RunningServer) -> None:
    for path in ("/", "/page/main.js", "/page/icon.svg"):
        headers = server.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_an_unchanged_file_is_not_sent_again(server: RunningServer) -> None:
    tag = server.get("/").headers["etag"]
    again = server.get("/", If_None_Match=tag)
    assert (again.status, again.body) == (304, b"")
    assert server.get("/", If_None_Match='"other"').status == 200
    assert server.get("/page/main.js").headers["etag"] != tag


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/none.js", "/page/..%2Fweb_page.py", "/page/../web_page.py", "/page/%00"],
)
def test_no_other_file_is_served(server: RunningServer, path: str) -> None:
    assert server.get(path).status == 404


def test_it_can_be_switched_off(start_server: StartServer) -> None:
    server = start_server(web_ui=False)
    for path in ("/", "/page/main.js"):
        assert server.get(path).status == 404
    assert server.get("/v1/models").status == 200


def test_the_page_is_open_and_its_requests_need_the_key(start_server: StartServer) -> None:
    server = start_server(api_key=("k",), compat=("tgi",))
    assert server.get("/").status == server.get("/page/main.js").status == 200
    assert server.get("/page/none.js").status == 404
    for path in ("/v1/models", "/metrics", "/pages", "/page"):
        assert server.get(path).status == 401
    # TGI's route of the same path is none of the page's.
    assert server.post("/", {"inputs": "x"}).status == 401
    closed = start_server(api_key=("k",), web_ui=False)
    assert closed.get("/").status == closed.get("/page/main.js").status == 401


def test_tgi_s_route_and_the_page_share_a_path(start_server: StartServer) -> None:
    server = start_server(compat=("tgi",))
    assert server.get("/").headers["content-type"].startswith("text/html")
    assert server.post("/", {"inputs": "x"}).json[0]["generated_text"]


def test_a_foreign_name_for_this_machine_gets_no_page(server: RunningServer) -> None:
    assert server.get("/", Host="evil.example").status == 403


def test_it_is_for_people_and_not_described(server: RunningServer) -> None:
    assert "/" not in server.get("/openapi.json").json["paths"]


def test_models_tell_what_they_are_for(server: RunningServer) -> None:
    assert {model["task"] for model in server.get("/v1/models").json["data"]} == {"generate"}


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    for tag, attributes in Tags((FOLDER / "index.html").read_text()).found:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        if tag == "script":
            assert attributes["type"] == "module"
            assert attributes["src"]
        for name in ("src", "href"):
            # Relative: a proxy may put the server under a prefix.
            assert re.match(r"#|page/|$", attributes.get(name) or "")
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert not DANGEROUS.search(text), path
        remote = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w{2,}[\w./]*", text))
        assert remote <= {"http://www.w3.org/2000/svg"}, path


def test_every_import_and_file_is_there_and_used() -> None:
    texts = {path.name: path.read_text() for path in FOLDER.iterdir()}
    used = set(re.findall(r'(?:src|href)="page/([^"]+)"', texts["index.html"]))
    for name, text in texts.items():
        if name.endswith(".js"):
            used |= {target.removeprefix("./") for target in re.findall(r'from "([^"]+)"', text)}
    assert used == set(texts) - {"index.html"}


def test_every_control_has_a_name() -> None:
    text = (FOLDER / "index.html").read_text()
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', text))
    for tag, attributes in Tags(text).found:
        if tag in ("input", "textarea", "select") and attributes.get("type") != "checkbox":
            assert attributes.get("aria-label") or attributes.get("id") in labelled
        if tag == "button" and "icon" in (attributes.get("class") or ""):
            assert attributes.get("aria-label")
