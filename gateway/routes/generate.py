"""`/generate` as SGLang's clients call it, with or without a session in the path."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.replicas.pool import ReplicaPool
from gateway.routes import openapi
from gateway.routes.hot_path import ModelRoute
from gateway.routes.turns import Calls
from gateway.wire.generate import SglangWriter, parse_sglang_request


def generate_router(calls: Calls, *, max_body_bytes: int) -> APIRouter:
    """The route; to be included before routes that take any path."""
    router = APIRouter(tags=["agents"])
    label = partial(_weight_label, calls.runner.parts.pool)

    async def generate(request: Request) -> Response:
        """Samples for one or several prompts."""
        body, session = await calls.receive(request, max_bytes=max_body_bytes)
        asked = parse_sglang_request(body)
        make_writer = partial(SglangWriter, asked, label)
        return await (await calls.begin(request, asked.turns, make_writer, session=session)).reply()

    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(
            prefix + "/generate",
            generate,
            methods=["POST"],
            openapi_extra=openapi.GENERATE,
            route_class_override=ModelRoute,
        )
    return router


def _weight_label(pool: ReplicaPool, policy_version: int) -> str:
    """What an engine calls a policy version now; where none has it any more, the number, which is a label too."""
    identities = (replica.identity for replica in pool.replicas)
    labels = (each.weight_version for each in identities if each.policy_version == policy_version)
    return next(labels, str(policy_version))
