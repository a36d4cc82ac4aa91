"""Client of an upstream that speaks OpenAI's `/v1/completions` and text only: usable for agents, never for training.

The `Engine` Protocol passes token ids, so the prompt is decoded to text here and the upstream's text is encoded again.
Those ids are not what was sampled (a model may spell a text in many ways, and its end token is not in the text at
all): `token_exact` is False, turns are recorded with `untrainable_reason` "text_only_engine", and log-probs are NaN
even where the upstream has some, for they belong to its tokens and not to ours (I1, I9).

What does not fit and is not attempted: upstreams with chat routes only (messages cannot be had back from ids);
`stop_token_ids` other than through the upstream's own end of turn; pausing, which here only holds new requests back. An
upstream that puts a begin token before every prompt will put it before one that has one already.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from engines.connection import EngineHttp, parsed
from engines.http_engine import HttpEngine
from engines.media import refuse_media
from engines.refusals import failure
from gateway.contracts.errors import EngineError, EngineProtocolError, EngineUnavailable, InvalidRequest
from gateway.contracts.generation import (
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    LogprobKind,
    TokenIds,
)
from gateway.contracts.ports import PauseMode
from gateway.contracts.versions import VersionSpan, join_spans

_LAST_WORD = re.compile(r"\s+\S*\Z")
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
}
_KNOWN_TOP = frozenset(("id", "object", "created", "model", "choices", "usage"))
_NOT_FOR_PASSTHROUGH = frozenset(("best_of", "echo", "n", "suffix"))
_CONSTRAINTS = frozenset(("ebnf", "json_schema", "regex", "stop_regex", "structural_tag"))
"""Sampling fields that `/v1/completions` has no word for, and whose silent loss would change what is sampled."""
_NAMES = {"min_new_tokens": "min_tokens"}
"""Sampling fields that are named otherwise by those of these upstreams that know them."""

_CONTROL_SECONDS = 60.0
_HEALTH_SECONDS = 5.0


class OpenAiTextEngine(HttpEngine):
    """One text-only upstream (implements `gateway.contracts.ports.Engine` as far as text goes).

    url: without `/v1`. decode, encode: of the gateway's tokenizer; control tokens must survive both ways. Its weights
    are policy 0 for ever. idle_timeout_seconds: longest silence of a stream.
    """

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        decode: Callable[[TokenIds], str],
        encode: Callable[[str], TokenIds],
        connect_timeout_seconds: float = 5.0,
        idle_timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        super().__init__(
            EngineHttp(
                url,
                engine_id=engine_id,
                connect_timeout_seconds=connect_timeout_seconds,
                idle_timeout_seconds=idle_timeout_seconds,
                api_key=api_key,
            )
        )
        self._decode = decode
        self._encode = encode
        self._model: str | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._live: dict[str, asyncio.Event] = {}

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new text as ids, whole words at a time, then one GenerateEnd; closing early closes the connection."""
        refuse_media(request, (), named="this engine")
        await self._running.wait()
        text = TextStream(self._encode, f"engine {self.engine_id}, request {request.request_id}")
        aborted = self._live[request.request_id] = asyncio.Event()
        try:
            async with self._http.stream("/v1/completions", await self._body(request)) as events:
                while not aborted.is_set() and (payloads := await events.next()):
                    for payload in payloads:
                        chunk = text.read(parsed(payload, text.named))
                        if chunk is not None:
                            yield chunk
            if (rest := text.rest()) is not None:
                yield rest
            yield text.end(request, aborted=aborted.is_set())
        finally:
            self._live.pop(request.request_id, None)

    async def _body(self, request: GenerateRequest) -> dict[str, JsonValue]:
        sampling = request.sampling
        passed = {key: value for key, value in request.passthrough.items() if key not in _NOT_FOR_PASSTHROUGH}
        body = passed | {
            "model": await self._model_name(),
            "prompt": self._decode(request.token_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if lost := sorted(sampling.extra.keys() & _CONSTRAINTS):
            raise InvalidRequest(f"{', '.join(lost)}: a text-only upstream cannot be asked for it")
        extra = {_NAMES.get(name, name): value for name, value in sampling.extra.items()}
        return extra | body

    async def _model_name(self) -> str:
        if self._model is None:
            models = await self._http.get_object("/v1/models", timeout_seconds=_CONTROL_SECONDS)
            cards = models.get("data") or [{}]
            self._model = str(cards[0].get("id") or "")
        return self._model

    async def identity(self) -> EngineIdentity:
        """What little an upstream says: the name of its first model."""
        return EngineIdentity(
            engine_id=self.engine_id,
            url=self.url,
            kind="openai",
            model_path="",
            served_model_name=await self._model_name(),
            weight_version="default",
            policy_version=0,
            logprob_kind=LogprobKind.RAW,
            captures_experts=False,
            routing=None,
            context_length=0,
            vocab_size=0,
            fingerprints={},
            token_exact=False,
        )

    async def tokenize(self, texts: Sequence[str]) -> None:
        """Not to be asked: nothing here depends on the upstream's ids."""

    async def healthy(self) -> bool:
        """Whether it lists its models."""
        try:
            return await self._http.get_status("/v1/models", timeout_seconds=_HEALTH_SECONDS) == 200
        except EngineError:
            return False

    async def abort(self, request_id: str) -> None:
        """End one request after its next event, with what it has; unknown ids are fine."""
        if request_id in self._live:
            self._live[request_id].set()

    async def pause(self, mode: PauseMode) -> None:
        """Hold new requests back; with ABORT running ones end, else they go on (nobody can stop the upstream)."""
        self._running.clear()
        if mode is PauseMode.ABORT:
            for request_id in list(self._live):
                await self.abort(request_id)

    async def resume(self) -> None:
        """Let them go."""
        self._running.set()


class TextStream:
    """An upstream's text as it comes, cut into ids before the last word, so that no control token is cut in two."""

    def __init__(self, encode: Callable[[str], TokenIds], named: str) -> None:
        self._encode = encode
        self.named = named
        self._held = ""
        self._num_output = 0
        self._finish: Finish | None = None
        self._reply_fields: dict[str, JsonValue] = {}

    def read(self, event: Any) -> GenerateChunk | None:
        """The ids of the words that one event completed."""
        try:
            if "error" in event:
                raise failure(event["error"], self.named)
            self._reply_fields |= {key: value for key, value in event.items() if key not in _KNOWN_TOP}
            for choice in event["choices"]:
                self._held += choice.get("text") or ""
                if choice.get("finish_reason") is not None:
                    self._finish = Finish(_REASONS.get(choice["finish_reason"], FinishReason.STOP))
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineProtocolError(f"{self.named}: unreadable event ({type(error).__name__}: {error})") from error
        cut = _LAST_WORD.search(self._held)
        return None if cut is None else self._take(cut.start())

    def rest(self) -> GenerateChunk | None:
        """The ids of what was held back."""
        return self._take(len(self._held))

    def end(self, request: GenerateRequest, *, aborted: bool) -> GenerateEnd:
        """The end; raises EngineUnavailable if the upstream did not say that it is one."""
        if self._finish is None and not aborted:
            raise EngineUnavailable(f"{self.named}: the stream ended before the request did")
        return GenerateEnd(
            finish=self._finish or Finish(FinishReason.ABORT),
            version_spans=join_spans([VersionSpan(0, self._num_output, 0)]),
            routed_experts=None,
            prompt_tokens=len(request.token_ids),
            completion_tokens=self._num_output,
            cached_tokens=0,
            num_retractions=0,
            meta_info={},
            reply_fields=self._reply_fields,
        )

    def _take(self, length: int) -> GenerateChunk | None:
        taken, self._held = self._held[:length], self._held[length:]
        if not taken:
            return None
        token_ids = self._encode(taken)
        self._num_output += len(token_ids)
        return GenerateChunk(token_ids, np.full(len(token_ids), np.nan, dtype=np.float32))
