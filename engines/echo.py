"""EchoServer: an SGLang-speaking server that samples one fixed reply and sends unknown fields of a request back.

For proving that fields pass the gateway and its clients without loss (I8): what it does not know of a request comes
back at the top of its reply, and once more under `meta_info.echo`. It keeps integers of any size. A prompt that ends in
the reply's first tokens gets the rest of it, so that a reply which moves between such servers is whole or is not. Not
an engine: it has no model, and its log-probs and versions are constants.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence

from aiohttp import web

from gateway.contracts.generation import JsonValue

_KNOWN = frozenset(
    (
        "rid", "input_ids", "sampling_params", "stream", "return_logprob", "logprob_start_len",
        "return_routed_experts", "routed_experts_start_len", "top_logprobs_num", "extra_key",
    )
)  # fmt: skip


class EchoServer:
    """`token_ids`: what every request samples, its stop token last; one each `delay_seconds`.

    server_info: what it says of its flags. `requests`: the bodies that came, in order; `headers`: theirs; `aborted`:
    ids of requests to stop; `left`: ids of requests whose client went away; `paused`: what was last ordered (it goes on
    answering all the same). `event_fields`: fields of every first event, and of its meta_info, that no later event has.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        context_length: int = 4096,
        delay_seconds: float = 0.0,
        server_info: Mapping[str, JsonValue] | None = None,
    ) -> None:
        self._token_ids = list(token_ids)
        self._context_length = context_length
        self._delay_seconds = delay_seconds
        self.weight_version = "default"
        self._info = {"enable_return_routed_experts": False, **(server_info or {})}
        self.requests: list[Mapping[str, JsonValue]] = []
        self.event_fields: Mapping[str, JsonValue] = {}
        self.headers: list[Mapping[str, str]] = []
        self.aborted: list[str] = []
        self.paused = False
        self.left: list[str] = []

    def app(self) -> web.Application:
        """The application to serve."""
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.get("/model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/v1/models", self._models),
                web.get("/ping", self._ping),
                web.get("/health", self._ping),
                web.get("/ready", self._ready),
                web.get("/seen", self._seen),
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.post("/pause_generation", self._pause),
                web.post("/continue_generation", self._continue),
            ]
        )
        return app

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "", "served_model_name": "echo", "weight_version": self.weight_version})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._info)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "echo", "max_model_len": self._context_length}]})

    async def _ping(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=503 if self.paused else 200)

    async def _pause(self, request: web.Request) -> web.Response:
        self.paused = True
        return web.json_response({})

    async def _continue(self, request: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.json_response({})

    async def _seen(self, request: web.Request) -> web.Response:
        """What came, for tests that run this in another process."""
        return web.json_response({"requests": self.requests, "aborted": self.aborted, "left": self.left})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not isinstance(body.get("input_ids"), list):
            return web.json_response({"error": {"message": "input_ids: is required"}}, status=400)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        unknown = {name: value for name, value in body.items() if name not in _KNOWN}
        token_ids = self._rest(body["input_ids"])
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        try:
            for count in range(1, len(token_ids) + 1):
                await asyncio.sleep(self._delay_seconds)
                event = self._event(token_ids, body, count)
                if count == 1:
                    event = {**self.event_fields, **event}
                    event["meta_info"] |= self.event_fields
                if count == len(token_ids):
                    event = unknown | event
                    event["meta_info"] |= {"echo": unknown}
                await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await stream.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.left.append(body["rid"])
        return stream

    def _rest(self, prompt: list[int]) -> list[int]:
        """What of the reply the prompt does not end in."""
        whole = self._token_ids
        begun = next((n for n in range(len(whole) - 1, 0, -1) if prompt[-n:] == whole[:n]), 0)
        return whole[begun:]

    def _event(self, token_ids: list[int], body: Mapping[str, JsonValue], count: int) -> dict[str, JsonValue]:
        ended = count == len(token_ids)
        event: dict[str, JsonValue] = {
            "text": "",
            "output_ids": token_ids[:count],
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": token_ids[-1]} if ended else None,
                "prompt_tokens": len(body["input_ids"]),
                "completion_tokens": count,
                "cached_tokens": 0,
                "weight_version": self.weight_version,
                "output_token_logprobs": [[-0.5, token_id, None] for token_id in token_ids[:count]],
            },
        }
        if body.get("top_logprobs_num"):  # it is sure of nothing else
            tops = [[[-0.5, token_id, None]] for token_id in token_ids[:count]]
            event["meta_info"]["output_top_logprobs"] = tops
        return event
