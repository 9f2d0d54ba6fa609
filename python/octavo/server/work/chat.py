"""ChatPlan: how the answer to a conversation is bound and taken apart, whatever API it came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from octavo.errors import InvalidParameterError
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import ReasoningTokens, StructuredOutputsParams
from octavo.text.call_grammar import answer_constraint

if TYPE_CHECKING:
    from octavo._core import Channels
    from octavo.server.work.prompts import ChatPrompt
    from octavo.server.work.request import Conversation
    from octavo.server.work.served_model import ServedModel
    from octavo.text.tools import ToolUse


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """The request's settings beside the prompt, for the engine.

    Args:
        channels: how the answer is taken apart; None: it is text and nothing else.
        constraint: the grammar of its calls, in place of the request's own constraint.
        reasoning: the tokens around its reasoning, which no constraint is about.
    """

    channels: Channels | None = None
    constraint: StructuredOutputsParams | None = None
    reasoning: ReasoningTokens | None = None


# Of an answer that is text, and bound by nothing but its request.
PLAIN: Final = ChatPlan()


async def plan_chat(
    model: ServedModel,
    conversation: Conversation,
    prompt: ChatPrompt,
    use: ToolUse,
    thinking_token_budget: int | None = None,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> ChatPlan:
    """Plan the answer to a rendered conversation.

    ``sampling``: the request's own sampling parameters. Where its answer is to follow something, or
    may call tools instead, the plan's constraint allows both.

    Raises:
        InvalidParameterError: calls are insisted on, and the model has no form for them.
    """
    form = model.chat_format
    if not use.tools and form.reasoning_markers is None:
        return PLAIN
    continued = ""
    if conversation.continue_final_message:
        content = conversation.messages[-1]["content"]
        continued = content if isinstance(content, str) else ""
    has_calls = use.mode != "auto" or model.config.enable_auto_tool_choice
    channels = form.channels(prompt.text, use if has_calls else None, continued)
    constraint = None
    if use.mode in ("required", "named") and form.tool_calls is None:
        raise InvalidParameterError(
            f"tool_choice {use.mode}: no form of calls is known of this model; see "
            "--tool-call-parser",
            "tool_choice",
        )
    if form.core is not None and has_calls:
        constraint = await answer_constraint(
            form.core,
            use,
            model.special_markers,
            lambda one: _compile(model, one),
            sampling.get("structured_outputs"),
        )
    reasoning = None
    if channels is not None:
        find_id = model.engine.tokenizer.token_to_id
        reasoning = form.reasoning_tokens(find_id, prompt.text, continued, thinking_token_budget)
    return ChatPlan(channels, constraint, reasoning)


async def _compile(model: ServedModel, constraint: StructuredOutputsParams) -> object:
    return await model.engine.compile(SamplingParams(structured_outputs=constraint))
