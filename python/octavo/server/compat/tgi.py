"""Text Generation Inference's /generate, /generate_stream and /info.

Sampling as TGI decides it: greedy, unless ``do_sample``, ``temperature``, ``top_k`` or ``top_p``
ask for more. The model's own defaults do not count, as they do not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from octavo import __version__
from octavo.engine.limits import truncate
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.server.compat.errors import error_body
from octavo.server.http import fields, limits
from octavo.server.http.body import Body
from octavo.server.openai.protocol import SAMPLING_FIELDS
from octavo.server.work.answer import answer
from octavo.server.work.chat import PLAIN
from octavo.server.work.dialect import Dialect
from octavo.server.work.prompts import encode
from octavo.server.work.request import GenerationRequest

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState
    from octavo.server.work.usage import Usage

# TGI's own default.
DEFAULT_NEW_TOKENS: Final = 100

_SAMPLING: Final = {
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "top_k": "top_k",
    "top_p": "top_p",
    "max_new_tokens": "max_tokens",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
}
_PARAMETERS: Final = Body(
    {
        **{theirs: SAMPLING_FIELDS[ours] for theirs, ours in _SAMPLING.items()},
        "max_new_tokens": fields.integer(1),
        # Its range in TGI: 0 is no temperature.
        "temperature": fields.number(exclusiveMinimum=0),
        "do_sample": fields.boolean,
        "return_full_text": fields.boolean,
        "truncate": fields.integer(1),
        "details": fields.boolean,
        "decoder_input_details": fields.boolean,
        "top_n_tokens": fields.integer(0, 20),
    },
    refused={
        "best_of": (1,),
        "typical_p": (1, 1.0),
        "watermark": (False,),
        "grammar": (),
        "adapter_id": (),
    },
)


@fields.check(type="object")
def _parameters(name: str, value: Any) -> dict[str, Any]:
    try:
        return _PARAMETERS.clean(fields.json_object(name, value))
    except (InvalidParameterError, UnsupportedParameterError) as error:
        error.param = f"{name}.{error.param}"
        raise


BODY: Final = Body(
    {"inputs": fields.string(least_chars=1), "parameters": _parameters, "stream": fields.boolean},
    required=("inputs",),
)


@dataclass(slots=True, kw_only=True)
class TgiRequest(GenerationRequest):
    """A checked request."""

    inputs: str
    truncate_prompt_tokens: int | None = None
    details: bool = False
    full_text: bool = False
    with_prefill: bool = False
    num_top: int = 0

    def sampling_params(self, defaults: Mapping[str, Any]) -> Any:
        """The request's values alone."""
        return GenerationRequest.sampling_params(self, {})


def parse(body: Mapping[str, Any], stream: bool) -> TgiRequest:
    """Check a body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = BODY.clean(body)
    given = clean.get("parameters", {})
    if clean.get("stream", stream) != stream:
        raise InvalidParameterError("stream has a route of its own: /generate_stream", "stream")
    sampling = {ours: given[theirs] for theirs, ours in _SAMPLING.items() if theirs in given}
    sampling.setdefault("max_tokens", DEFAULT_NEW_TOKENS)
    if not given.get("do_sample") and not {"temperature", "top_k", "top_p"} & given.keys():
        sampling["temperature"] = 0.0
    with_prefill = given.get("decoder_input_details", False)
    if with_prefill and stream:
        raise InvalidParameterError(
            "decoder_input_details belongs to whole answers", "parameters.decoder_input_details"
        )
    request = TgiRequest(
        sampling=sampling,
        stream=stream,
        inputs=clean["inputs"],
        truncate_prompt_tokens=given.get("truncate"),
        details=given.get("details", False) or with_prefill,
        full_text=given.get("return_full_text", False),
        with_prefill=with_prefill,
        num_top=given.get("top_n_tokens", 0),
    )
    if request.details or stream:
        # Each token's own, and its best rivals'.
        sampling["logprobs"] = request.num_top
        request.num_logprobs = {"parameters.top_n_tokens": request.num_top}
    if with_prefill:
        sampling["prompt_logprobs"] = 0
    return request


class TgiDialect:
    """``is_stream``: of /generate_stream. ``in_list``: the answer is the one item of a list."""

    media_type = "text/event-stream"
    ping = early_ping = b":\n\n"
    error_body = staticmethod(error_body)

    def __init__(self, *, is_stream: bool, in_list: bool = False) -> None:
        self._is_stream = is_stream
        self._in_list = in_list

    def parse(self, body: Mapping[str, Any]) -> TgiRequest:
        """See ``parse``."""
        return parse(body, self._is_stream)

    async def reply(self, request: TgiRequest, model: ServedModel, request_id: str) -> TgiReply:
        """Encode the prompt.

        Raises:
            InvalidRequestError: it is longer than any that fits.
        """
        prompt = await encode(model.engine, request.inputs, True, "inputs")
        most = request.truncate_prompt_tokens
        if most is not None:
            # TGI's bound is the context's, whatever a client sends.
            prompt = truncate(
                prompt, min(most, model.engine.max_model_len), model.engine.max_model_len
            )
        return TgiReply(request, model, [prompt], in_list=self._in_list)


class TgiReply:
    """One sample: an event a token."""

    prompt_field = "inputs"

    def __init__(
        self,
        request: TgiRequest,
        model: ServedModel,
        prompts: Sequence[TokenIds],
        *,
        in_list: bool,
    ) -> None:
        self.prompts = prompts
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = PLAIN
        self._request = request
        self._in_list = in_list
        self._texts = model.token_texts
        # Of the stream: its text, its tokens.
        self._text = request.inputs if request.full_text else ""
        self._count = 0

    def templates(self) -> list[SseTemplate] | None:
        """None: each token has an id and a logprob."""
        return None

    def start(self, index: int) -> bytes:
        """Nothing: the first token opens the stream."""
        return b""

    def text(self, index: int, news: News) -> bytes:
        """An event per token."""
        return b"".join(map(_event, self._tokens(news)))

    def end(self, index: int, news: News) -> bytes:
        """The last tokens; the last one has the whole text."""
        events = self._tokens(news)
        if not events:
            # A stop string held everything back.
            events = [{"index": self._count, "token": self._token(0, 0.0, "")}]
        last = events[-1]
        last["generated_text"] = self._text
        last["details"] = {
            "finish_reason": finish_reason(news),
            "generated_tokens": news.num_output_tokens,
            "seed": self._request.sampling.get("seed"),
            "input_length": news.num_prompt_tokens,
        }
        return b"".join(map(_event, events))

    def _tokens(self, news: News) -> list[dict[str, Any]]:
        """An event per token. The text belongs to the last that is part of it: where several come
        at once, a character may have taken them all."""
        self._text += news.text
        events = []
        for candidates in news.logprobs or ():
            self._count += 1
            token_id, logprob, _ = candidates[0]
            event: dict[str, Any] = {
                "index": self._count,
                "token": self._token(token_id, logprob, ""),
                "generated_text": None,
                "details": None,
            }
            if self._request.num_top:
                event["top_tokens"] = self._top(candidates)
            events.append(event)
        plain = [event["token"] for event in events if not event["token"]["special"]]
        if plain:
            plain[-1]["text"] = news.text
        return events

    def _token(self, token_id: int, logprob: float, text: str | None) -> dict[str, Any]:
        own = self._texts[token_id]
        shown = own.text if text is None or own.is_special else text
        return {"id": token_id, "text": shown, "logprob": logprob, "special": own.is_special}

    def _top(self, candidates: Sequence[tuple[int, float, int]]) -> list[dict[str, Any]]:
        best = candidates[1 : 1 + self._request.num_top]
        return [self._token(token_id, logprob, None) for token_id, logprob, _ in best]

    def close(self, usage: Usage) -> bytes:
        """Nothing: the stream ends with its last token."""
        return b""

    def error(self, error: BaseException) -> bytes:
        """The error's object as an event."""
        return b"data:" + error_body(error) + b"\n\n"

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        """The text, and what is known of its tokens."""
        one, request = news[0], self._request
        answer: dict[str, Any] = {"generated_text": self._text + one.text}
        if request.details:
            positions = one.logprobs or []
            answer["details"] = {
                "finish_reason": finish_reason(one),
                "generated_tokens": one.num_output_tokens,
                "seed": request.sampling.get("seed"),
                "prefill": self._prefill() if request.with_prefill else [],
                "tokens": [self._token(*candidates[0][:2], None) for candidates in positions],
                "best_of_sequences": None,
            }
            if request.num_top:
                answer["details"]["top_tokens"] = [self._top(one) for one in positions]
        return orjson.dumps([answer] if self._in_list else answer)

    def _prefill(self) -> list[dict[str, Any]]:
        """The prompt's tokens; nothing precedes the first."""
        ids = list(self.prompts[0])
        scores = self.scores.get(0)
        logprobs = [None] if scores is None else [None, *(row[0][1] for row in scores.positions(0))]
        return [
            {"id": token_id, "text": self._texts[token_id].text, "logprob": logprob}
            for token_id, logprob in zip(ids, logprobs, strict=True)
        ]


def finish_reason(news: News) -> str:
    """TGI's word for a sample's end."""
    if news.finish_reason == "length":
        return "length"
    return "stop_sequence" if isinstance(news.stop_reason, str) else "eos_token"


def _event(value: dict[str, Any]) -> bytes:
    return b"data:" + orjson.dumps(value) + b"\n\n"


WHOLE: Final[Dialect[TgiRequest]] = TgiDialect(is_stream=False)
STREAM: Final[Dialect[TgiRequest]] = TgiDialect(is_stream=True)
ITEM: Final[Dialect[TgiRequest]] = TgiDialect(is_stream=False, in_list=True)


async def generate(state: ServerState, exchange: Exchange) -> None:
    """Continue a text."""
    await answer(WHOLE, state, exchange)


async def generate_stream(state: ServerState, exchange: Exchange) -> None:
    """The same, a token at a time."""
    await answer(STREAM, state, exchange)


async def root(state: ServerState, exchange: Exchange) -> None:
    """Either, by the body's ``stream``: huggingface_hub's clients know one address alone."""
    is_stream = (await exchange.peek()).get("stream") is True
    await answer(STREAM if is_stream else ITEM, state, exchange)


async def info(state: ServerState, exchange: Exchange) -> None:
    """The model and the server's limits."""
    model = state.model()
    most = model.engine.max_model_len
    config = model.engine.config
    await exchange.respond_json(
        {
            "model_id": model.names[0],
            "model_sha": config.revision,
            "model_dtype": config.dtype,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": model.engine.max_unfinished,
            "max_best_of": 1,
            "max_stop_sequences": limits.MAX_STOP_STRINGS,
            "max_input_tokens": most - 1,
            "max_total_tokens": most,
            "max_client_batch_size": 1,
            "router": "octavo",
            "version": __version__,
        }
    )
