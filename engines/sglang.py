"""Client of one engine that speaks SGLang's HTTP protocol: the real one, or the embedded one.

What it streams is read by `engines.sglang_stream`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from engines.answers import release, spellings
from engines.connection import EngineHttp, EventStream
from engines.event_stream import EventReader
from engines.http_engine import HttpEngine
from engines.identity import read_if_here, with_told
from engines.media import refuse_media
from engines.sglang_stream import StreamReader, read_generation
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
)
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import (
    Capability,
    EngineIdentity,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    LogprobKind,
    MediaKind,
    SamplingParams,
)
from gateway.contracts.ports import PauseMode

logger = logging.getLogger(__name__)

_MEDIA_FIELDS: Mapping[MediaKind, str] = {kind: f"{kind.value}_data" for kind in MediaKind}
_NOT_FOR_PASSTHROUGH = frozenset(("text", "input_embeds", *_MEDIA_FIELDS.values()))
"""Another prompt beside `input_ids` would leave it to the engine which one counts (I1)."""

_ENABLING = {
    Capability.ROUTED_EXPERTS: "start it with --enable-return-routed-experts, on a model that has experts",
    Capability.RAW_LOGPROBS: "start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment",
    Capability.SCALED_LOGPROBS: "start it without SGLANG_RETURN_ORIGINAL_LOGPROB",
    Capability.VERSION_SPANS: "SGLang says them from 0.5.23 on",
    Capability.GRAMMAR: "start it with --grammar-backend xgrammar",
}
_FIRST_WITH_SPANS = (0, 5, 23)
_UNDERSTANDS = {
    "has_image_understanding": (MediaKind.IMAGE, MediaKind.VIDEO),
    "has_audio_understanding": (MediaKind.AUDIO,),
}

_CONTROL_SECONDS = 60.0


class SglangEngine(HttpEngine):
    """One engine process behind SGLang's protocol (implements `gateway.contracts.ports.Engine`).

    routing: the model's shape, None for a dense model or to learn it from the engine's own folder. policy_version_of:
    the engine's weight label → our version; raises EngineProtocolError for labels it does not know. context_length: 0
    asks the engine. idle_timeout_seconds: longest silence of a stream (a paused engine is silent);
    first_byte_timeout_seconds: before its first byte. stall_timeout_seconds: after so much silence the engine is asked
    whether it lives; no answer within probe_timeout_seconds ends the stream.
    """

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        context_length: int = 0,
        connect_timeout_seconds: float = 5.0,
        idle_timeout_seconds: float = 600.0,
        first_byte_timeout_seconds: float | None = None,
        stall_timeout_seconds: float = 10.0,
        probe_timeout_seconds: float = 5.0,
        api_key: str | None = None,
    ) -> None:
        super().__init__(
            EngineHttp(
                url,
                engine_id=engine_id,
                connect_timeout_seconds=connect_timeout_seconds,
                idle_timeout_seconds=idle_timeout_seconds,
                first_byte_timeout_seconds=first_byte_timeout_seconds,
                stall_timeout_seconds=stall_timeout_seconds,
                api_key=api_key,
            )
        )
        self._probe_timeout_seconds = probe_timeout_seconds
        self._routing = routing
        self._policy_version_of = policy_version_of
        self._context_length = context_length
        self._tokenizes = True
        self._media: tuple[MediaKind, ...] | None = None

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new tokens, then exactly one GenerateEnd; closing early aborts the request at the engine."""
        return read_generation(partial(self._prepare, request), abort=self.abort)

    async def _prepare(self, request: GenerateRequest) -> tuple[EventStream, StreamReader]:
        if request.media:
            await self.check_media(request)
        if request.routed_experts_start is not None and self._routing is None:
            self._routing = (await self.identity()).routing
        reader = StreamReader(request, self._routing, self._policy_version_of, self.engine_id)
        events = EventReader(reader.rows)
        body = generate_body(request)
        return EventStream(self._http, "/generate", body, reader=events, on_silence=self._check_silence), reader

    async def _check_silence(self) -> None:
        """Raise EngineTimeout unless the engine still answers: one that hangs keeps its connections open."""
        if not await self.healthy():
            raise EngineTimeout(f"engine {self.engine_id} at {self.url} is silent and does not answer its health check")

    async def check_media(self, request: GenerateRequest) -> None:
        """Raise InvalidRequest for media that the model would ignore in silence, by what the engine last said of it."""
        if self._media is None:
            self._media = _media_of(await self._http.get_object("/model_info", timeout_seconds=_CONTROL_SECONDS))
        refuse_media(request, self._media, named="the model")

    async def identity(self) -> EngineIdentity:
        """Ask the engine who it is; files of its model folder are read where this machine has them."""
        model = await self._http.get_object("/model_info", timeout_seconds=_CONTROL_SECONDS)
        weight_version = str(model.get("weight_version") or "default")
        # Before all else is asked: one that a trainer left in the middle of a broadcast answers nothing else.
        policy_version = self._policy_version_of(weight_version)
        server = await self._http.get_object("/server_info", timeout_seconds=_CONTROL_SECONDS)
        self._tokenizes = not server.get("skip_tokenizer_init")
        self._media = _media_of(model)
        folder = await read_if_here(str(model.get("tokenizer_path") or model.get("model_path") or ""))
        own = with_told(folder, model, named=f"engine {self.engine_id}")
        raw = bool(server.get("return_original_logprob"))
        return EngineIdentity(
            engine_id=self.engine_id,
            url=self.url,
            kind="sglang",
            model_path=str(model.get("model_path") or ""),
            served_model_name=str(model.get("served_model_name") or ""),
            weight_version=weight_version,
            policy_version=policy_version,
            logprob_kind=LogprobKind.RAW if raw else LogprobKind.TEMPERATURE_SCALED,
            captures_experts=bool(server.get("enable_return_routed_experts")),
            routing=self._routing or own.routing,
            context_length=self._context_length or await self._longest_context(),
            vocab_size=own.dimensions.vocab_size,
            fingerprints=own.fingerprints,
            dimensions=own.dimensions,
            told=own.told,
            parsers={kind: str(name) for kind in ("tool_call", "reasoning") if (name := model.get(f"{kind}_parser"))},
            process=str(server.get("startup_time") or ""),
            media=self._media,
            top_logprobs=True,
            version_spans=release(server.get("version")) >= _FIRST_WITH_SPANS,
            pause_modes=tuple(mode.value for mode in PauseMode),
            grammar=server.get("grammar_backend") not in (None, "none"),
            enabling=_ENABLING,
            paused=await self._is_paused(),
        )

    async def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """Each text's ids by the engine's own tokenizer: by its `/tokenize`, or where it has none as prompts."""
        if not self._tokenizes or not texts:
            return None if texts else []
        body = {"prompt": list(texts), "add_special_tokens": False}
        try:
            raw = await self._http.post("/tokenize", body, timeout_seconds=_CONTROL_SECONDS)
            return spellings(raw, lambda answer: answer["tokens"], engine_id=self.engine_id)
        except (EngineRejected, EngineProtocolError):  # it has no such route, or another one of that name
            return await self._tokenize_as_prompts(texts)

    async def _tokenize_as_prompts(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """One token is sampled of each; the ids of a prompt come back with its log-probs."""
        body = {
            "text": list(texts),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        try:
            raw = await self._http.post("/generate", body, timeout_seconds=_CONTROL_SECONDS)
            return spellings(
                raw, lambda answers: [_prompt_ids(answer["meta_info"]) for answer in answers], engine_id=self.engine_id
            )
        except (EngineRejected, EngineProtocolError) as error:
            logger.info("engine %s cannot be asked for token ids: %s", self.engine_id, error.message)
            return None

    async def _longest_context(self) -> int:
        cards = await self._http.get_json("/v1/models", timeout_seconds=_CONTROL_SECONDS)
        match cards:
            case {"data": [{"max_model_len": int(length)}, *_]}:
                return length
        return 0

    async def healthy(self) -> bool:
        """Whether the engine says that it lives; a paused one does."""
        try:
            # Not /health, where SGLang generates a token (a second, and it fails while paused); not /ready, which is
            # false while paused.
            status = await self._http.get_status("/ping", timeout_seconds=self._probe_timeout_seconds)
            if status == 404:
                status = await self._http.get_status("/health", timeout_seconds=_CONTROL_SECONDS)
        except EngineError:
            return False
        return status == 200

    async def abort(self, request_id: str) -> None:
        """Stop one request (and those whose id it begins: SGLang matches by prefix); unknown ids are fine."""
        await self._http.post("/abort_request", {"rid": request_id}, timeout_seconds=self._probe_timeout_seconds)

    async def _is_paused(self) -> bool:
        """One that is paused lives and is not ready; engines without that route are taken for running."""
        return await self._http.get_status("/ready", timeout_seconds=_CONTROL_SECONDS) == 503

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating; new requests wait at the engine."""
        if mode is PauseMode.ABORT and await self._is_paused():
            # Requests that stand still in place cannot end: SGLang would wait for them for ever, and never continue.
            await self._http.post(
                "/pause_generation", {"mode": PauseMode.RETRACT.value}, timeout_seconds=_CONTROL_SECONDS
            )
        await self._http.post("/pause_generation", {"mode": mode.value}, timeout_seconds=_CONTROL_SECONDS)

    async def resume(self) -> None:
        """Go on."""
        await self._http.post("/continue_generation", {}, timeout_seconds=_CONTROL_SECONDS)


def generate_body(request: GenerateRequest) -> dict[str, JsonValue]:
    """The request in SGLang's words."""
    passed: dict[str, JsonValue] = {}
    if request.passthrough:
        passed = {key: value for key, value in request.passthrough.items() if key not in _NOT_FOR_PASSTHROUGH}
    # I7: what is recorded is ours to ask for, whatever the agent's own fields say.
    body = passed | {
        "rid": request.request_id,
        "input_ids": request.sent_ids,
        "sampling_params": _sampling(request.sampling, request.stream_interval),
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    if request.cache_key:
        own = passed.get("extra_key")
        body["extra_key"] = f"{own}|{request.cache_key}" if own else request.cache_key
    if passed:
        for name in ("return_routed_experts", "routed_experts_start_len", "top_logprobs_num"):
            body.pop(name, None)
    if request.num_top_logprobs:
        body["top_logprobs_num"] = request.num_top_logprobs
    for media in request.media:
        body.setdefault(_MEDIA_FIELDS[media.kind], []).append(media.url)
    if request.reasons_first:
        body["require_reasoning"] = True
    if request.routed_experts_start is not None:
        body |= {"return_routed_experts": True, "routed_experts_start_len": request.routed_experts_start}
    return body


def _media_of(model: Mapping[str, Any]) -> tuple[MediaKind, ...]:
    """What a model understands besides text, by its `/model_info`; films are pictures to it."""
    return tuple(kind for told, kinds in _UNDERSTANDS.items() if model.get(told) for kind in kinds)


def _prompt_ids(meta: Mapping[str, Any]) -> list[int]:
    return [triple[1] for triple in meta["input_token_logprobs"]]


def _sampling(sampling: SamplingParams, stream_interval: int | None) -> dict[str, JsonValue]:
    parameters: dict[str, JsonValue] = {} if stream_interval is None else {"stream_interval": stream_interval}
    parameters |= {
        **sampling.extra,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        parameters["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        parameters["sampling_seed"] = sampling.seed
    return parameters
