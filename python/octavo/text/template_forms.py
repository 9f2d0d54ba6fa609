"""TemplateForms: the shapes of messages that a chat template is written for.

Templates disagree, and none says which it takes: content as text or as a list of parts, null where
a message has none or empty text, a call's arguments as an object or as JSON text. The template is
asked: once, when it is loaded, it renders small conversations of either shape, and what it writes
tells. Where that does not (it refuses all of them), its syntax tree does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from jinja2 import nodes

from octavo.errors import BadRequestError

ContentForm = Literal["text", "parts"]
# Renders messages, with tools or none.
Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]

ROLES: Final = ("user", "system", "assistant", "tool")

# Words that no template holds. Templates cut at "</think>", trim, and change case at most.
_MARKS: Final = ("octavoprobeone", "octavoprobetwo")
_NAME, _KEY, _VALUE = "octavoprobecall", "octavoprobekey", "octavoprobevalue"
# Mistral's templates insist on nine characters.
_CALL_ID: Final = "octavo000"
_TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Probe.",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
        },
    },
)
_QUESTION: Final[dict[str, Any]] = {"role": "user", "content": "question"}
_ARGUMENTS: Final = {_KEY: _VALUE}
_ARGUMENTS_TEXT: Final = f'{{"{_KEY}": "{_VALUE}"}}'


@dataclass(frozen=True)
class TemplateForms:
    """The forms of messages that a template takes.

    ``content``: role -> the forms that it writes in full; both are left as they come.
    ``null_content``: whether a message without content keeps null, by whether it calls tools.
    ``arguments``: the form of a call's arguments.
    """

    content: Mapping[str, frozenset[ContentForm]]
    null_content: Mapping[bool, bool]
    arguments: Literal["object", "text"]


def find_forms(render: Render, tree: nodes.Template) -> TemplateForms:
    """Ask a template. ``render`` raises BadRequestError where it fails."""
    arguments = _find_arguments(render)
    fallback: frozenset[ContentForm] = frozenset(["parts" if iterates_content(tree) else "text"])
    content: dict[str, frozenset[ContentForm]] = {}
    for role in ROLES:
        found = _find_content(render, role, arguments)
        # A role that the template leaves out is like the user's.
        content[role] = found or content.get("user", fallback)
    asks = asks_none(tree)
    null_content = {
        calls: _keeps_null(render, calls, arguments, content["user"], asks)
        for calls in (False, True)
    }
    return TemplateForms(content, null_content, arguments)


# --------------------------------------------------------------------------- content


def _find_content(
    render: Render, role: str, arguments: Literal["object", "text"]
) -> frozenset[ContentForm]:
    """The forms in which all of a message's text is written; none: no answer."""
    found: set[ContentForm] = set()
    for form in ("text", "parts"):
        for conversation in _conversations(role, form, arguments):
            if _writes_marks(_try(render, conversation, _TOOLS if role == "tool" else None)):
                found.add(form)
                break
    return frozenset(found)


def _conversations(
    role: str, form: ContentForm, arguments: Literal["object", "text"]
) -> Iterator[list[dict[str, Any]]]:
    """Conversations that hold a marked message; the first that renders counts."""

    def shaped(texts: Sequence[str]) -> Any:
        if form == "text":
            return " ".join(texts)
        return [{"type": "text", "text": text} for text in texts]

    question = {"role": "user", "content": shaped(["question"])}
    answer = {"role": "assistant", "content": shaped(["answer"])}
    marked = {"role": role, "content": shaped(_MARKS)}
    match role:
        case "user":
            yield [marked]
            yield [{"role": "system", "content": shaped(["rule"])}, marked]
            yield [question, answer, marked]
        case "system":
            yield [marked, question]
        case "assistant":
            yield [question, marked, question]
            yield [question, marked]
        case _:
            call = {**answer, "tool_calls": [_call(arguments)]}
            result = {**marked, "tool_call_id": _CALL_ID, "name": _NAME}
            yield [question, call, result]
            yield [question, {**call, "content": ""}, result]


def _writes_marks(text: str | None) -> bool:
    """True if both marks are there, in order, and not as parts of a printed list."""
    if text is None:
        return False
    first, second = (text.find(mark) for mark in _MARKS)
    if not 0 <= first < second:
        return False
    return not text[:first].endswith(("'text': '", '"text": "', '"text":"'))


# -------------------------------------------------------------------- calls, null


def _call(form: Literal["object", "text"]) -> dict[str, Any]:
    arguments = _ARGUMENTS if form == "object" else _ARGUMENTS_TEXT
    function = {"name": _NAME, "arguments": arguments}
    return {"id": _CALL_ID, "type": "function", "function": function}


def _find_arguments(render: Render) -> Literal["object", "text"]:
    """The form in which a call's arguments are written as they are; objects are the rule."""
    as_object = _render_call(render, "object")
    if as_object is not None and f"{{'{_KEY}': " not in as_object:
        return "object"
    as_text = _render_call(render, "text")
    # Escaped quotes: the text was written as a string within JSON.
    if as_text is not None and f'\\"{_KEY}' not in as_text:
        return "text"
    return "object"


def _render_call(render: Render, form: Literal["object", "text"]) -> str | None:
    """A conversation with a call, where the call is written in full."""
    for content in ("", None, [{"type": "text", "text": "answer"}]):
        message = {"role": "assistant", "content": content, "tool_calls": [_call(form)]}
        question: dict[str, Any] = _QUESTION
        if isinstance(content, list):
            question = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        for tools in (_TOOLS, None):
            text = _try(render, [question, message], tools)
            if text is None:
                continue
            # The tools may be described before it; a template may leave out the name.
            written = text.partition(_NAME)[2] or text
            if _KEY in written and _VALUE in written:
                return text
    return None


def _keeps_null(
    render: Render,
    calls: bool,
    arguments: Literal["object", "text"],
    user_forms: frozenset[ContentForm],
    asks: bool,
) -> bool:
    """True if null content is understood: told from empty text, not failed on and not printed.

    ``asks``: whether the template asks for null, where the two are written alike.
    """
    question = dict(_QUESTION)
    if "text" not in user_forms:
        question["content"] = [{"type": "text", "text": "question"}]

    def rendered(content: str | None) -> str | None:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [_call(arguments)]
        return _try(render, [question, message, question], _TOOLS if calls else None) or _try(
            render, [question, message], _TOOLS if calls else None
        )

    null, empty = rendered(None), rendered("")
    if null is None or empty is None:
        return null is not None
    if null == empty:
        return asks
    return all(null.count(word) <= empty.count(word) for word in ("None", "null"))


def _try(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> str | None:
    try:
        return render(messages, tools)
    except BadRequestError:
        return None


# ------------------------------------------------------------------------ syntax tree


def iterates_content(tree: nodes.Template) -> bool:
    """True if a loop runs over a message's content, or over a variable that was set to it, or one
    of its parts is named by a number."""
    names: set[str] = set()
    # A variable may be set from one that is set further down, as in a macro: twice is enough.
    for _ in range(2):
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    parts = [field.node for field in tree.find_all(nodes.Getattr)]
    parts += [field.node for field in tree.find_all(nodes.Getitem)]
    return loops or any(_is_part(part, names) for part in parts)


def asks_none(tree: nodes.Template) -> bool:
    """True if a message's content is tested for null."""
    names: set[str] = set()
    return any(
        test.name == "none" and _is_content(test.node, names) for test in tree.find_all(nodes.Test)
    ) or any(
        _is_content(compare.expr, names) and any(op.expr == nodes.Const(None) for op in compare.ops)
        for compare in tree.find_all(nodes.Compare)
    )


def _is_part(node: nodes.Node, names: set[str]) -> bool:
    """True for ``content[0]``. It counts where a field of it is taken: a text has
    characters, too."""
    match node:
        case nodes.Getitem(node=whole, arg=nodes.Const(value=int())):
            return _is_content(whole, names)
    return False


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
        case nodes.Filter(node=inner) if inner is not None:
            return _is_content(inner, names)
        case nodes.CondExpr(expr1=first, expr2=second):
            return any(_is_content(part, names) for part in (first, second) if part is not None)
    return False
