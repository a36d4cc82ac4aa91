"""The sandbox drivers by the names that settings and command lines use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.ports import SandboxDriver
from sandbox.local.driver import LocalDriver
from sandbox.plain import PlainProcessDriver

DRIVERS: Mapping[str, Callable[[], SandboxDriver]] = {"local": LocalDriver, "subprocess": PlainProcessDriver}


def make_driver(name: str) -> SandboxDriver:
    """The driver called `name`; raises ConfigurationError for an unknown name.

    "local" isolates and says at its first sandbox (or at `LocalDriver.check`) if this machine does not permit that;
    "subprocess" isolates nothing and warns.
    """
    try:
        make = DRIVERS[name]
    except KeyError:
        near = difflib.get_close_matches(name, DRIVERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DRIVERS)}"
        raise ConfigurationError(f"unknown sandbox driver {name!r}; {hint}") from None
    return make()
