"""Keys, host names, origins, request ids."""

from __future__ import annotations

import pytest
from harness import StartServer

from octavo.server.routes import ROUTES

OPEN = ("/health", "/ready", "/ping")
CLOSED = [
    *(
        (method, entry.path)
        for entry in ROUTES
        for method in entry.methods
        if entry.path not in OPEN
    ),
    ("GET", "/no/such/route"),
]


def test_every_route_asks_for_the_key(start_server: StartServer) -> None:
    server = start_server(api_key=("first", "sec ond"))
    assert len(CLOSED) > 14
    for method, path in CLOSED:
        answer = server.request(method, path, {} if method == "POST" else None)
        assert answer.status == 401, path
        # The same name in OpenAI's form and in Anthropic's.
        assert answer.json["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
    for path in OPEN:
        assert server.get(path).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "bearer first"}, 200),
        ({"Authorization": "Bearer sec ond"}, 200),
        ({"x-api-key": "first"}, 200),
        ({"X-Api-Key": "sec ond"}, 200),
        ({"x-api-key": "first", "Authorization": "Bearer wrong"}, 200),
        ({"Authorization": "Basic first"}, 401),
        ({"Authorization": "first"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer firs"}, 401),
        ({"Authorization": "Bearer first1"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "\xe9"}, 401),
    ],
)
def test_keys(start_server: StartServer, headers: dict[str, str], status: int) -> None:
    server = start_server(api_key=("first", "sec ond"))
    assert server.request("GET", "/v1/models", headers=headers).status == status


def test_metrics_may_be_open(start_server: StartServer) -> None:
    server = start_server(api_key=("k",), metrics_need_key=False)
    assert server.get("/metrics").status == 200
    assert server.get("/load").status == 401


def test_foreign_host_names_are_refused_on_loopback(start_server: StartServer) -> None:
    server = start_server(allowed_hosts=("proxy.example",))
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "a.localhost", "proxy.example:1"):
        assert server.get("/v1/models", Host=host).status == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", ""):
        answer = server.get("/v1/models", Host=host)
        assert answer.status == 403, host
        assert answer.error["code"] == "forbidden_host"


def test_with_a_key_any_host_name_will_do(start_server: StartServer) -> None:
    server = start_server(api_key=("k",))
    answer = server.request("GET", "/v1/models", headers={"Host": "evil.example", "x-api-key": "k"})
    assert answer.status == 200


def test_no_cors_by_default(start_server: StartServer) -> None:
    server = start_server()
    answer = server.get("/v1/models", Origin="https://page.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/v1/models", headers=preflight).status == 405


def test_what_pages_may_do(start_server: StartServer) -> None:
    server = start_server(
        allowed_origins=("https://page.example",),
        allowed_methods=("POST",),
        allowed_headers=("x-own",),
        allow_credentials=True,
    )
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked = {**preflight, "Access-Control-Request-Headers": "x-own"}
    answer = server.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert answer.status == 200
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-allow-methods"] == "POST"
    for refused in (
        {**preflight, "Access-Control-Request-Method": "GET"},
        {**preflight, "Access-Control-Request-Headers": "x-other"},
    ):
        assert server.request("OPTIONS", "/v1/models", headers=refused).status == 400


def test_allowed_origins(start_server: StartServer) -> None:
    server = start_server(allowed_origins=("https://page.example",), api_key=("k",))
    preflight = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = server.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert answer.headers["x-request-id"]
    # Pages must be able to read why they were refused.
    answer = server.get("/v1/models", Origin="https://page.example")
    assert answer.status == 401
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert answer.headers["vary"] == "Origin"
    assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"
    foreign = {**preflight, "Origin": "https://other.example"}
    refused = server.request("OPTIONS", "/v1/chat/completions", headers=foreign)
    assert refused.status == 400
    assert "origin" in refused.error["message"]
    assert "access-control-allow-origin" not in refused.headers
    answer = server.get("/v1/models", Origin="https://other.example", x_api_key="k")
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers


def test_every_origin(start_server: StartServer) -> None:
    server = start_server(allowed_origins=("*",))
    answer = server.get("/v1/models", Origin="https://any.example")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_request_ids(start_server: StartServer) -> None:
    server = start_server()
    answer = server.post("/v1/completions", {"prompt": "x"}, {"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json["id"] == "cmpl-mine-1"
    body = {"prompt": "x", "request_id": "body", "stream": True}
    answer = server.post("/v1/completions", body, {"X-Request-Id": "head"})
    assert answer.headers["x-request-id"] == "head"
    assert b'"id":"cmpl-body"' in answer.body
    assert server.get("/nothing", X_Request_Id="lost").headers["x-request-id"] == "lost"
    unfit = server.get("/version", X_Request_Id="x" * 300).headers["x-request-id"]
    assert len(unfit) == 32
    assert server.get("/version").headers["x-request-id"] != unfit


@pytest.mark.parametrize("root_path", ["/api", "/a/b/"])
@pytest.mark.parametrize("strips", [True, False])
def test_root_path(start_server: StartServer, root_path: str, strips: bool) -> None:
    """Behind a proxy that strips the prefix, or one that does not."""
    server = start_server(
        root_path=root_path, api_key=("k",), metrics_need_key=False, allowed_origins=("*",)
    )
    prefix = "" if strips else root_path.rstrip("/")
    key = {"x-api-key": "k"}
    assert server.get(prefix + "/v1/models", x_api_key="k").status == 200
    # A path with a parameter, which is found in another way.
    assert server.get(prefix + "/v1/models/fake/model", x_api_key="k").json["id"] == "fake/model"
    assert server.post(prefix + "/v1/completions", {"prompt": "x"}, key).status == 200
    assert server.get(prefix + "/v1/models").status == 401
    for path in ("/health", "/ready", "/ping", "/metrics"):
        assert server.get(prefix + path).status == 200
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    answer = server.request("OPTIONS", prefix + "/v1/completions", headers=preflight)
    assert answer.status == 200
    assert server.get(prefix + "/version", x_api_key="k").status == 200
    missing = server.get(prefix + "/v1/nothing", x_api_key="k")
    assert missing.error["message"] == f"no route GET {prefix}/v1/nothing"


def test_a_root_path_is_whole_segments_and_comes_once(start_server: StartServer) -> None:
    server = start_server(root_path="/api")
    for path in ("/apiv1/models", "/ap/v1/models", "/api/api/v1/models", "/api"):
        answer = server.get(path)
        assert answer.status == 404, path
        assert answer.error["message"] == f"no route GET {path}"
