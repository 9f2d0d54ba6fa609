"""ChatTemplate: messages to one prompt text, in a sandbox with bounds.

The environment is the one that checkpoints' templates are written for (transformers': trimmed
blocks, loop controls, ``raise_exception``, ``strftime_now``, ``tojson`` without HTML escaping,
``{% generation %}``), so that a template renders the same bytes here as where it was trained.

A template is a program. Loops and macros are compiled with a check of a deadline in their bodies,
and the output's size is bounded. A template that a request brings also loses the operations that
make a long string from short ones, and is rendered in a process of its own
(``template_process.py``): what it costs there, it cannot cost the server.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from datetime import datetime
from typing import Any, Final, Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.errors import BadRequestError
from octavo.text.call_turns import call_forms
from octavo.text.template_forms import TemplateForms, find_forms
from octavo.text.tool_prompt import plain_calls, tool_text, with_system_text, with_user_text

# String methods open to a request's template: none that makes a long string from short ones.
_HARMLESS_STR_METHODS_TEXT = (
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric "
    "isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_HARMLESS_STR_METHODS: Final = frozenset(_HARMLESS_STR_METHODS_TEXT.split())
_HARMLESS_FILTERS_TEXT = (
    "abs attr capitalize count d default dictsort e escape first float int items last length "
    "list lower map max min reject rejectattr reverse round safe select selectattr sort "
    "string sum title tojson trim unique upper"
)
_HARMLESS_FILTERS: Final = frozenset(_HARMLESS_FILTERS_TEXT.split())
# Far above honest templates and texts, far below what harms a server.
MAX_TEMPLATE_CHARS: Final = 256 * 1024
MAX_RENDERED_CHARS: Final = 64 * 1024 * 1024
MAX_RENDER_S: Final = 2.0
_MAX_OPERAND: Final = 1_000_000
_MAX_INDENT: Final = 16

# Names of a message's reasoning: templates read the first, clients send any.
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")

ArgumentsForm = Literal["object", "text"]

# Marks where a continued message ends. The space shows whether the template trims its messages.
_CONTINUE_TAG: Final = "OCTAVO_CONTINUE_HERE_4f1c "

# Variables that belong to the caller, not to chat_template_kwargs.
RESERVED_VARIABLES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _Budget(threading.local):
    """Time limit of the render on this thread."""

    deadline = 0.0
    ticks = 0


_budget = _Budget()


class _OutOfBudget(jinja2.TemplateError):
    """A template over its limits of time or size."""


@jinja2.pass_context
def _tick(context: Context, value: object) -> object:
    """Check of the deadline, in every loop body and macro.

    A filter that takes the context is never folded away as a constant.
    """
    _budget.ticks += 1
    if _budget.ticks & 63 == 0 and time.monotonic() > _budget.deadline:
        raise _OutOfBudget("takes too long")
    return value


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks text for training; here it is plain."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise SecurityError("tojson indents too far")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


_DICT_ATTRIBUTES: Final = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """The operator's templates: the model's own, or ``--chat-template``."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["octavo_tick"] = _tick
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``message.role``. Jinja tries a dict's attributes first: a failed attempt for each key,
        half the cost of a render."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


class _UntrustedEnvironment(_Environment):
    """Templates that come with a request: also bounded in memory."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "/", "//"})

    def __init__(self) -> None:
        super().__init__()
        self.filters = {
            name: function
            for name, function in self.filters.items()
            if name in _HARMLESS_FILTERS or name.startswith("octavo_")
        }
        self.filters["octavo_bounded"] = _bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr not in _HARMLESS_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+" and not numbers:
            return _bounded(left + right)
        if not numbers or operator == "**" or max(abs(left), abs(right)) > 2**63:
            raise SecurityError(f"operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)


def _bounded(value: Any) -> Any:
    if hasattr(value, "__len__") and len(value) > _MAX_OPERAND:
        raise SecurityError("builds too long a value")
    return value


def _insert_checks(tree: nodes.Template, environment: jinja2.Environment, untrusted: bool) -> None:
    """Put a tick at the head of each loop body and macro, and bound what ``~`` joins."""
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        tick = nodes.Filter(nodes.Const(None), "octavo_tick", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
    if untrusted:
        for concat in tree.find_all(nodes.Concat):
            joined = nodes.Concat(concat.nodes)
            bounded = nodes.Filter(joined, "octavo_bounded", [], [], None, None)
            concat.nodes = [bounded]
    tree.set_environment(environment)


class ChatTemplate:
    """A compiled template. Immutable; may render on several threads at once.

    ``source`` is its text, ``knows_calls`` whether it writes earlier turns' calls of tools.

    Args:
        source: the Jinja text.
        special_tokens: variables such as ``bos_token`` -> its text.
        untrusted: the source came with a request.

    ``executor``: the threads for renders that may be long; None: anybody's.

    Raises:
        ValueError: the source is not a template; one line with the line number.
    """

    executor: Executor | None = None

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, untrusted: bool = False
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"a chat template has at most {MAX_TEMPLATE_CHARS} characters")
        environment = _UntrustedEnvironment() if untrusted else _Environment()
        try:
            tree = environment.parse(source)
            self._variables = frozenset(meta.find_undeclared_variables(tree))
            _insert_checks(tree, environment, untrusted)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"chat template: {error}") from None
        except MemoryError:
            # What Python's parser makes of deep code.
            raise ValueError("chat template: it nests too deeply") from None
        self._template = jinja2.Template.from_code(environment, code, dict(environment.globals))
        self._special_tokens = dict(special_tokens)
        # Roles are compared as string literals; a template without this one would refuse it, or
        # write a header that the model has never seen.
        self._knows_developer = "developer" in source
        self.knows_calls = "tool_calls" in source
        self.source = source
        self._forms = self._find_forms(tree)

    def uses(self, variable: str) -> bool:
        """True for a variable that the template reads."""
        return variable in self._variables

    @property
    def knows_tools(self) -> bool:
        """True where the template describes tools to the model; where not, ``render`` does."""
        return self.uses("tools")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        as_given: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text, special tokens included.

        ``content`` may be text or a list of text parts, a call's ``arguments`` an object or JSON
        text: the template gets the form it is written for. Parts for a template that writes text
        only are joined by line feeds, as vLLM and llama.cpp join them.
        ``continue_final_message`` ends the prompt inside the last message, for the model to go on.
        ``tools`` that the template does not know are described in the system text, or the user's
        where it refuses one (``text/tool_prompt.py``); calls that it refuses come in other forms
        (``text/call_turns.py``), unless ``as_given``.

        Raises:
            BadRequestError: the template refuses the messages, fails on them, or takes more than
                its bounds of time and size.
        """
        variables |= {"tools": tools or None, "documents": documents}
        variables["add_generation_prompt"] = add_generation_prompt
        began_s, failures = time.monotonic(), list[BadRequestError]()
        for given in call_forms(messages):
            try:
                return self._render_described(given, variables, continue_final_message)
            except BadRequestError as error:
                failures.append(error)
            # One that takes its time is not asked again.
            if as_given or time.monotonic() - began_s > MAX_RENDER_S / 2:
                break
        raise failures[0]

    def _render_described(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        continue_final_message: bool,
    ) -> str:
        """Render with the tools described, whatever the template knows of them."""
        if self.knows_tools:
            return self._render_calls(messages, variables, continue_final_message)
        if not self.knows_calls and any(message.get("tool_calls") for message in messages):
            messages = plain_calls(messages)
        if not (tools := variables["tools"]):
            return self._render_calls(messages, variables, continue_final_message)
        text = tool_text(tools, explains_calls=not self.knows_calls)
        try:
            described = with_system_text(messages, text)
            return self._render_calls(described, variables, continue_final_message)
        except BadRequestError as error:
            described = with_user_text(messages, text)
            try:
                return self._render_calls(described, variables, continue_final_message)
            except BadRequestError:
                raise error from None

    def _render_calls(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        continue_final_message: bool,
    ) -> str:
        """Render with arguments in the template's form, or in the other where that fails."""
        form = self._forms.arguments
        try:
            return self._render(messages, variables, form, continue_final_message)
        except BadRequestError as error:
            if not any(message.get("tool_calls") for message in messages):
                raise
            # Calls that differ from those it was asked with.
            other: ArgumentsForm = "text" if form == "object" else "object"
            try:
                return self._render(messages, variables, other, continue_final_message)
            except BadRequestError:
                raise error from None

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        arguments: ArgumentsForm,
        continue_final_message: bool,
    ) -> str:
        plain = [self._plain_message(message, arguments) for message in messages]
        final_text = _mark_end(plain) if continue_final_message else None
        _budget.deadline = time.monotonic() + MAX_RENDER_S
        text = self._run({**self._special_tokens, **variables, "messages": plain})
        return text if final_text is None else _cut_at_tag(text, final_text)

    def _find_forms(self, tree: nodes.Template) -> TemplateForms:
        # All questions together may take as long as one render.
        deadline = time.monotonic() + MAX_RENDER_S

        def render(
            messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
        ) -> str:
            _budget.deadline = deadline
            variables = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": False,
            }
            if time.monotonic() > deadline:
                raise BadRequestError("the chat template takes too long", "messages")
            return self._run({**self._special_tokens, **variables})

        return find_forms(render, tree)

    def _plain_message(
        self, message: Mapping[str, Any], arguments: ArgumentsForm
    ) -> dict[str, Any]:
        plain = dict(message)
        calls = plain.get("tool_calls")
        plain["content"] = self._content(plain, bool(calls))
        if plain.get("role") == "developer" and not self._knows_developer:
            plain["role"] = "system"
        if calls:
            plain["tool_calls"] = [_plain_tool_call(call, arguments) for call in calls]
        reasoning = next((plain[key] for key in _REASONING_FIELDS if plain.get(key)), None)
        if reasoning is not None:
            names = dict.fromkeys(_REASONING_FIELDS, reasoning)
            plain = {**names, **plain, "reasoning_content": reasoning}
        return plain

    def _content(self, message: Mapping[str, Any], calls: bool) -> Any:
        """A message's content in a form that the template takes."""
        content = message.get("content")
        if content is None:
            return None if self._forms.null_content[calls] else ""
        role = str(message.get("role"))
        role = "system" if role == "developer" else role
        forms = self._forms.content.get(role, self._forms.content["user"])
        if isinstance(content, str):
            return content if "text" in forms else [{"type": "text", "text": content}]
        if "parts" in forms:
            return [dict(part) for part in content]
        return "\n".join(part["text"] for part in content if "text" in part)

    def _run(self, variables: dict[str, Any]) -> str:
        try:
            context = self._template.new_context(variables)
            return _collect(self._template.root_render_func(context))
        except _OutOfBudget as error:
            raise BadRequestError(f"the chat template {error}", "messages") from None
        except jinja2.TemplateError as error:
            message = error.message or type(error).__name__
            raise BadRequestError(f"chat template: {message}", "messages") from None
        except RecursionError:
            raise BadRequestError("the chat template nests too deeply", "messages") from None
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # The template met data it was not written for, such as a missing field.
            raise BadRequestError(
                f"the chat template cannot render these messages ({type(error).__name__})",
                "messages",
            ) from error


def _collect(pieces: Iterable[str]) -> str:
    """Join the pieces of a render, within limits of size and time."""
    parts: list[str] = []
    num_chars = 0
    for piece in pieces:
        parts.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise _OutOfBudget("writes too much")
    if time.monotonic() > _budget.deadline:
        raise _OutOfBudget("takes too long")
    return "".join(parts)


def _plain_tool_call(call: Mapping[str, Any], form: ArgumentsForm) -> dict[str, Any]:
    """A call with its arguments as an object or as JSON text. OpenAI's clients send text."""
    plain = dict(call)
    function = plain.get("function")
    if not isinstance(function, Mapping) or "arguments" not in function:
        return plain
    arguments = function["arguments"]
    if form == "object" and isinstance(arguments, str | None):
        arguments = _as_object(arguments)
    elif form == "text" and not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    plain["function"] = {**function, "arguments": arguments}
    return plain


def _as_object(text: str | None) -> Any:
    """The object that arguments in JSON spell. A model's own broken call, played back, stays."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return {} if value is None else value


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Put the tag behind the last message's text; returns that text.

    Raises:
        BadRequestError: there is none.
    """
    content = messages[-1]["content"] if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content or []):
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _CONTINUE_TAG
            return text
    raise BadRequestError("continue_final_message needs a last message with content", "messages")


def _cut_at_tag(text: str, final_text: str) -> str:
    """The text up to the tag; without the tag's space the template trims, and so do we."""
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0 or final_text.strip() not in text:
        raise BadRequestError(
            "continue_final_message: the chat template does not keep the last message", "messages"
        )
    if text.startswith(_CONTINUE_TAG, position):
        return text[:position]
    return text[:position].rstrip()


def load_chat_template(flag: str) -> str:
    """``--chat-template``: a file's text, or the flag's own where it is a template itself.

    Raises:
        ValueError: neither a readable file nor a template.
    """
    if any(mark in flag for mark in ("{{", "{%", "\n")):
        return flag
    try:
        with open(flag, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"--chat-template: {error.strerror}: {flag}") from None
