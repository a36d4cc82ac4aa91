"""A program: an engine that speaks SGLang's protocol, samples what the oracle says, and keeps a journal of every token.

    python -m benchmarks.custody.engine --port N --model DIR --script FILE --journal FILE [--weight-version LABEL]

The journal is written before a token leaves, so it also names those that nobody ever got: one JSON line for each
beginning of a request, each piece of it, and its end. A continuation that is not the beginning of a right reply is
refused and journalled. Pauses (abort, retract, in_place), new weight labels and aborts work as SGLang's do.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from benchmarks.custody.oracle import NUM_DRAWN, Script, WrongContinuation, experts, logprob
from engines.identity import read_folder, told_information
from engines.weights.names import policy_version_of

_VERSION = "0.5.23"
"""Of SGLang, whose protocol this is."""


@dataclass(slots=True)
class Request:
    """One request while it runs. spans: [label, first token, token behind the last]."""

    rid: str
    key: str
    asked: Sequence[int]
    max_new_tokens: int
    first_row: int | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[list[Any]] = field(default_factory=list)
    aborted: bool = False


class JournallingEngine:
    """The engine and its routes. step_seconds, step_tokens: how fast it samples."""

    def __init__(
        self, model: Path, script: Script, journal: Path, *, weight_version: str, step_seconds: float, step_tokens: int
    ) -> None:
        self._model = model
        self._script = script
        self._journal = journal.open("ab", buffering=0)
        self._weight_version = weight_version
        self._step_seconds = step_seconds
        self._step_tokens = step_tokens
        self._started_at = time.time()
        self._running: dict[str, Request] = {}
        self._going = asyncio.Event()
        self._going.set()
        self._random = random.SystemRandom()
        self._told = told_information(read_folder(model))

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def app(self) -> web.Application:
        """The application to serve."""
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.get("/model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/v1/models", self._models),
                web.get("/ping", self._alive),
                web.get("/health", self._alive),
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.post("/pause_generation", self._pause),
                web.post("/continue_generation", self._continue),
                web.post("/update_weights_from_disk", self._update),
            ]
        )
        return app

    async def _model_info(self, request: web.Request) -> web.Response:
        path = str(self._model)
        names = {"model_path": path, "tokenizer_path": path, "served_model_name": "oracle"}
        return web.json_response(names | {"weight_version": self._weight_version} | self._told)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"enable_return_routed_experts": True, "version": _VERSION, "startup_time": self._started_at}
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "oracle", "max_model_len": 65_536}]})

    async def _alive(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json()).get("rid", "")
        for running in self._running.values():
            running.aborted |= running.rid.startswith(rid)
        return web.json_response({})

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", "abort")
        self._going.clear()
        if mode == "abort":
            for running in self._running.values():
                running.aborted = True
        self._note({"pause": mode})
        return web.json_response({"status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        self._going.set()
        self._note({"continue": True})
        return web.json_response({"status": "ok"})

    async def _update(self, request: web.Request) -> web.Response:
        self._weight_version = (await request.json())["weight_version"]
        self._note({"weights": self._weight_version})
        return web.json_response({"success": True, "message": "", "num_paused_requests": 0})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not isinstance(body.get("input_ids"), list):
            return web.json_response({"error": {"message": "input_ids: is required"}}, status=400)
        key = self.session_of(request, body["input_ids"])
        try:
            prompt, begun = self._script.split(body["input_ids"])
            self._script.check(prompt, begun)
        except WrongContinuation as error:
            self._note({"refused": body.get("rid"), "key": key, "ids": body["input_ids"], "why": str(error)})
            return web.json_response({"error": {"message": f"wrong continuation: {error}"}}, status=400)
        running = self._begin(body, key)
        try:
            return await self._stream(request, running)
        finally:
            self._running.pop(running.rid, None)

    def session_of(self, request: web.Request, token_ids: Sequence[int]) -> str:
        """Whose request it is, percent-encoded: what the router was told."""
        return request.headers.get("X-SMG-Routing-Key", "")

    async def before_step(self, running: Request) -> None:
        """Called before each step; who wants to stop a request at an instant waits here."""
        await asyncio.sleep(self._step_seconds)

    def _begin(self, body: Mapping[str, Any], key: str) -> Request:
        first_row = body.get("routed_experts_start_len") if body.get("return_routed_experts") else None
        sampling = body["sampling_params"]
        running = Request(body["rid"], key, body["input_ids"], int(sampling["max_new_tokens"]), first_row)
        self._running[running.rid] = running
        self._note({"begin": running.rid, "key": key, "ids": body["input_ids"]})
        return running

    async def _stream(self, request: web.Request, running: Request) -> web.StreamResponse:
        """Until the stop token, the limit, an abort, or until the client has gone."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        finish: dict[str, Any] | None = None
        try:
            await response.prepare(request)
            while finish is None:
                await self.before_step(running)
                await self._wait_resumed(running)
                if request.transport is None or request.transport.is_closing():
                    raise ConnectionResetError
                finish = {"type": "abort"} if running.aborted else self.sample(running)
                await response.write(b"data: " + json.dumps(self._event(running, finish)).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError) as error:
            self._note({"end": running.rid, "how": "left", "n": len(running.token_ids)})
            if isinstance(error, asyncio.CancelledError):
                raise
            return response
        self._note({"end": running.rid, "how": finish["type"], "n": len(running.token_ids)})
        return response

    async def _wait_resumed(self, running: Request) -> None:
        while not self._going.is_set() and not running.aborted:  # noqa: ASYNC110 (an abort ends it too)
            await asyncio.sleep(self._step_seconds)

    def sample(self, running: Request) -> dict[str, Any] | None:
        """Sample a few tokens; how the request ended, None if it goes on."""
        asked, fresh = running.asked, []
        prompt, begun = self._script.split([*asked, *running.token_ids])
        version = policy_version_of(self._weight_version, {})
        room = running.max_new_tokens - len(running.token_ids)
        for _ in range(min(self._step_tokens, room)):
            whole = self._script.check(prompt, begun)
            token = whole[len(begun)] if len(begun) >= NUM_DRAWN else self._random.choice(self._script.words)
            begun.append(token)
            fresh.append(token)
            if token == self._script.stop:
                break
        start = len(asked) + len(running.token_ids)
        self._note({"piece": running.rid, "ids": fresh, "version": version})  # before they leave
        running.logprobs += [logprob(token, start + i, version) for i, token in enumerate(fresh)]
        running.spans.append([self._weight_version, len(running.token_ids), len(running.token_ids) + len(fresh)])
        running.token_ids += fresh
        if fresh and fresh[-1] == self._script.stop:
            return {"type": "stop", "matched": self._script.stop}
        return {"type": "length", "length": running.max_new_tokens} if len(fresh) == room else None

    def _event(self, running: Request, finish: dict[str, Any] | None) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": running.rid,
            "finish_reason": finish,
            "prompt_tokens": len(running.asked),
            "completion_tokens": len(running.token_ids),
            "cached_tokens": 0,
            "weight_version": self._weight_version,
            "weight_versions": [{"version": v, "start": start, "end": end} for v, start, end in running.spans],
            "output_token_logprobs": [
                [value, token, None] for value, token in zip(running.logprobs, running.token_ids, strict=True)
            ],
        }
        if finish is not None and running.first_row is not None:
            meta["routed_experts"] = self._rows(running, running.first_row)
        return {"text": "", "output_ids": running.token_ids, "meta_info": meta}

    @staticmethod
    def _rows(running: Request, first_row: int) -> str:
        """Base64 of int32 rows of every input token but the newest."""
        sequence = [*running.asked, *running.token_ids][:-1]
        ids = [expert for i in range(first_row, len(sequence)) for expert in experts(sequence[i], i)]
        return base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode()

    def _note(self, line: Mapping[str, Any]) -> None:
        stamped = {"at": time.time(), "pid": os.getpid(), **line}
        self._journal.write(json.dumps(stamped, separators=(",", ":")).encode() + b"\n")


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description="an engine whose every token is known")
    parser.add_argument("--port", type=int, required=True)
    for name in ("--model", "--script", "--journal"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--weight-version", default="policy-000000")
    parser.add_argument("--step-seconds", type=float, default=0.08)
    parser.add_argument("--step-tokens", type=int, default=4)
    given = parser.parse_args()

    async def served() -> web.Application:
        return JournallingEngine(
            given.model,
            Script.load(given.script),
            given.journal,
            weight_version=given.weight_version,
            step_seconds=given.step_seconds,
            step_tokens=given.step_tokens,
        ).app()

    web.run_app(
        served(),
        host="127.0.0.1",
        port=given.port,
        print=None,
        access_log=None,
        shutdown_timeout=1.0,
        handler_cancellation=True,
        reuse_address=True,
    )


if __name__ == "__main__":
    main()
