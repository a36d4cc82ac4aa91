"""Prompts with images at every engine client, over real HTTP: sent whole, counted as the engine counts, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from aiohttp import web

from engines.launch import EngineProcess, free_port
from engines.openai_text import OpenAiTextEngine
from engines.scripted import ScriptedEngine, ScriptedReply
from engines.sglang import SglangEngine
from engines.vllm import VllmEngine
from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import GenerateEnd, GenerateRequest, Media, MediaKind, SamplingParams
from gateway.contracts.ports import Engine

PROMPT = np.array([1, 2, 3], dtype=np.int32)
PICTURES = (Media(MediaKind.IMAGE, "data:image/png;base64,AAAA"), Media(MediaKind.IMAGE, "http://x/y.png"))
SOUND = Media(MediaKind.AUDIO, "http://x/y.wav")
FILM = Media(MediaKind.VIDEO, "http://x/y.mp4")


def asked(*media: Media, **fields: Any) -> GenerateRequest:
    return GenerateRequest("r" * 32, PROMPT, SamplingParams(max_new_tokens=2), media=media, **fields)


async def ended(engine: Engine, request: GenerateRequest) -> GenerateEnd:
    async with asyncio.timeout(30):
        *_, end = [item async for item in engine.generate(request)]
    assert isinstance(end, GenerateEnd)
    return end


class SglangWithEyes:
    """A server that speaks as much of SGLang as a request needs; media take room in its prompts as SGLang's do."""

    def __init__(self, *, sees: bool = True, hears: bool = False, tokens_of_each: int = 7) -> None:
        self.info = {"has_image_understanding": sees, "has_audio_understanding": hears}
        self.tokens_of_each = tokens_of_each
        self.bodies: list[dict[str, Any]] = []
        self.refuses = ""

    async def model_info(self, _request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def server_info(self, _request: web.Request) -> web.Response:
        return web.json_response({})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        if self.refuses:
            return web.json_response({"error": {"message": self.refuses}}, status=400)
        num_media = sum(len(body.get(f"{kind.value}_data", ())) for kind in MediaKind)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        meta = {
            "finish_reason": {"type": "length", "length": 2},
            "prompt_tokens": len(body["input_ids"]) + num_media * self.tokens_of_each,
            "completion_tokens": 2,
            "weight_version": "default",
            "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]],
        }
        content = orjson.dumps({"text": "", "output_ids": [7, 8], "meta_info": meta})
        await response.write(b"data: " + content + b"\n\ndata: [DONE]\n\n")
        return response


@asynccontextmanager
async def served(server: SglangWithEyes) -> AsyncIterator[SglangEngine]:
    app = web.Application()
    app.add_routes(
        [
            web.get("/model_info", server.model_info),
            web.get("/server_info", server.server_info),
            web.post("/generate", server.generate),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    engine = SglangEngine(
        f"http://127.0.0.1:{port}", engine_id="e0", routing=None, policy_version_of=lambda label: 0, context_length=64
    )
    try:
        yield engine
    finally:
        await engine.aclose()
        await runner.cleanup()


async def test_sglang_is_sent_media_by_kind_in_order_and_counts_them_itself() -> None:
    """I1: only a prompt with media may be longer for the engine than the ids that it was sent."""
    server = SglangWithEyes(hears=True)
    async with served(server) as engine:
        end = await ended(engine, asked(PICTURES[0], SOUND, PICTURES[1], FILM))
        assert (end.prompt_tokens, end.completion_tokens) == (3 + 4 * 7, 2)
        assert end.routed_experts is None
        [body] = server.bodies
        assert body["input_ids"] == [1, 2, 3]
        assert body["image_data"] == [picture.url for picture in PICTURES]
        assert (body["audio_data"], body["video_data"]) == ([SOUND.url], [FILM.url])
        assert not body.get("return_routed_experts")


async def test_sglang_gets_no_media_but_those_of_the_prompt() -> None:
    """I7: an agent's own fields beside its messages bring in none that nobody knows of."""
    server = SglangWithEyes()
    async with served(server) as engine:
        await ended(engine, asked(passthrough={"image_data": ["http://x"], "audio_data": "y", "video_data": "z"}))
        assert not {"image_data", "audio_data", "video_data"} & server.bodies[0].keys()


@pytest.mark.parametrize(
    ("sees", "hears", "media"), [(False, False, PICTURES[0]), (False, True, FILM), (True, False, SOUND)]
)
async def test_an_sglang_that_would_ignore_media_is_not_asked(sees: bool, hears: bool, media: Media) -> None:
    """SGLang drops what its model cannot read, in silence."""
    server = SglangWithEyes(sees=sees, hears=hears)
    async with served(server) as engine:
        with pytest.raises(InvalidRequest, match=f"kind {media.kind.value}, which the model does not take"):
            await ended(engine, asked(media))
        assert not server.bodies
        await ended(engine, asked())


async def test_media_that_an_engine_cannot_read_are_refused_without_its_address() -> None:
    server = SglangWithEyes()
    server.refuses = "no such picture"
    async with served(server) as engine:
        with pytest.raises(InvalidRequest) as refused:
            await ended(engine, asked(PICTURES[0]))
    assert refused.value.message == "no such picture"


async def test_what_an_sglang_takes_is_told_once_and_follows_the_engine() -> None:
    """An engine that was started again with another model is asked anew for its identity, and media with it."""
    server = SglangWithEyes(sees=False)
    async with served(server) as engine:
        assert (await engine.identity()).media == ()
        with pytest.raises(InvalidRequest, match="kind video"):
            await ended(engine, asked(FILM))
        server.info["has_image_understanding"] = True
        assert (await engine.identity()).media == (MediaKind.IMAGE, MediaKind.VIDEO)
        await ended(engine, asked(FILM, PICTURES[0]))
        assert len(server.bodies) == 1


MAKERS: dict[str, Callable[[str], Engine]] = {
    "vllm": lambda url: VllmEngine(url, engine_id="e0", routing=None, policy_version_of=lambda label: 0),
    "openai": lambda url: OpenAiTextEngine(
        url, engine_id="e0", decode=lambda ids: "x", encode=lambda text: np.zeros(1, dtype=np.int32)
    ),
    "embedded": lambda url: SglangEngine(url, engine_id="e0", routing=None, policy_version_of=lambda label: 0),
    "scripted": lambda url: ScriptedEngine([ScriptedReply((7, 8))], engine_id="e0"),
}


@pytest.mark.parametrize("name", MAKERS)
async def test_an_engine_that_cannot_take_media_says_so(name: str, engine_process: EngineProcess) -> None:
    engine = MAKERS[name](engine_process.url)
    with pytest.raises(InvalidRequest, match=r"a part of kind image, which .* does not take") as refused:
        await ended(engine, asked(PICTURES[0]))
    assert "e0" not in refused.value.message  # agents read it
    await engine.aclose()


async def test_a_scripted_engine_with_eyes_counts_its_media() -> None:
    engine = ScriptedEngine([ScriptedReply((7, 8))], media_tokens=16)
    assert (await ended(engine, asked(*PICTURES))).prompt_tokens == 3 + 2 * 15
    assert engine.requests[0].media == PICTURES


async def test_the_embedded_engine_refuses_media_of_others_than_the_gateway(engine_process: EngineProcess) -> None:
    async with httpx.AsyncClient() as client:
        reply = await client.post(f"{engine_process.url}/generate", json={"input_ids": [1], "image_data": "http://x"})
    assert reply.status_code == 400
    assert "image_data: the embedded engine reads text only" in reply.text
