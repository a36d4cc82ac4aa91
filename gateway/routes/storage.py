"""For operators: how large the store is, whether there is room, and what a sweep would drop or drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.ledger.keeper import StorageKeeper, report_json
from gateway.ledger.sweeping import KeepRules
from gateway.routes import openapi
from gateway.routes.access import Access
from gateway.routes.bodies import json_reply, read_fields, typed

_MAX_BODY_BYTES = 2**20
_SWEEP_FIELDS = ("older_than_seconds", "keep_bytes", "acknowledged_only", "dry_run")


def storage_router(keeper: StorageKeeper, access: Access) -> APIRouter:
    """Routes under `/admin/storage`."""
    routes = _StorageRoutes(keeper)
    router = APIRouter(prefix="/admin/storage", tags=["admin"], dependencies=[Depends(access.check_operator)])
    router.add_api_route("", routes.show, methods=["GET"], openapi_extra=openapi.STORAGE)
    router.add_api_route("/sweep", routes.sweep, methods=["POST"], openapi_extra=openapi.SWEEP)
    return router


class _StorageRoutes:
    """The routes' functions."""

    def __init__(self, keeper: StorageKeeper) -> None:
        self._keeper = keeper

    async def show(self, request: Request) -> Response:
        """The disk, the store by kind, the rules, the last sweep."""
        return json_reply(await self._keeper.status())

    async def sweep(self, request: Request) -> Response:
        """Drop by the settings' rules, or by the body's; `dry_run` only says what would go."""
        fields = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=_SWEEP_FIELDS)
        dry_run = typed(fields, "dry_run", bool, "true or false") or False
        rules = _rules(fields, self._keeper.rules)
        return json_reply(report_json(await self._keeper.sweep(rules, dry_run=dry_run)))


def _rules(fields: Mapping[str, JsonValue], regular: KeepRules) -> KeepRules:
    """The body's, or where it names no age and no size, the regular ones."""
    seconds = _at_least_0(fields, "older_than_seconds", (int, float), "a number of seconds")
    num_bytes = _at_least_0(fields, "keep_bytes", int, "a whole number of bytes")
    acknowledged_only = typed(fields, "acknowledged_only", bool, "true or false")
    if seconds is None and num_bytes is None:
        return regular if acknowledged_only is None else replace(regular, acknowledged_only=acknowledged_only)
    only = acknowledged_only is not False
    return KeepRules(
        seconds=None if only else seconds,
        acknowledged_seconds=seconds if only else None,
        num_bytes=num_bytes,
        acknowledged_only=only,
        consumers=regular.consumers,
    )


def _at_least_0(fields: Mapping[str, JsonValue], name: str, kind: type | tuple[type, ...], words: str) -> JsonValue:
    value = typed(fields, name, kind, words)
    if value is not None and not 0 <= value < float("inf"):
        raise InvalidRequest(f"{name}: expected {words}, 0 or more")
    return value
