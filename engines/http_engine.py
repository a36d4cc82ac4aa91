"""What the clients of all engines behind HTTP have in common: a name, an address, and one way to both."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from engines.connection import EngineHttp
from gateway.contracts.ports import RawCall, RawReply


class HttpEngine:
    """The part of `gateway.contracts.ports.Engine` and `ForwardingEngine` that needs only the connection."""

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self.engine_id = http.engine_id
        """The name given to this engine."""
        self.url = http.url
        """Where it listens."""

    def forward(self, call: RawCall) -> AbstractAsyncContextManager[RawReply]:
        """Send a call on as it is; raises EngineUnavailable, EngineTimeout, EngineProtocolError."""
        return self._http.forward(call)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()
