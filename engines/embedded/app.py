"""The engine's HTTP face: SGLang's routes over `EmbeddedEngine`, and what other faces share with them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from engines.embedded.engine import EmbeddedEngine
from engines.embedded.protocol import GenerateCall, GenerateInput, ModelLimits, Reply, read_generate
from engines.embedded.sampler import SamplingSettings
from engines.embedded.scheduler import Generation
from engines.embedded.settings import EngineSettings
from engines.embedded.vllm_protocol import vllm_config
from engines.identity import told_information
from gateway.contracts.errors import InvalidRequest, RequestError, TransportError
from gateway.contracts.generation import LogprobKind
from gateway.contracts.ports import PauseMode

Result = TypeVar("Result")

SGLANG_VERSION = "0.5.23"
"""Whose protocol this is."""

_HEALTH_SECONDS = 20.0


@dataclass(slots=True, eq=False)
class OpenGeneration:
    """A generation in the engine, seen from the event loop: `progress` is set when it has more to show."""

    request: GenerateInput
    progress: asyncio.Event
    generation: Generation
    reply: Reply


class EngineServer:
    """What the routes share: the engine, its settings, and who waits for which generation."""

    def __init__(self, engine: EmbeddedEngine, settings: EngineSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.model_path = settings.model
        self.served_model_name = settings.served_model_name or str(settings.model)
        # Of the folder as the engine has read it; files that change under a running engine change nothing in it.
        self.told = told_information(engine.model.folder)
        self.tokenizer = None if settings.skip_tokenizer_init else engine.model.tokenizer
        self.limits = ModelLimits(
            vocab_size=engine.model.vocab_size,
            context_length=engine.limits.context_length,
            captures_experts=settings.enable_return_routed_experts and engine.model.routing is not None,
        )
        self.open_rids: set[str] = set()
        self.started_at = time.time()

    def open(self, request: GenerateInput) -> OpenGeneration:
        """Hand one prompt to the engine; raises InvalidRequest if its rid is in use."""
        if request.rid in self.open_rids:
            raise InvalidRequest(f"Duplicate request ID detected: {request.rid}")
        loop = asyncio.get_running_loop()
        progress = asyncio.Event()

        def on_progress() -> None:
            loop.call_soon_threadsafe(progress.set)

        start = request.logprob_start
        generation = self.engine.generation(
            rid=request.rid,
            prompt=request.prompt,
            settings=request.settings,
            logprob_start=len(request.prompt) if start < 0 else start,
            routed_start=request.routed_start,
            on_progress=on_progress,
            num_top_logprobs=request.num_top_logprobs,
            cache_key=request.cache_key,
        )
        reply = Reply(request, generation, self.tokenizer, incremental=self.settings.incremental_streaming_output)
        self.open_rids.add(request.rid)
        self.engine.submit(generation)
        return OpenGeneration(request, progress, generation, reply)

    def close(self, opened: OpenGeneration) -> None:
        """Forget a generation, and stop it if it has not ended (its client went away)."""
        self.open_rids.discard(opened.request.rid)
        if opened.generation.finish is None:
            self.engine.abort(opened.request.rid)

    async def replies(self, opened: OpenGeneration) -> AsyncIterator[dict[str, Any]]:
        """The generation's JSON whenever it grew; the last one is complete."""
        sent = -1
        finished = False
        while not finished:
            await opened.progress.wait()
            opened.progress.clear()
            # `finish` is written after the last token: read in the other order, a last token could be missed.
            finished = opened.generation.finish is not None
            num_output = min(opened.generation.num_output, len(opened.generation.logprobs))
            if finished or num_output > sent:
                sent = num_output
                yield opened.reply.build(num_output)

    async def complete(self, opened: OpenGeneration) -> dict[str, Any]:
        """The whole reply."""
        while opened.generation.finish is None:
            await opened.progress.wait()
            opened.progress.clear()
        return opened.reply.build(opened.generation.num_output)


def build_app(server: EngineServer) -> FastAPI:
    """SGLang's routes over one engine."""
    app = FastAPI(title="verbatim engine", openapi_url=None)
    _add_generate(app, server)
    _add_information(app, server)
    _add_control(app, server)
    _add_weights(app, server)
    return app


def json_reply(content: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


async def json_body(request: Request) -> Any:
    """The body as JSON, `{}` if it is empty; raises InvalidRequest."""
    raw = await request.body()
    if not raw:
        return {}
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


async def done(future: Future[Result]) -> Result:
    """Wait for the engine's thread."""
    return await asyncio.wrap_future(future)


def _add_generate(app: FastAPI, server: EngineServer) -> None:
    @app.post("/generate")
    @app.put("/generate")
    async def generate(request: Request) -> Response:
        """Token ids (or text) in, token ids out."""
        stream = False
        try:
            body = await json_body(request)
            stream = isinstance(body, dict) and bool(body.get("stream"))
            call = read_generate(body, server.limits, server.tokenizer)
            opened = _open_all(server, call)
        except RequestError as error:
            if not stream:
                return json_reply({"error": {"message": error.message}}, error.http_status)
            refusal = {"message": error.message, "type": "invalid_request_error", "code": 400, "retryable": False}
            return Response(sse_event({"error": refusal}) + SSE_DONE, media_type="text/event-stream")
        if call.stream:
            return StreamingResponse(_events(server, call, opened), media_type="text/event-stream")
        return await _whole(server, call, opened, request)


def _open_all(server: EngineServer, call: GenerateCall) -> list[OpenGeneration]:
    opened: list[OpenGeneration] = []
    try:
        for request in call.inputs:
            opened.append(server.open(request))
    except InvalidRequest:
        for entry in opened:
            server.close(entry)
        raise
    return opened


SSE_DONE = b"data: [DONE]\n\n"


def sse_event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _events(server: EngineServer, call: GenerateCall, opened: list[OpenGeneration]) -> AsyncIterator[bytes]:
    try:
        if call.single:
            async for reply in server.replies(opened[0]):
                yield sse_event(_with_prompt(reply, call, opened[0]))
        else:
            async for index, reply in _interleaved(server, opened):
                yield sse_event(_with_prompt(reply, call, opened[index]) | {"index": index})
        yield SSE_DONE
    finally:
        for entry in opened:
            server.close(entry)


async def _interleaved(server: EngineServer, opened: list[OpenGeneration]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    replies: asyncio.Queue[tuple[int, dict[str, Any] | None]] = asyncio.Queue()

    async def forward(index: int) -> None:
        async for reply in server.replies(opened[index]):
            await replies.put((index, reply))
        await replies.put((index, None))

    async with asyncio.TaskGroup() as tasks:
        forwarders = [tasks.create_task(forward(index)) for index in range(len(opened))]
        open_streams = len(forwarders)
        try:
            while open_streams:
                index, reply = await replies.get()
                if reply is None:
                    open_streams -= 1
                else:
                    yield index, reply
        finally:
            for forwarder in forwarders:
                forwarder.cancel()


def _with_prompt(reply: dict[str, Any], call: GenerateCall, opened: OpenGeneration) -> dict[str, Any]:
    if call.return_prompt_token_ids:
        reply["prompt_token_ids"] = opened.request.prompt
    return reply


async def _whole(server: EngineServer, call: GenerateCall, opened: list[OpenGeneration], request: Request) -> Response:
    gone = asyncio.create_task(_disconnected(request))
    work = asyncio.gather(*(server.complete(entry) for entry in opened))
    either: set[asyncio.Future[Any]] = {gone, work}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        replies = [_with_prompt(reply, call, entry) for reply, entry in zip(work.result(), opened, strict=True)]
    finally:
        gone.cancel()
        work.cancel()
        for entry in opened:
            server.close(entry)
    return json_reply(replies[0] if call.single else replies)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_information(app: FastAPI, server: EngineServer) -> None:
    engine = server.engine

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info() -> Response:
        """Who this is; `model_path`, `served_model_name` and `weight_version` move with a weight update."""
        config = engine.model.network.config
        return json_reply(
            {
                "model_path": str(server.model_path),
                "served_model_name": server.served_model_name,
                "tokenizer_path": str(server.settings.model),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": engine.weight_version,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "disaggregation_mode": "null",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": config.model_type,
                "architectures": config.architectures,
                **server.told,
            }
        )

    @app.post("/tokenize")
    @app.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        """Ids of `prompt`, a text or a list of them, as SGLang and vLLM answer."""
        try:
            body = await json_body(request)
        except InvalidRequest as error:
            return _bad_request(error.message)
        prompt = body.get("prompt") if isinstance(body, dict) else None
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return _bad_request("prompt: expected a text or a list of texts")
        if server.tokenizer is None:
            return _bad_request("prompt: this engine has no tokenizer")
        adds = body.get("add_special_tokens") is not False
        ids = [server.tokenizer.encode(text, add_special_tokens=adds).ids for text in texts]
        tokens, count = (ids[0], len(ids[0])) if isinstance(prompt, str) else (ids, [len(each) for each in ids])
        return json_reply({"tokens": tokens, "count": count, "max_model_len": engine.limits.context_length})

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> Response:
        """Settings and state; `weight_version` stays the one of the start, as in SGLang."""
        settings = asdict(server.settings)
        del settings["model"]
        return json_reply(
            settings
            | {
                "model_path": str(server.settings.model),
                "tokenizer_path": str(server.settings.model),
                "served_model_name": server.settings.served_model_name or str(server.settings.model),
                "context_length": engine.limits.context_length,
                "max_total_num_tokens": engine.limits.context_length * engine.limits.num_slots,
                "enable_return_routed_experts": server.limits.captures_experts,
                "return_original_logprob": engine.logprob_kind is LogprobKind.RAW,
                "disaggregation_mode": "null",
                "grammar_backend": "none",
                "version": SGLANG_VERSION,
                "engine": "verbatim-embedded",
                "startup_time": server.started_at,
                "internal_states": [{"num_sampled_tokens": engine.num_sampled_tokens, "paused": engine.paused}],
                "vllm_config": vllm_config(server.limits, path=server.settings.model, kind=engine.logprob_kind),
            }
        )

    @app.get("/v1/models")
    async def models() -> Response:
        """OpenAI's list of one."""
        card = {
            "id": server.served_model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "sglang",
            "root": server.served_model_name,
            "parent": None,
            "max_model_len": engine.limits.context_length,
        }
        return json_reply({"object": "list", "data": [card]})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether a new request would be generated now."""
        return Response(status_code=200 if engine.alive and not engine.paused else 503)

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        """Cheap: the engine's thread lives (SGLang with SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false)."""
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/health_generate")
    async def health_generate() -> Response:
        """Generate one token; 503 if that takes too long (a paused engine does not generate)."""
        settings = SamplingSettings(max_new_tokens=1, temperature=0.0)
        probe = server.open(GenerateInput(f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], settings, False, -1, None))
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                await server.complete(probe)
        except TimeoutError:
            return Response(status_code=503)
        finally:
            server.close(probe)
        return Response(status_code=200)


def _add_control(app: FastAPI, server: EngineServer) -> None:
    engine = server.engine

    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        """End requests whose rid starts with `rid`, or all; unknown ones are fine."""
        try:
            body = await json_body(request)
        except InvalidRequest as error:
            return _bad_request(error.message)
        await done(engine.abort(str(body.get("rid") or ""), everything=bool(body.get("abort_all"))))
        return Response(status_code=200)

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> Response:
        """Forget prefixes; 400 while requests run."""
        if not await done(engine.flush()):
            return Response("Flush cache failed.\n", status_code=400)
        return Response(
            "Cache flushed.\nPlease check backend logs for more details. "
            "(When there are running or waiting requests, the operation will not be performed.)\n"
        )

    @app.post("/pause_generation")
    async def pause_generation(request: Request) -> Response:
        """Stop stepping, in one of three modes."""
        try:
            mode = PauseMode((await json_body(request)).get("mode", "abort"))
        except ValueError:
            return _bad_request("mode: Input should be 'abort', 'retract' or 'in_place'")
        except InvalidRequest as error:
            return _bad_request(error.message)
        await done(engine.pause(mode))
        return json_reply({"message": "Generation paused successfully.", "status": "ok"})

    @app.post("/continue_generation")
    async def continue_generation() -> Response:
        """Go on."""
        await done(engine.resume())
        return json_reply({"message": "Generation continued successfully.", "status": "ok"})


def _add_weights(app: FastAPI, server: EngineServer) -> None:
    engine = server.engine

    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(request: Request) -> Response:
        """Load a checkpoint folder; at once while paused, else when running requests have ended."""
        try:
            body = await json_body(request)
        except InvalidRequest as error:
            return _bad_request(error.message)
        path, label = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str):
            return _bad_request("model_path: Field required")
        if body.get("abort_all_requests"):
            await done(engine.abort("", everything=True))
        update = engine.update_weights(
            Path(path), weight_version=label, flush_cache=bool(body.get("flush_cache", True))
        )
        try:
            message, success = await done(update), True
        except TransportError as error:
            message, success = error.message, False
        if engine.model_path is not None and engine.model_path != server.model_path:
            server.model_path = engine.model_path
            server.served_model_name = str(engine.model_path)
        return json_reply({"success": success, "message": message, "num_paused_requests": 0}, 200 if success else 400)

    @app.post("/update_weight_version")
    async def update_weight_version(request: Request) -> Response:
        """Relabel the weights; ends all requests unless told not to."""
        try:
            body = await json_body(request)
        except InvalidRequest as error:
            return _bad_request(error.message)
        label = body.get("new_version")
        if not isinstance(label, str):
            return _bad_request("new_version: Field required")
        if body.get("abort_all_requests", True):
            await done(engine.abort("", everything=True))
        await done(engine.set_weight_version(label))
        return json_reply({"success": True, "message": f"Weight version updated to {label}", "new_version": label})


def _bad_request(message: str) -> Response:
    return json_reply(
        {
            "object": "error",
            "message": f"1 validation error:\n  {message}",
            "type": "Bad Request",
            "param": None,
            "code": 400,
        },
        400,
    )
