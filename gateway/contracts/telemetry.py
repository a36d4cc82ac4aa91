"""Logging as every process of the project does it: one line an event on standard error, level by `-v`."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def configure_logging(*, verbose: int) -> None:
    """Send log lines to standard error; `verbose` 0 shows warnings, 1 information, 2 and more debugging."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(stream=sys.stderr, level=level, format=_FORMAT, force=True)


def ready_line(name: str, url: str) -> str:
    """The one line that a server prints on standard output when it takes requests (parsed by launchers)."""
    return f"verbatim {name} ready at {url}"
