"""A command's connection to its gateway: there from the start, and allowed to go away for a while later."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.client import GatewayClient
from gateway.contracts.errors import ConfigurationError, LedgerError
from trainer.settings import GatewaySettings

OPERATOR_KEY_VARIABLE = "VERBATIM_OPERATOR_KEY"
"""Environment variable with the operator's key of the gateway, where keys are on."""


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[GatewayClient]:
    """A client of a gateway that answers now, and may go away for `retry_seconds` later.

    Raises ConfigurationError if there is none.
    """
    key = os.environ.get(OPERATOR_KEY_VARIABLE) or None
    async with GatewayClient(settings.url, api_key=key, retry_seconds=0.0) as impatient:
        try:
            await impatient.health()
        except LedgerError as error:
            raise ConfigurationError(f"gateway.url: {error.message}; start it with `verbatim serve`") from error
    async with GatewayClient(settings.url, api_key=key, retry_seconds=settings.retry_seconds) as gateway:
        yield gateway
