"""`verbatim bench NAME`: the benchmarks of a checkout; they are not part of the installed packages."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from gateway.contracts.errors import ConfigurationError

NAMES = ("chaos", "experts", "gateway", "growth", "ledger", "replay", "scale", "tokens", "updates")
"""The benchmarks that there are."""

_CHECKOUT = Path(__file__).resolve().parent.parent


def configure(parser: argparse.ArgumentParser) -> None:
    """One sub-command a benchmark, each with its own flags."""
    names = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name in NAMES:
        module = _benchmark(name)
        summary = (module.__doc__ or "").partition("\n")[0]
        module.configure(names.add_parser(name, help=summary, description=summary))


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; 1 if it found something wrong."""
    return int(_benchmark(arguments.benchmark).run(arguments))


def _benchmark(name: str) -> ModuleType:
    """Raises ConfigurationError where Verbatim was not started from a checkout."""
    if not (_CHECKOUT / "benchmarks" / f"{name}.py").is_file():
        raise ConfigurationError(f"no benchmarks beside {_CHECKOUT / 'gateway'}: run them from a checkout of Verbatim")
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))
    return importlib.import_module(f"benchmarks.{name}")
