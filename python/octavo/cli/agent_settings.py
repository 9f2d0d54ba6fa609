"""agent_settings: what Claude Code, Codex and the SDKs need to be told of a server, as lines."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

# Of an answer: Claude Code's own bound, and of a small context a quarter.
_MAX_ANSWER: Final = 32_000

_TEMPLATE: Final = """\
Claude Code:
  export ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key}
  export ANTHROPIC_MODEL={model} ANTHROPIC_SMALL_FAST_MODEL={model}
  export CLAUDE_CODE_MAX_CONTEXT_TOKENS={context} CLAUDE_CODE_MAX_OUTPUT_TOKENS={answer}
  export CLAUDE_CODE_ATTRIBUTION_HEADER=0
Codex, in ~/.codex/config.toml{codex_key}:
  model = {toml_model}
  model_provider = "octavo"
  model_context_window = {context}
  [model_providers.octavo]
  name = "octavo"
  base_url = "{url}/v1"
  wire_api = "responses"
  env_key = "OCTAVO_API_KEY"
  supports_websockets = false
OpenAI's SDK and its Agents SDK:
  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}    # model={toml_model}
Anthropic's SDK:
  export ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key}    # model={toml_model}"""


def agent_settings(url: str, model: str, max_model_len: int, *, needs_key: bool) -> str:
    """Lines to paste, a client's after its name.

    Args:
        url: the server's.
        model: a name that it serves.
        max_model_len: the context in tokens, which clients do not ask for.
        needs_key: whether the server has keys; where not, clients still insist on one.
    """
    key = "YOUR_KEY" if needs_key else "none"
    return _TEMPLATE.format(
        url=reachable(url),
        key=key,
        codex_key=f", and export OCTAVO_API_KEY={key}",
        model=shlex.quote(model),
        toml_model=json.dumps(model, ensure_ascii=False),
        context=max_model_len,
        answer=min(_MAX_ANSWER, max_model_len // 4),
    )


def reachable(url: str) -> str:
    """A URL that a client on this machine can use: one that names all addresses is none."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def clients(arguments: argparse.Namespace) -> int:
    """``octavo clients``: the settings for a server that runs."""
    from octavo.cli.chat import Client, ClientError

    key = arguments.api_key or os.environ.get("OCTAVO_API_KEY")
    try:
        models = Client(arguments.url, key).get("/v1/models")["data"]
    except ClientError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    url = arguments.url.rstrip("/").removesuffix("/v1")
    model, context = arguments.model or models[0]["id"], models[0]["max_model_len"]
    print(agent_settings(url, model, context, needs_key=key is not None))
    return 0
