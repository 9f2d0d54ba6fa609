"""Prompts: a request's texts or messages as token ids. Long work leaves the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from octavo.errors import RequestTooLongError, UnsupportedParameterError

if TYPE_CHECKING:
    from octavo._core import TokenIds
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.fields import Prompt
    from octavo.server.work.request import Conversation
    from octavo.server.work.served_model import ServedModel

# A render or an encode below this is shorter than a hop to a worker thread and back (~0.3 ms).
INLINE_CHARS: Final = 4096

# The longest tokens of today's vocabularies (runs of spaces or dashes) have as many characters: a
# text beyond it is refused without being encoded.
MAX_CHARS_PER_TOKEN: Final = 128


class ChatPrompt(NamedTuple):
    """A rendered conversation, as text and as token ids."""

    text: str
    token_ids: TokenIds


async def encode_chat(model: ServedModel, conversation: Conversation) -> ChatPrompt:
    """Render a conversation and encode it.

    Raises:
        BadRequestError: the template refuses the messages.
        UnsupportedParameterError: the template does not use something the request asks for.
        RequestTooLongError: the text is longer than any that could fit the context.
    """
    # No documents and an empty list of them are the same.
    documents, tools = conversation.documents or None, conversation.tools
    template = model.template(conversation.chat_template, has_tools=bool(tools))
    if documents is not None and not template.uses("documents"):
        raise UnsupportedParameterError(
            "documents is not supported: this model's chat template does not use it", "documents"
        )
    variables = _variables(model, conversation)

    def render() -> str:
        return template.render(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            documents=documents,
            tools=tools,
            **variables,
        )

    num_chars = sum(_num_chars(message["content"]) for message in conversation.messages)
    num_chars += conversation.num_tool_chars
    if num_chars <= INLINE_CHARS and template.executor is None:
        text = render()
    else:
        text = await asyncio.get_running_loop().run_in_executor(template.executor, render)
    # The template has written the special tokens already.
    token_ids = await encode(model.engine, text, conversation.add_special_tokens, "messages")
    return ChatPrompt(text, token_ids)


def _variables(model: ServedModel, conversation: Conversation) -> dict[str, Any]:
    """The template's variables: the operator's, the request's, and what its effort means."""
    variables = {**model.chat_template_kwargs, **conversation.chat_template_kwargs}
    effort = model.effort_of(conversation)
    # A hint, which clients send to every model: one without levels of effort has no use for it.
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
        toggle = model.chat_format.toggle
        if effort == "none" and toggle is not None:
            variables[toggle] = conversation.chat_template_kwargs.get(toggle, False)
    return variables


def _num_chars(content: str | list[dict[str, str]] | None) -> int:
    if isinstance(content, list):
        return sum(len(part["text"]) for part in content)
    return len(content or "")


async def encode(
    engine: AsyncEngine, text: str, add_special_tokens: bool, param: str = "prompt"
) -> TokenIds:
    """One text's token ids.

    Raises:
        RequestTooLongError: it is longer than any text that could fit the context.
    """
    least = len(text) // MAX_CHARS_PER_TOKEN
    if least > engine.max_model_len:
        raise RequestTooLongError(least, engine.max_model_len, param, at_least=True)
    return await engine.encode(text, add_special_tokens)


async def encode_prompts(
    engine: AsyncEngine, prompts: Sequence[Prompt], add_special_tokens: bool
) -> list[TokenIds]:
    """Every prompt's token ids; those given as ids stay as they are.

    Raises:
        RequestTooLongError: a text is longer than any that could fit the context.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) > 1:
        num_chars = sum(map(len, texts))
        if num_chars > INLINE_CHARS:
            batch = engine.tokenizer.encode_batch
            return await asyncio.to_thread(batch, texts, add_special_tokens)
    return [
        await encode(engine, prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
