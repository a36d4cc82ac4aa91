"""What the clients of all engines behind HTTP have in common: a name, an address, and one way to both."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from engines.connection import EngineHttp
from gateway.contracts.ports import RawCall, RawReply


class HttpEngine:
    """The part of `gateway.contracts.ports.Engine` and `ForwardingEngine` that needs only the connection."""

    def __init__(self, http: EngineHttp) -> None:
        self._http = http

    @property
    def engine_id(self) -> str:
        """The name given to this engine."""
        return self._http.engine_id

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._http.url

    def forward(self, call: RawCall) -> AbstractAsyncContextManager[RawReply]:
        """Send a call on as it is; raises EngineUnavailable, EngineTimeout, EngineProtocolError."""
        return self._http.forward(call)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()
