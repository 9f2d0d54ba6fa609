"""Conversations: LLM.chat's messages as prompts, and the answers to them taken apart."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from octavo.outputs import CompletionOutput, RequestOutput, ToolCall
from octavo.sampling_params import SamplingParams
from octavo.text.answer_parts import answer_parts
from octavo.text.call_grammar import answer_constraint
from octavo.text.chat_format import ChatFormat, find_chat_format
from octavo.text.chat_template import ChatTemplate
from octavo.text.tools import ToolUse, call_id, parse_tool_use, parse_tools

if TYPE_CHECKING:
    from octavo._core import Channels
    from octavo.engine.engine_loop import EngineLoop
    from octavo.engine.prompts import Prompt
    from octavo.structured_outputs import ReasoningTokens, StructuredOutputsParams

Message = Mapping[str, Any]
T = TypeVar("T")


class Turn(NamedTuple):
    """A conversation, rendered, and how its answer is taken apart; no channels: not at all."""

    prompt: Prompt
    channels: Channels | None
    reasoning: ReasoningTokens | None
    form: ChatFormat
    use: ToolUse


class Conversations:
    """Conversations of one model, made into prompts.

    Args:
        engine: has the model and its tokenizer.
        chat_template: in place of the model's own.
    """

    def __init__(self, engine: EngineLoop, chat_template: str | None) -> None:
        self._engine = engine
        self._chat_template = chat_template
        # The format of the last template, by the template's text.
        self._format: tuple[str, ChatFormat] | None = None
        # What binds the calls of the last conversation, and of what it is made: those of a batch
        # have it in common.
        self._bound: tuple[tuple[Any, ...], StructuredOutputsParams | None] | None = None

    def render(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None,
        content_format: str,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[Turn]:
        """One conversation or several, by the arguments of ``LLM.chat``.

        Raises:
            ValueError: there is no template, or no such ``content_format``.
            InvalidParameterError: a tool is not one.
        """
        if content_format not in ("auto", "string", "openai"):
            raise ValueError(
                "chat_template_content_format must be auto, string or openai, not "
                f"{content_format!r}"
            )
        own = self._engine.source
        source = chat_template or self._chat_template
        source = source or (own.tool_template if tools else None) or own.chat_template
        if source is None:
            raise ValueError("the model has no chat template: pass chat_template")
        template = ChatTemplate(source, own.special_tokens)
        form = self._chat_format(source, template)
        use = parse_tool_use(parse_tools("tools", tools or ()))
        conversations: Iterable[Any] = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        return [
            self._render(
                template,
                form,
                use,
                list(conversation),
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
            for conversation in conversations
        ]

    def bind(self, turn: Turn, params: SamplingParams) -> SamplingParams:
        """Parameters under which the calls of an answer are of tools that there are.

        They are as with tool_choice "auto" of the server.

        Raises:
            InvalidParameterError: no grammar can be made of the tools' names.
        """
        core, use = turn.form.core, turn.use
        if core is None or not use.tools:
            return params
        wanted = params.structured_outputs
        made_of = core, use, wanted
        if self._bound is None or self._bound[0] != made_of:
            constraint = _at_once(
                answer_constraint(
                    core,
                    use,
                    turn.form.special_tokens(self._engine.tokenizer),
                    self._attempt,
                    wanted,
                )
            )
            self._bound = made_of, constraint
        constraint = self._bound[1]
        return params if constraint is None else replace(params, structured_outputs=constraint)

    async def _attempt(self, constraint: StructuredOutputsParams) -> object:
        return self._engine.grammars.compile(SamplingParams(structured_outputs=constraint))

    def take_apart(self, output: RequestOutput, turn: Turn) -> None:
        """Fill in the parts of each answer to a turn."""
        if turn.channels is None:
            return
        for sample in output.outputs:
            self._take_apart(sample, turn.channels, turn.form)

    def _render(
        self,
        template: ChatTemplate,
        form: ChatFormat,
        use: ToolUse,
        conversation: Sequence[Message],
        **variables: Any,
    ) -> Turn:
        text = template.render(conversation, tools=use.definitions, **variables)
        tokenizer = self._engine.tokenizer
        last = conversation[-1].get("content") if variables["continue_final_message"] else None
        continued = last if isinstance(last, str) else ""
        return Turn(
            # The template has written the special tokens already.
            {"prompt": text, "prompt_token_ids": tokenizer.encode(text, False)},
            form.channels(text, use, continued),
            form.reasoning_tokens(tokenizer.token_to_id, text, continued),
            form,
            use,
        )

    def _chat_format(self, source: str, template: ChatTemplate) -> ChatFormat:
        """The format of a template; the last one is kept."""
        if self._format is None or self._format[0] != source:
            declared = self._engine.source.response_template
            self._format = source, find_chat_format(template, response_template=declared)
        return self._format[1]

    def _take_apart(self, output: CompletionOutput, channels: Channels, form: ChatFormat) -> None:
        token_ids = output.token_ids
        while token_ids and token_ids[-1] in self._engine.eos_token_ids:
            token_ids = token_ids[:-1]
        text = self._engine.tokenizer.decode(token_ids, skip_special_tokens=False)
        parts = answer_parts(text, channels)
        output.content, output.reasoning = parts.content, parts.reasoning
        output.tool_calls = [
            ToolCall(call_id(form.tool_calls, name, number), name, arguments)
            for number, (name, arguments) in enumerate(parts.calls)
        ]


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing; an event loop may run already."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("there is no event loop to wait in")
