"""agent_prompt: an agent's conversation as token ids, made to be found in the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import UnsupportedParameterError
from octavo.server.work.agent_markers import without_markers
from octavo.server.work.chat import ChatPlan, plan_chat
from octavo.server.work.prompts import encode_chat
from octavo.server.work.turns import as_turns

if TYPE_CHECKING:
    from octavo.server.work.prompts import ChatPrompt
    from octavo.server.work.request import Conversation
    from octavo.server.work.served_model import ServedModel
    from octavo.text.tools import ToolUse


async def encode_turns(model: ServedModel, conversation: Conversation, use: ToolUse) -> ChatPrompt:
    """Render and encode. The conversation's messages become turns, in place.

    Raises:
        InvalidRequestError: the template refuses them, or they are longer than any that fits.
    """
    _settle(model, conversation)
    if use.mode == "none" and model.config.exclude_tools_when_tool_choice_none:
        conversation.tools = []
    return await encode_chat(model, conversation)


async def plan_turns(
    model: ServedModel,
    conversation: Conversation,
    prompt: ChatPrompt,
    use: ToolUse,
    request_id: str,
    *,
    sampling: Mapping[str, Any],
    thinking_token_budget: int | None = None,
) -> ChatPlan:
    """Plan the answer to a prompt, and note where the prompt leaves those before it.

    ``sampling``: see ``plan_chat``. The budget is a hint: it goes without where no token ends the
    model's reasoning.

    Raises:
        InvalidParameterError: calls are insisted on, and the model has no form for them.
    """
    model.prompt_history.add(prompt.token_ids, request_id)
    try:
        return await plan_chat(model, conversation, prompt, use, thinking_token_budget, sampling)
    except UnsupportedParameterError:
        return await plan_chat(model, conversation, prompt, use, None, sampling)


def _settle(model: ServedModel, conversation: Conversation) -> None:
    """Make the messages turns without volatile markers, and set the template's switch."""
    messages = conversation.messages
    if model.config.normalize_agent_markers:
        messages = without_markers(messages)
    conversation.messages = as_turns(messages, takes_late_system=model.takes_late_system)
    toggle, effort = model.chat_format.toggle, model.effort_of(conversation)
    if toggle is not None and effort not in (None, "none"):
        # Off by default in some models.
        conversation.chat_template_kwargs.setdefault(toggle, True)
