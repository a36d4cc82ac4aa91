"""EchoServer: an SGLang-speaking server that samples one fixed reply and sends unknown fields of a request back.

For proving that fields pass the gateway and its clients without loss (I8): what it does not know of a request comes
back at the top of its reply, and once more under `meta_info.echo`. It keeps integers of any size. Not an engine: it
has no model, and its log-probs and versions are constants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from aiohttp import web

from gateway.contracts.generation import JsonValue

_KNOWN = frozenset(
    (
        "rid", "input_ids", "sampling_params", "stream", "return_logprob", "logprob_start_len",
        "return_routed_experts", "routed_experts_start_len", "top_logprobs_num",
    )
)  # fmt: skip


class EchoServer:
    """`token_ids`: what every request samples, its stop token last. `requests`: the bodies that came, in order.
    `event_fields`: fields of every first event, and of its meta_info, which no later event has."""

    def __init__(self, token_ids: Sequence[int], *, context_length: int = 4096) -> None:
        self._token_ids = list(token_ids)
        self._context_length = context_length
        self.requests: list[Mapping[str, JsonValue]] = []
        self.event_fields: Mapping[str, JsonValue] = {}

    def app(self) -> web.Application:
        """The application to serve."""
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.get("/model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/v1/models", self._models),
                web.get("/ping", self._ping),
                web.post("/generate", self._generate),
                web.post("/abort_request", self._ping),
            ]
        )
        return app

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "", "served_model_name": "echo", "weight_version": "default"})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"enable_return_routed_experts": False})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "echo", "max_model_len": self._context_length}]})

    async def _ping(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append(body)
        unknown = {name: value for name, value in body.items() if name not in _KNOWN}
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for count in range(1, len(self._token_ids) + 1):
            event = self._event(len(body["input_ids"]), count, num_top_logprobs=body.get("top_logprobs_num", 0))
            if count == 1:
                event = {**self.event_fields, **event}
                event["meta_info"] |= self.event_fields
            if count == len(self._token_ids):
                event = unknown | event
                event["meta_info"] |= {"echo": unknown}
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await stream.write(b"data: [DONE]\n\n")
        return stream

    def _event(self, num_prompt: int, count: int, *, num_top_logprobs: int) -> dict[str, JsonValue]:
        ended = count == len(self._token_ids)
        event: dict[str, JsonValue] = {
            "text": "",
            "output_ids": self._token_ids[:count],
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": self._token_ids[-1]} if ended else None,
                "prompt_tokens": num_prompt,
                "completion_tokens": count,
                "cached_tokens": 0,
                "weight_version": "default",
                "output_token_logprobs": [[-0.5, token_id, None] for token_id in self._token_ids[:count]],
            },
        }
        if num_top_logprobs:  # it is sure of nothing else
            tops = [[[-0.5, token_id, None]] for token_id in self._token_ids[:count]]
            event["meta_info"]["output_top_logprobs"] = tops
        return event
