"""Client of one engine that speaks SGLang's HTTP protocol: the real one, or the embedded one.

`/generate` streams cumulative (or incremental) output; `StreamReader` turns either into new tokens and checks, chunk by
chunk, that ids, log-probs, versions and routing rows line up (I2, I9). What is missing stays missing; what contradicts
itself is an EngineProtocolError.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from engines.answers import new_token_ids, release, spellings
from engines.connection import EngineHttp, abort_quietly, failure, refused
from engines.http_engine import HttpEngine
from engines.identity import read_if_here, with_told
from engines.likeliest import likeliest
from engines.media import refuse_media
from engines.routing_rows import Int32Layout, RoutingRows, decode_routing
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    ExpertsMismatch,
    InvalidRequest,
    LengthMismatch,
    RequestError,
)
from gateway.contracts.experts import RoutedExperts, RoutingShape
from gateway.contracts.generation import (
    Capability,
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    LogprobKind,
    MediaKind,
    SamplingParams,
    TopLogprob,
)
from gateway.contracts.ports import PauseMode
from gateway.contracts.versions import VersionSpan, join_spans

logger = logging.getLogger(__name__)

_log = logging.getLogger(__name__)

_KNOWN_META = frozenset(
    (
        "id",
        "finish_reason",
        "prompt_tokens",
        "weight_version",
        "weight_versions",
        "num_retractions",
        "input_token_logprobs",
        "output_token_logprobs",
        "output_token_logprobs_length",
        "input_top_logprobs",
        "output_top_logprobs",
        "completion_tokens",
        "cached_tokens",
        "routed_experts",
    )
)
_KNOWN_TOP = frozenset(("text", "output_ids", "meta_info", "index"))
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

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new tokens, then exactly one GenerateEnd; closing early aborts the request at the engine."""
        if request.media:
            await self.check_media(request)
        if request.routed_experts_start is not None and self._routing is None:
            self._routing = (await self.identity()).routing
        reader = StreamReader(request, self._routing, self._policy_version_of, self.engine_id)
        events = self._http.events(
            "/generate", generate_body(request), routing=reader.rows, on_silence=self._check_silence
        )
        async with aclosing(read_generation(events, reader, abort=self.abort)) as items:
            async for item in items:
                yield item

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


async def read_generation(
    events: AsyncGenerator[Any, None], reader: StreamReader, *, abort: Callable[[str], Awaitable[None]]
) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
    """The items of one `/generate` stream; whatever ends it before its end, the request is aborted."""
    ended = False
    try:
        async with aclosing(events):
            async for event in events:
                chunk = reader.read(event)
                if chunk is not None:
                    yield chunk
                if reader.end is not None:
                    ended = True
                    yield reader.end
                    return
        raise EngineUnavailable(f"{reader.named}: the stream ended before the request did")
    except (EngineRejected, RequestError) as error:
        ended = True
        if reader.has_media and isinstance(error, EngineRejected):  # nearly always one that it could not read
            raise InvalidRequest(error.reason) from error
        raise
    finally:
        if not ended:
            await abort_quietly(abort, reader.request_id)


def generate_body(request: GenerateRequest) -> dict[str, JsonValue]:
    """The request in SGLang's words."""
    passed = {key: value for key, value in request.passthrough.items() if key not in _NOT_FOR_PASSTHROUGH}
    # I7: what is recorded is ours to ask for, whatever the agent's own fields say.
    body = passed | {
        "rid": request.request_id,
        "input_ids": request.token_ids.tolist(),
        "sampling_params": _sampling(request.sampling),
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    if request.cache_key:
        own = passed.get("extra_key")
        body["extra_key"] = f"{own}|{request.cache_key}" if own else request.cache_key
    for name in ("return_routed_experts", "routed_experts_start_len", "top_logprobs_num"):
        body.pop(name, None)
    if request.num_top_logprobs:
        body["top_logprobs_num"] = request.num_top_logprobs
    for kind, name in _MEDIA_FIELDS.items():
        if urls := [media.url for media in request.media if media.kind is kind]:
            body[name] = urls
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


def _sampling(sampling: SamplingParams) -> dict[str, JsonValue]:
    parameters: dict[str, JsonValue] = dict(sampling.extra) | {
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


class StreamReader:
    """One `/generate` stream as it is read; `end` is set by the event that finished the request.

    rows: takes its routing rows as they arrive, None where there will be none.
    """

    def __init__(
        self,
        request: GenerateRequest,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        engine_id: str,
    ) -> None:
        self._request = request
        self._routing = routing
        self._policy_version_of = policy_version_of
        self.request_id = request.request_id
        self.has_media = bool(request.media)
        self.named = f"engine {engine_id}, request {request.request_id}"
        self.rows = RoutingRows.of(request, routing, Int32Layout)
        self._output_ids: list[int] = []
        self._unknown_top: dict[str, JsonValue] = {}
        self._unknown_meta: dict[str, JsonValue] = {}
        self.end: GenerateEnd | None = None

    def read(self, event: Any) -> GenerateChunk | None:
        """The new tokens of one event, None if it brought none."""
        try:
            if "error" in event:
                raise failure(event["error"], self.named)
            meta = event["meta_info"]
            if self.rows is not None and not self.rows.stand_for(meta.get("routed_experts")):
                raise EngineProtocolError(f"{self.named}: a big routed_experts at an unknown place of an event")
            self._keep_unknown(event, meta)
            finish = meta["finish_reason"]
            self._refuse_failed(finish)
            chunk = self._new_tokens(event["output_ids"], meta)
            if finish is not None:
                self.end = self._ended(event, meta, finish)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineProtocolError(f"{self.named}: unreadable event ({type(error).__name__}: {error})") from error
        except (LengthMismatch, ExpertsMismatch) as error:
            raise EngineProtocolError(f"{self.named}: {error.message}") from error
        return chunk if len(chunk.token_ids) else None

    def _keep_unknown(self, event: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """I8: also what only an earlier event says; the order of keys is the latest event's."""
        for kept, fields, known in ((self._unknown_top, event, _KNOWN_TOP), (self._unknown_meta, meta, _KNOWN_META)):
            unknown = {key: value for key, value in fields.items() if key not in known}
            for key in unknown:
                kept.pop(key, None)
            kept |= unknown

    def _refuse_failed(self, finish: Any) -> None:
        """SGLang reports some refusals as an abort with a status (an ordinary abort has none)."""
        status = finish.get("status_code") if finish is not None and finish["type"] == "abort" else None
        if status is None:
            return
        if int(status) >= 500:
            raise EngineUnavailable(f"{self.named}: {finish.get('message')}")
        raise refused(str(finish.get("message")), self.named)

    def _new_tokens(self, output_ids: list[int], meta: Mapping[str, Any]) -> GenerateChunk:
        total, seen = int(meta["completion_tokens"]), len(self._output_ids)
        if len(output_ids) == total:  # cumulative
            fresh = output_ids[seen:]
            if output_ids[:seen] != self._output_ids:
                raise EngineProtocolError(f"{self.named}: the engine changed tokens that it had already sent")
        elif len(output_ids) == total - seen:  # incremental
            fresh = output_ids
        else:
            raise EngineProtocolError(
                f"{self.named}: {len(output_ids)} ids in an event that claims {total} tokens, {seen} seen before"
            )
        logprobs = self._new_logprobs(fresh, meta.get("output_token_logprobs"))
        self._output_ids += fresh
        token_ids = new_token_ids(fresh, named=self.named)
        top_logprobs = self._new_top_logprobs(fresh, logprobs, meta.get("output_top_logprobs"))
        return GenerateChunk(token_ids, logprobs, top_logprobs)

    def _new_logprobs(self, fresh: list[int], triples: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32[n]; NaN where the engine gave none (I9)."""
        if not fresh or triples is None:
            return np.full(len(fresh), np.nan, dtype=np.float32)
        if len(triples) < len(fresh):
            raise EngineProtocolError(f"{self.named}: {len(triples)} log-probs for {len(fresh)} new tokens (I2)")
        newest = triples[-len(fresh) :]
        if [triple[1] for triple in newest] != fresh:
            raise EngineProtocolError(f"{self.named}: log-probs are of other tokens than output_ids (I2)")
        return np.array([np.nan if triple[0] is None else triple[0] for triple in newest], dtype=np.float32)

    def _new_top_logprobs(
        self, fresh: list[int], logprobs: np.ndarray[Any, np.dtype[np.float32]], rows: Any
    ) -> tuple[tuple[TopLogprob, ...], ...]:
        """A row for each new token; () where none were asked for or the engine gave none (I9)."""
        wanted = self._request.num_top_logprobs
        if not fresh or not wanted or rows is None:
            return ()
        pairs = [None if row is None else [(triple[1], triple[0]) for triple in row] for row in rows[-len(fresh) :]]
        return likeliest(pairs, fresh, logprobs, most=wanted, named=self.named)

    def _ended(self, event: Mapping[str, Any], meta: Mapping[str, Any], finish: Mapping[str, Any]) -> GenerateEnd:
        num_output = len(self._output_ids)
        prompt_tokens = self._prompt_tokens(meta, finish)
        # SGLang writes media into the prompt itself: its ids are then its own, and the turn is marked so (I9).
        if prompt_tokens != len(self._request.token_ids) and not self._request.media:
            raise EngineProtocolError(
                f"{self.named}: the engine read {prompt_tokens} prompt tokens of {len(self._request.token_ids)} (I1)"
            )
        return GenerateEnd(
            finish=Finish(FinishReason(finish["type"]), finish.get("matched")),
            version_spans=self._version_spans(meta, num_output),
            routed_experts=self._routed_experts(meta.get("routed_experts"), prompt_tokens + num_output - 1),
            prompt_tokens=prompt_tokens,
            completion_tokens=num_output,
            cached_tokens=int(meta.get("cached_tokens") or 0),
            num_retractions=int(meta.get("num_retractions") or 0),
            meta_info=self._unknown_meta,
            reply_fields=self._unknown_top,
        )

    def _prompt_tokens(self, meta: Mapping[str, Any], finish: Mapping[str, Any]) -> int:
        """Of a request that was aborted while it waited, SGLang says next to nothing: it was never read."""
        if finish["type"] == "abort" and "prompt_tokens" not in meta and not self._output_ids:
            return len(self._request.token_ids)
        return int(meta["prompt_tokens"])

    def _version_spans(self, meta: Mapping[str, Any], num_output: int) -> tuple[VersionSpan, ...]:
        spans = meta.get("weight_versions")
        if spans is None:  # engines before spans: one label for the whole answer
            spans = [{"version": meta["weight_version"], "start": 0, "end": num_output}]
        return join_spans(
            VersionSpan(int(span["start"]), int(span["end"]), self._policy_version_of(str(span["version"])))
            for span in spans
        )

    def _routed_experts(self, encoded: str | None, stop: int) -> RoutedExperts | None:
        start = self._request.routed_experts_start
        if start is None or encoded is None:
            return None  # I9: missing stays missing
        if self._routing is None:
            raise EngineProtocolError(f"{self.named}: routing came, but the model's routing shape is not known")
        try:
            if self.rows is not None and encoded == self.rows.stand_in:
                return self.rows.rows(stop)
            return decode_routing(encoded, self._routing, Int32Layout, start=start, stop=stop)
        except ExpertsMismatch as error:  # I9: tokens and log-probs are sound; that its rows are missing is counted
            _log.warning("%s: %s; the turn is recorded without routing rows", self.named, error.message)
            return None
