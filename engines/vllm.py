"""Client of one vLLM server: token ids in, token ids out, over `/inference/v1/generate` (0.30 and 0.32).

A server without that route (started without `--enable-scale-out`) is asked through `/v1/completions` with ids, which
streams no routing. What it needs for training besides: `--enable-return-routed-experts` for routing, and
`VLLM_SERVER_DEV_MODE=1`, which opens the routes for pausing, aborting, weight labels and the server's configuration. A
server without them counts as one that returns no routing and keeps the weights that it was started with.

vLLM's ways that shape this client:

- Log-probs are of the unscaled distribution unless the server runs with `--logprobs-mode processed_logprobs`: then they
  are of what was sampled from, scaled by the temperature and renormalised over what min-p, top-k and top-p kept.
- 0.30 does not say which weights sampled a token: the label before and after must agree, else versions are uncertain.
- A per-request seed ends the whole CPU server as soon as some prompt is computed in parts, its own or because other
  prompts used the step up: a server on a CPU, or one that does not say, gets no seeds. The reply's meta_info says so.
- An aborted stream has no last event: no reason, no routing. It is told by `usage`, which still comes.
- `/inference/v1/generate` counts the sampled token among the N likeliest asked for: one more is asked for. More than
  `--max-logprobs` would be refused, so no more are asked for; the agent gets fewer.
- Unknown sampling parameters are ignored without a word, so names are translated, and what vLLM lacks is refused here.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.answers import release, spellings
from engines.connection import EngineHttp, abort_quietly, parsed
from engines.event_stream import EventReader
from engines.http_engine import HttpEngine
from engines.identity import FolderIdentity, read_if_here
from engines.media import refuse_media
from engines.vllm_stream import VllmStream
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineUnavailable,
    InvalidRequest,
    RequestError,
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
    SamplingParams,
)
from gateway.contracts.ports import PauseMode

logger = logging.getLogger(__name__)

_GENERATE = "/inference/v1/generate"
_COMPLETIONS = "/v1/completions"
_UNLABELLED = "default"
"""What vLLM calls the weights that it was started with."""

_LOGPROB_KINDS = {
    "raw_logprobs": LogprobKind.RAW,
    "processed_logprobs": LogprobKind.KEPT_SET,
}
_PAUSES = {
    PauseMode.ABORT: "/pause?mode=abort",
    PauseMode.IN_PLACE: "/pause?mode=keep",
    PauseMode.RETRACT: "/pause?mode=keep",
}
_RECOMPUTE = "/reset_prefix_cache?reset_running_requests=true"

_CONSTRAINTS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag"}
"""SGLang's names of constrained decoding → those of vLLM's `structured_outputs`."""
_UNSUPPORTED = ("stop_regex",)
_SAMPLING_OF_VLLM = frozenset(
    (
        "allowed_token_ids",
        "bad_words",
        "repetition_detection",
        "skip_special_tokens",
        "structured_outputs",
        "thinking_token_budget",
    )
)
"""Top-level fields of vLLM's OpenAI routes that `/inference/v1/generate` takes among its sampling parameters."""
_NOT_FOR_PASSTHROUGH = frozenset(
    (
        "add_special_tokens",
        "best_of",
        "content_parts",
        "echo",
        "features",
        "logprob_token_ids",
        "model",
        "n",
        "prompt_embeds",
        "prompt_logprobs",
        "suffix",
        "trace_decode_token_ids",
        "truncate_prompt_tokens",
        "use_beam_search",
    )
)
"""Fields that change the prompt, the number of answers, where the tokens come from (I1), or whose log-probs come."""

_DEFAULT_MAX_LOGPROBS = 20
_ENABLING = {
    Capability.ROUTED_EXPERTS: "start it with --enable-scale-out --enable-return-routed-experts, and with "
    "VLLM_SERVER_DEV_MODE=1 in its environment",
    Capability.RAW_LOGPROBS: "start it with --logprobs-mode raw_logprobs",
    Capability.SCALED_LOGPROBS: "start it with --logprobs-mode processed_logprobs",
    Capability.KEPT_SET_LOGPROBS: "start it with --logprobs-mode processed_logprobs",
    Capability.VERSION_SPANS: "vLLM says them from 0.32 on, if started with --enable-scale-out",
    Capability.PAUSE: "start it with VLLM_SERVER_DEV_MODE=1 in its environment",
}
_FIRST_WITH_SPANS = (0, 32)

_CONTROL_SECONDS = 60.0
_ABORT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class VllmServer:
    """What one server process is; it does not change while the process lives.

    generates: it has `/inference/v1/generate`. controllable: it has the routes for reinforcement learning. on_gpu: it
    says that it does not run on a CPU. max_logprobs: how many likeliest tokens it gives at each position. constrains:
    it can hold sampling to a grammar. release: (0, 30, 0), or less where it does not say.
    """

    generates: bool
    controllable: bool
    on_gpu: bool
    model_path: str
    served_model_name: str
    context_length: int
    captures_experts: bool
    logprob_kind: LogprobKind
    max_logprobs: int
    constrains: bool
    release: tuple[int, ...]
    folder: FolderIdentity


class VllmEngine(HttpEngine):
    """One vLLM server (implements `gateway.contracts.ports.Engine`).

    routing: the model's shape, None for a dense model or to learn it from the server's own folder. policy_version_of:
    the server's weight label → our version; raises EngineProtocolError for labels it does not know. context_length: 0
    asks the server. logprob_kind: what log-probs are where the server does not show its configuration.
    idle_timeout_seconds: longest silence of a stream (a paused server is silent).
    """

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        context_length: int = 0,
        logprob_kind: LogprobKind = LogprobKind.RAW,
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
        self._routing = routing
        self._policy_version_of = policy_version_of
        self._context_length = context_length
        self._logprob_kind = logprob_kind
        self._server: VllmServer | None = None
        self._tells_versions = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new tokens, then exactly one GenerateEnd; closing early aborts the request at the server."""
        # Its ways in by token ids have no place for them.
        refuse_media(request, (), named="this engine")
        server = await self._known_server()
        seeded = request.sampling.seed is None or server.on_gpu
        path, body = _body(request, server, seeded=seeded)
        label = None if self._tells_versions else await self._weight_label(server)
        stream = VllmStream(
            request,
            routing=self._routing or server.folder.routing,
            policy_version_of=self._policy_version_of,
            named=f"engine {self.engine_id}, request {request.request_id}",
        )
        ended = False
        try:
            async with self._http.stream(path, body, reader=EventReader(stream.rows)) as events:
                while payloads := await events.next():
                    for payload in payloads:
                        chunk = stream.read(parsed(payload, stream.named))
                        if chunk is not None:
                            yield chunk
            stream.check_over()
            ended = True
            labels = await self._labels(server, label, stream)
            yield stream.end(labels=labels, notes={} if seeded else {"seed_left_out": True})
        except (EngineRejected, RequestError):
            ended = True
            raise
        except EngineUnavailable:
            self._server = None  # what comes up again at this address may be another server
            raise
        finally:
            if not ended:
                await abort_quietly(self.abort, request.request_id)

    async def _labels(self, server: VllmServer, before: str | None, stream: VllmStream) -> tuple[str, str] | None:
        """I5: the weights' labels before and after, None where the answer itself tells its versions."""
        if stream.tells_versions:
            self._tells_versions = True
            return None
        if before is None:
            return None
        try:
            return before, await self._weight_label(server)
        except EngineError as error:
            logger.warning("engine %s answered, but not which weights it has now: %s", self.engine_id, error)
            return before, ""

    async def identity(self) -> EngineIdentity:
        """Ask the server who it is; files of its model folder are read where this machine has them."""
        server = await self._known_server()
        weight_version = await self._weight_label(server)
        return EngineIdentity(
            engine_id=self.engine_id,
            url=self.url,
            kind="vllm",
            model_path=server.model_path,
            served_model_name=server.served_model_name,
            weight_version=weight_version,
            policy_version=self._policy_version_of(weight_version),
            logprob_kind=server.logprob_kind,
            captures_experts=server.captures_experts,
            routing=self._routing or server.folder.routing,
            context_length=self._context_length or server.context_length,
            vocab_size=server.folder.dimensions.vocab_size,
            fingerprints=server.folder.fingerprints,
            dimensions=server.folder.dimensions,
            top_logprobs=True,
            version_spans=server.generates and server.release >= _FIRST_WITH_SPANS,
            pause_modes=tuple(mode.value for mode in _PAUSES) if server.controllable else (),
            grammar=server.constrains,
            enabling=_ENABLING,
        )

    async def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """Each text's ids by the server's own tokenizer; None if it was started without one."""
        try:
            return await asyncio.gather(*map(self._tokenize, texts))
        except EngineRejected:
            return None

    async def _tokenize(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        raw = await self._http.post("/tokenize", body, timeout_seconds=_CONTROL_SECONDS)
        (token_ids,) = spellings(raw, lambda answer: [answer["tokens"]], engine_id=self.engine_id)
        return token_ids

    async def _known_server(self) -> VllmServer:
        if self._server is None:
            self._server = await self._read_server()
        return self._server

    async def _read_server(self) -> VllmServer:
        # A route that only takes POST answers a GET with 405; one that does not exist, or is not open, with 404 or 403.
        generates = await self._http.get_status(_GENERATE, timeout_seconds=_CONTROL_SECONDS) == 405
        card = _first_card(await self._http.get_object("/v1/models", timeout_seconds=_CONTROL_SECONDS), self.url)
        config = await self._config()
        model = (config or {}).get("model_config", {})
        device = (config or {}).get("device_config", {}).get("device")
        model_path = str(model.get("tokenizer") or model.get("model") or card.get("root") or "")
        return VllmServer(
            generates=generates,
            controllable=config is not None,
            on_gpu=device not in (None, "cpu"),
            model_path=str(model.get("model") or card.get("root") or ""),
            served_model_name=str(card["id"]),
            context_length=int(card.get("max_model_len") or 0),
            captures_experts=generates and bool(model.get("enable_return_routed_experts")),
            logprob_kind=self._kind_of(model.get("logprobs_mode")),
            max_logprobs=_max_logprobs(model.get("max_logprobs")),
            constrains=config is None or "structured_outputs_config" in config,
            release=await self._release(),
            folder=await read_if_here(model_path),
        )

    async def _release(self) -> tuple[int, ...]:
        try:
            answer = await self._http.get_object("/version", timeout_seconds=_CONTROL_SECONDS)
        except EngineRejected:
            return ()
        return release(answer.get("version"))

    async def _config(self) -> Mapping[str, Any] | None:
        """The server's configuration; None where its routes for development are closed."""
        try:
            info = await self._http.get_object("/server_info?config_format=json", timeout_seconds=_CONTROL_SECONDS)
        except EngineRejected:
            return None
        config = info.get("vllm_config")
        return config if isinstance(config, dict) else {}

    def _kind_of(self, logprobs_mode: Any) -> LogprobKind:
        if logprobs_mode is None:
            return self._logprob_kind
        kind = _LOGPROB_KINDS.get(logprobs_mode)
        if kind is None:
            raise EngineProtocolError(
                f"engine {self.engine_id} runs with --logprobs-mode {logprobs_mode}, which gives no log-probs: "
                f"start it with one of {', '.join(_LOGPROB_KINDS)}"
            )
        return kind

    async def _weight_label(self, server: VllmServer) -> str:
        if not server.controllable:
            return _UNLABELLED  # nobody can have changed them
        info = await self._http.get_object("/weight_info", timeout_seconds=_CONTROL_SECONDS)
        return str(info.get("weight_version") or _UNLABELLED)

    async def healthy(self) -> bool:
        """Whether the server says that it lives; a paused one does."""
        try:
            status = await self._http.get_status("/health", timeout_seconds=_CONTROL_SECONDS)
        except EngineError:
            status = 0
        if status != 200:
            self._server = None
        return status == 200

    async def abort(self, request_id: str) -> None:
        """Stop one request; unknown ids are fine. Raises EngineRejected where the server's RL routes are closed."""
        # The server puts its own words around our id, and compares whole ids.
        names = [f"generate-tokens-{request_id}", f"cmpl-{request_id}-0"]
        await self._http.post("/abort_requests", {"request_ids": names}, timeout_seconds=_ABORT_SECONDS)

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating; new requests wait at the server. RETRACT: running ones are computed anew when it resumes."""
        await self._http.post(_PAUSES[mode], {}, timeout_seconds=_CONTROL_SECONDS)
        if mode is PauseMode.RETRACT:
            await self._http.post(_RECOMPUTE, {}, timeout_seconds=_CONTROL_SECONDS)

    async def resume(self) -> None:
        """Go on."""
        await self._http.post("/resume", {}, timeout_seconds=_CONTROL_SECONDS)


def _first_card(models: Mapping[str, Any], url: str) -> Mapping[str, Any]:
    cards = models.get("data")
    if not isinstance(cards, list) or not cards or not isinstance(cards[0], dict) or "id" not in cards[0]:
        raise EngineProtocolError(f"{url}/v1/models names no model")
    card: Mapping[str, Any] = cards[0]
    return card


def _max_logprobs(configured: Any) -> int:
    """vLLM's own default where the server does not say; -1 stands for the whole vocabulary."""
    number = configured if type(configured) is int else _DEFAULT_MAX_LOGPROBS
    return sys.maxsize if number < 0 else number


def _body(request: GenerateRequest, server: VllmServer, *, seeded: bool) -> tuple[str, dict[str, JsonValue]]:
    """Where to ask, and with what."""
    passed = {key: value for key, value in request.passthrough.items() if key not in _NOT_FOR_PASSTHROUGH}
    sampling = _sampling(request.sampling, seeded=seeded)
    # 0 stands for the sampled token only.
    sampling["logprobs"] = min(request.num_top_logprobs, server.max_logprobs)
    # I7: what is recorded is ours to ask for, whatever the agent's own fields say.
    ours: dict[str, JsonValue] = {
        "request_id": request.request_id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if not server.generates:
        ours |= {"model": server.served_model_name, "prompt": request.sent_ids}
        if request.num_top_logprobs:
            ours["return_tokens_as_token_ids"] = True  # else the likeliest are named by texts, which several may share
        if "extra_args" in sampling:
            sampling["vllm_xargs"] = sampling.pop("extra_args")
        # Without it this route takes the model folder's own, which nobody asked for.
        return _COMPLETIONS, {"repetition_penalty": 1.0} | passed | sampling | ours
    if request.num_top_logprobs:
        sampling["logprobs"] = min(request.num_top_logprobs + 1, server.max_logprobs)
    if request.routed_experts_start is not None:
        sampling["routed_experts_prompt_start"] = request.routed_experts_start
    if request.stream_interval is not None:
        sampling = {"stream_interval": request.stream_interval} | sampling
    sampling = {key: passed.pop(key) for key in _SAMPLING_OF_VLLM & passed.keys()} | sampling
    return _GENERATE, passed | ours | {"token_ids": request.sent_ids, "sampling_params": sampling}


def _sampling(sampling: SamplingParams, *, seeded: bool) -> dict[str, JsonValue]:
    """In vLLM's names; raises InvalidRequest for what it does not have and would ignore."""
    extra = dict(sampling.extra)
    for name in _UNSUPPORTED:
        if extra.pop(name, None):
            raise InvalidRequest(f"{name}: vLLM does not have it")
    constraints = {theirs: extra.pop(ours) for ours, theirs in _CONSTRAINTS.items() if ours in extra}
    if constraints:
        extra["structured_outputs"] = constraints
    for theirs, ours in (
        ("min_tokens", "min_new_tokens"),
        ("extra_args", "vllm_xargs"),
        ("extra_args", "custom_params"),
    ):
        if ours in extra:
            extra[theirs] = extra.pop(ours)
    parameters = extra | {
        "max_tokens": sampling.max_new_tokens,
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
    if sampling.seed is not None and seeded:
        parameters["seed"] = sampling.seed
    return parameters
