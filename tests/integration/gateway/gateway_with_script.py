"""Runs the real gateway with scripted engines, as a process of its own: `python gateway_with_script.py <serve flags>`.

An engine `scripted=FILE` answers by the rules of a JSON file: `[{"after": …, "reply": …, …}]`; the rule whose `after`
stands latest in the prompt's text decides, the first one if none does. Other keys are those of ScriptedReply. A prompt
that ends with the beginning of its reply gets the rest of it. `seeing=FILE` is a model that takes images: each takes 16
tokens of its prompt, and the field `saw` of the reply says what it was sent: the sha256 of bytes, or a URL.

Keys of a rule beyond those: `breaks` is a list of numbers, the first requests of a session that the rule answers break
after so many tokens each; `raises` names the error of ours that the engine's client raises instead of a reply.

SCRIPT_REQUESTS names a file that gets a line of JSON for every engine request when its stream ends: `session_id`,
`prompt_token_ids`, `routed_experts_start`, `passthrough`, `sampling`, and what came back (`token_ids`, `logprobs`).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engines.scripted import ScriptedEngine, ScriptedReply
from gateway import main
from gateway.contracts import errors
from gateway.contracts.errors import ConfigurationError, VerbatimError
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest
from gateway.contracts.ports import Engine
from gateway.sessions.model import ServedModel


def scripted_engine(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
    return _scripted(engine_id, url, model, media_tokens=0)


def seeing_engine(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
    return _scripted(engine_id, url, model, media_tokens=16)


def _scripted(engine_id: str, url: str, model: ServedModel, *, media_tokens: int) -> Engine:
    rules: list[dict[str, Any]] = json.loads(Path(url).read_text())
    num_asked: Counter[tuple[str, str]] = Counter()

    def reply(request: GenerateRequest) -> ScriptedReply:
        prompt = model.tokenizer.decode(request.token_ids)
        rule = max(rules, key=lambda rule: prompt.rfind(rule["after"]))
        if "raises" in rule:
            raise getattr(errors, rule["raises"])(rule["reply"])
        options = {name: value for name, value in rule.items() if name not in ("after", "breaks", "reply")}
        turn = (request.routing_key, rule["after"])
        if num_asked[turn] < len(breaks := rule.get("breaks", [])):
            options["fail_after"] = breaks[num_asked[turn]]
        num_asked[turn] += 1
        if request.media:
            options["reply_fields"] = {"saw": [_seen(media.url) for media in request.media]}
        stop = model.tokenizer.eos_token_ids[:1]
        tokens = (*model.tokenizer.encode(rule["reply"]).tolist(), *stop)
        asked = request.token_ids.tolist()
        begun = next((n for n in range(len(tokens) - 1, 0, -1) if asked[-n:] == list(tokens[:n])), 0)
        return ScriptedReply(tokens[begun:], **options)

    return NotingEngine(
        reply,
        engine_id=engine_id,
        routing=model.routing,
        vocab_size=model.tokenizer.vocab_size,
        context_length=model.context_length,
        media_tokens=media_tokens,
    )


def _seen(url: str) -> str:
    header, comma, encoded = url.partition(";base64,")
    return hashlib.sha256(base64.b64decode(encoded)).hexdigest() if comma else header


class NotingEngine(ScriptedEngine):
    """A ScriptedEngine that writes down what it was asked and what it gave, for whoever checks the record."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream the planned reply, then note it, however the stream ended."""
        chunks: list[GenerateChunk] = []
        try:
            async with aclosing(super().generate(request)) as stream:
                async for item in stream:
                    if isinstance(item, GenerateChunk):
                        chunks.append(item)
                    yield item
        finally:
            note(request, chunks)


def note(request: GenerateRequest, chunks: list[GenerateChunk]) -> None:
    if (file := os.environ.get("SCRIPT_REQUESTS")) is None:
        return
    line = {
        "session_id": unquote(request.routing_key),
        "prompt_token_ids": request.token_ids.tolist(),
        "routed_experts_start": request.routed_experts_start,
        "passthrough": request.passthrough,
        "sampling": asdict(request.sampling),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids.tolist()],
        "logprobs": [logprob for chunk in chunks for logprob in chunk.logprobs.tolist()],
    }
    with Path(file).open("a") as lines:
        lines.write(json.dumps(line) + "\n")


KINDS = {"scripted": scripted_engine, "seeing": seeing_engine}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    main.configure(parser)
    arguments = parser.parse_args()
    settings = main._settings(arguments)
    try:
        main.serve(
            settings,
            operator_key=os.environ.get("VERBATIM_OPERATOR_KEY"),
            engine_kinds=KINDS,
            replace_running=arguments.replace,
        )
    except VerbatimError as error:
        sys.stderr.write(f"verbatim: {error.message}\n")
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
