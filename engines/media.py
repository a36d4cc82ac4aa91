"""Prompts that hold images, recordings or films, for engines that cannot read them."""

from __future__ import annotations

from collections.abc import Collection

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import GenerateRequest, MediaKind


def refuse_media(request: GenerateRequest, taken: Collection[MediaKind], *, named: str) -> None:
    """Raise InvalidRequest for the first part of a prompt that is of no kind among `taken`: what an engine would drop
    in silence. named: the engine, in words."""
    for media in request.media:
        if media.kind not in taken:
            raise InvalidRequest(f"the messages hold a part of kind {media.kind.value}, which {named} does not take")
