"""Bodies as Claude Code and Codex send them, turn by turn: forty tools, a long history, no state.

Written by hand after what the clients send; texts are filler of the right length.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

NUM_TOOLS = 40

# Schemas use what the clients' do: patterns with classes, unions, references, long enums.
_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "file_path": {"type": "string", "description": "The absolute path."},
        "pattern": {"type": "string", "pattern": r"^\d{3}-[A-Z]+$"},
        "mode": {"enum": ["content", "files_with_matches", "count"]},
        "limit": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        "todos": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "content": {"type": "string", "minLength": 1},
                    "status": {"enum": ["pending", "in_progress", "completed"]},
                },
                "required": ["content", "status"],
            },
        },
    },
    "required": ["file_path"],
    "additionalProperties": False,
}
_NAMES = ("Read", "Write", "Edit", "Bash", "Glob", "Grep", "TodoWrite", "WebFetch", "Task")


def words(rng: random.Random, num_chars: int) -> str:
    """Text without a pattern."""
    parts = []
    while sum(map(len, parts)) + len(parts) < num_chars:
        parts.append("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))))
    return " ".join(parts)[:num_chars]


def tool_names() -> list[str]:
    """The clients' own tools, then those of servers they know."""
    own = list(_NAMES)
    return own + [f"mcp__server__tool_{n}" for n in range(NUM_TOOLS - len(own))]


def claude_code_turns(
    num_turns: int, system_chars: int, result_chars: int
) -> Iterator[dict[str, Any]]:
    """/v1/messages bodies. The billing header changes with every one, the tokens left grow."""
    rng = random.Random(24)
    tools = [
        {"name": name, "description": words(rng, 60), "input_schema": _SCHEMA}
        for name in tool_names()
    ]
    for tool in tools[2:]:
        # The whole schema twice is enough of them.
        tool["input_schema"] = {"type": "object", "properties": {"a": {"type": "string"}}}
    system = words(rng, system_chars)
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "<system-reminder>\nDo what was asked.\n</system-reminder>",
                },
                {"type": "text", "text": "Find the bug."},
            ],
        }
    ]
    left = 150_000
    counters: list[str] = []
    for turn in range(num_turns):
        counters.append(f"<total_tokens>{left} tokens left</total_tokens>")
        left -= rng.randint(900, 1100)
        header = f"x-anthropic-billing-header: cc_version=2.1.40.{turn}; cch={rng.random()};"
        cached = {"type": "ephemeral"}
        yield {
            "model": "claude-opus-5-20261101",
            "max_tokens": 32000,
            "system": [
                {"type": "text", "text": header},
                {"type": "text", "text": "You are a coding agent.", "cache_control": cached},
                {
                    "type": "text",
                    "text": "\n".join([system, *counters]),
                    "cache_control": cached,
                },
            ],
            "messages": json.loads(json.dumps(messages)),
            "tools": tools,
            "metadata": {"user_id": "user_0_account__session_0"},
            "thinking": {"type": "enabled", "budget_tokens": 31999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "temperature": 1,
            "stream": True,
        }
        use = {
            "type": "tool_use",
            "id": f"toolu_{turn:024d}",
            "name": "Read",
            "input": {"file_path": f"/src/{words(rng, 12)}.py", "limit": turn},
        }
        # The client moves its mark of what to cache to the end.
        for message in messages:
            for block in message["content"]:
                block.pop("cache_control", None)
        result = {
            "type": "tool_result",
            "tool_use_id": use["id"],
            "content": words(rng, result_chars),
            "cache_control": cached,
        }
        messages += [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": words(rng, 80), "signature": "s"},
                    {"type": "text", "text": "Let me look."},
                    use,
                ],
            },
            {"role": "user", "content": [result]},
        ]


def codex_turns(num_turns: int, system_chars: int, result_chars: int) -> Iterator[dict[str, Any]]:
    """/v1/responses bodies: stateless, with reasoning that comes back sealed."""
    from octavo.server.responses.items import seal

    rng = random.Random(48)
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "name": name,
            "description": words(rng, 60),
            "strict": False,
            "parameters": _SCHEMA if number < 2 else {"type": "object", "properties": {}},
        }
        for number, name in enumerate(("exec_command", "update_plan", *tool_names()[2:-4]))
    ]
    tools += [
        {"type": "web_search", "external_web_access": False},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edit files.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
        },
        {
            "type": "namespace",
            "name": "mcp__git",
            "description": "Git.",
            "tools": [{"type": "function", "name": "log", "parameters": {"type": "object"}}],
        },
        {"type": "image_generation"},
    ]
    items: list[dict[str, Any]] = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>read only</permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context/>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Find the bug."}],
        },
    ]
    instructions = words(rng, system_chars)
    for turn in range(num_turns):
        yield {
            "model": "alias",
            "instructions": instructions,
            "input": json.loads(json.dumps(items)),
            "tools": tools,
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0192",
            "text": {"verbosity": "low"},
            "client_metadata": {"turn": turn},
        }
        items += [
            {
                "type": "reasoning",
                "summary": [],
                "content": None,
                "encrypted_content": seal(words(rng, 80)),
            },
            {
                "type": "function_call",
                "name": "exec_command",
                "arguments": json.dumps({"file_path": words(rng, 20)}),
                "call_id": f"call_{turn:024d}",
            },
            {
                "type": "function_call_output",
                "call_id": f"call_{turn:024d}",
                "output": words(rng, result_chars),
            },
        ]
