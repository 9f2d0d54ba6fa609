"""agent_prompt: an agent's conversation as token ids, made to be found in the prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.server.work.agent_markers import without_markers
from octavo.server.work.prompts import answer_channels, encode_chat
from octavo.server.work.turns import as_turns

if TYPE_CHECKING:
    from octavo._core import Channels, TokenIds
    from octavo.server.work.request import Conversation
    from octavo.server.work.served_model import ServedModel
    from octavo.text.tools import ToolUse


async def agent_prompt(
    model: ServedModel, conversation: Conversation, tool_use: ToolUse
) -> tuple[TokenIds, Channels | None]:
    """Render and encode, and see how the answer is to be taken apart.

    The conversation's messages become turns, in place.

    Raises:
        InvalidRequestError: the template refuses them, or they are longer than any that fits.
    """
    settle(model, conversation)
    if tool_use.mode == "none" and model.config.exclude_tools_when_tool_choice_none:
        conversation.tools = []
    prompt = await encode_chat(model, conversation)
    return prompt.token_ids, answer_channels(model, conversation, tool_use, prompt.text)


def settle(model: ServedModel, conversation: Conversation) -> None:
    """Make the messages turns without volatile markers, and set the template's switch."""
    messages = conversation.messages
    if model.config.normalize_agent_markers:
        messages = without_markers(messages)
    conversation.messages = as_turns(messages, takes_late_system=model.takes_late_system)
    toggle, effort = model.chat_format.toggle, conversation.reasoning_effort
    if toggle is not None and effort not in (None, "none"):
        # Off by default in some models.
        conversation.chat_template_kwargs.setdefault(toggle, True)
