"""vLLM's routes over the same engine: generation by ids or as completions, pausing, aborting, weight labels.

Streams only what `engines/vllm.py` and text clients of `/v1/completions` need, so that they can be developed and tested
without vLLM; `/server_info`, `/v1/models`, `/health` and `/update_weight_version` are the routes that SGLang has too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from engines.embedded.app import SSE_DONE, EngineServer, OpenGeneration, done, json_body, json_reply, sse_event
from engines.embedded.protocol import GenerateCall
from engines.embedded.vllm_protocol import (
    VLLM_VERSION,
    CompletionsEvents,
    TokensEvents,
    read_completions_call,
    read_tokens_call,
)
from gateway.contracts.errors import InvalidRequest, RequestError
from gateway.contracts.ports import PauseMode

_PAUSES = {"abort": PauseMode.ABORT, "keep": PauseMode.IN_PLACE}

Events = TokensEvents | CompletionsEvents


def add_vllm_routes(app: FastAPI, server: EngineServer) -> None:
    """Add them beside SGLang's."""
    _add_generation(app, server)
    _add_control(app, server)


def _add_generation(app: FastAPI, server: EngineServer) -> None:
    routing = server.engine.model.routing

    @app.post("/inference/v1/generate")
    async def generate(request: Request) -> Response:
        """Token ids in, token ids out."""
        try:
            body = await json_body(request)
            call = read_tokens_call(body, server.limits, server.tokenizer)
            num_experts = 1 if routing is None else routing.num_experts
            return _streamed(server, call, body, lambda g: TokensEvents(g.generation, body, num_experts=num_experts))
        except RequestError as error:
            return _refusal(error)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Text or token ids in, text and, if asked for, token ids out."""
        try:
            body = await json_body(request)
            call = read_completions_call(body, server.limits, server.tokenizer)
            name = server.served_model_name
            return _streamed(server, call, body, lambda g: CompletionsEvents(g.generation, body, model=name))
        except RequestError as error:
            return _refusal(error)


def _streamed(
    server: EngineServer, call: GenerateCall, body: Mapping[str, Any], make: Callable[[OpenGeneration], Events]
) -> Response:
    if not call.stream or not call.single:
        raise InvalidRequest("the embedded engine only streams here, one prompt at a time: set stream to true")
    opened = server.open(call.inputs[0])
    counts = bool((body.get("stream_options") or {}).get("include_usage"))
    return StreamingResponse(_events(server, opened, make(opened), counts=counts), media_type="text/event-stream")


async def _events(
    server: EngineServer, opened: OpenGeneration, events: Events, *, counts: bool
) -> AsyncIterator[bytes]:
    generation, sent, sent_text = opened.generation, 0, ""
    try:
        async for reply in server.replies(opened):
            num_output, text = int(reply["meta_info"]["completion_tokens"]), str(reply.get("text", ""))
            finish = reply["meta_info"]["finish_reason"]
            if num_output > sent or (finish is not None and not sent):
                fresh_text = text if server.settings.incremental_streaming_output else text[len(sent_text) :]
                yield sse_event(events.event(fresh_text, slice(sent, num_output), finish and finish["type"]))
            sent, sent_text = num_output, text
        if counts:
            numbers = {"prompt_tokens": generation.prompt_length, "completion_tokens": sent}
            yield sse_event(events.usage(numbers | {"total_tokens": generation.prompt_length + sent}))
        yield SSE_DONE
    finally:
        server.close(opened)


def _refusal(error: RequestError) -> Response:
    content = {"message": error.message, "type": "BadRequestError", "param": None, "code": error.http_status}
    return json_reply({"error": content}, error.http_status)


def _add_control(app: FastAPI, server: EngineServer) -> None:
    engine = server.engine

    @app.get("/version")
    async def version() -> Response:
        """Whose protocol this is."""
        return json_reply({"version": VLLM_VERSION})

    @app.get("/weight_info")
    async def weight_info() -> Response:
        """The label of the weights that are served now."""
        return json_reply({"weight_version": engine.weight_version})

    @app.get("/is_paused")
    async def is_paused() -> Response:
        """Whether new requests wait."""
        return json_reply({"is_paused": engine.paused})

    @app.post("/pause")
    async def pause(mode: str = "abort") -> Response:
        """Stop stepping: `abort` ends running requests, `keep` holds them."""
        if mode not in _PAUSES:
            return _refusal(InvalidRequest(f"mode: the embedded engine knows {', '.join(_PAUSES)}, not {mode!r}"))
        await done(engine.pause(_PAUSES[mode]))
        return json_reply({"status": "paused"})

    @app.post("/resume")
    async def resume() -> Response:
        """Go on."""
        await done(engine.resume())
        return json_reply({"status": "resumed"})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(reset_running_requests: bool = False) -> Response:
        """Forget prefixes; of running requests too if asked, which are computed anew (only while paused)."""
        if reset_running_requests and engine.paused:
            await done(engine.pause(PauseMode.RETRACT))
        return json_reply({"success": await done(engine.flush())})

    @app.post("/abort_requests")
    async def abort_requests(request: Request) -> Response:
        """End the named requests, or all; unknown ones are fine."""
        try:
            names = (await json_body(request)).get("request_ids") or []
        except InvalidRequest as error:
            return _refusal(error)
        for name in names:
            # vLLM compares whole ids, the engine beginnings.
            if name in server.open_rids:
                await done(engine.abort(str(name)))
        if not names:
            await done(engine.abort("", everything=True))
        return json_reply({"status": "aborted", "aborted": len(names)})
