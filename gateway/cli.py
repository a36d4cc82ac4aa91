"""The command table: `verbatim <command>`. Each command's module is imported only when it is called.

A command module has `configure(parser)` for its flags and `run(arguments) -> int` for its work. Exit codes: 0 ok,
1 failed, 2 configuration. Errors are one line on standard error; `-v` adds the trace.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gateway.contracts.errors import ConfigurationError, VerbatimError
from gateway.contracts.telemetry import configure_logging

COMMANDS = {
    "demo": ("trainer.demo", "the whole loop on this machine's CPU"),
    "serve": ("gateway.main", "the gateway"),
    "engine": ("engines.embedded.server", "the embedded engine (speaks SGLang's protocol)"),
    "train": ("trainer.main", "the trainer"),
    "eval": ("trainer.eval_main", "a recipe's held-out tasks under the policy that the engines serve"),
    "sessions": ("gateway.inspection", "look at recorded sessions and turns"),
    "feed": ("gateway.feed_inspection", "look at leases and rollouts, release, export"),
    "bench": ("gateway.bench", "the benchmarks of a checkout"),
    "doctor": ("gateway.doctor", "look at a model, at engines or at a ledger before anything depends on them"),
}
"""name → (module, one line of help)"""

_PACKAGES = ("gateway", "trainer", "sandbox", "engines")
_EXTRA_OF = {"torch": "train", "transformers": "train", "openai": "train", "ray": "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = any(word in ("-v", "-vv", "--verbose") for word in words)
    try:
        check_packages()
        name = next((word for word in words if not word.startswith("-")), None)
        if name == "serve":  # before numpy: nothing here multiplies matrices, and each of its threads has buffers
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        parser = _parser(name)
        arguments = parser.parse_args(words)
        if arguments.command is None:
            parser.print_help()
            return 2
        configure_logging(verbose=arguments.verbose)
        return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
    except VerbatimError as error:
        return _fail(error, exit_code=2 if isinstance(error, ConfigurationError) else 1, verbose=verbose)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        hint = f"this command needs {error.name}: install verbatim-rl[{extra}]"
        return _fail(ConfigurationError(hint), exit_code=2, verbose=verbose)
    except KeyboardInterrupt:
        return 130


def check_packages() -> None:
    """Raise ConfigurationError unless our four plainly named packages are ours and lie side by side."""
    home = Path(__file__).resolve().parent.parent
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if places != [home / name]:
            intruder = ", ".join(map(str, places)) or (spec.origin if spec else "nothing")
            raise ConfigurationError(
                f"the package {name!r} comes from {intruder}, not from {home / name}: another distribution has that "
                "name; remove it, or use an environment of its own for verbatim-rl"
            )


class _Parser(argparse.ArgumentParser):
    """Wrong flags are one line like every other error, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (`{self.prog} --help` shows what there is)")


def _parser(name: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="verbatim", description="Token-exact gateway for agentic RL.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for command, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(command, help=summary, description=summary)
        sub.add_argument("-v", "--verbose", action="count", default=0, help="log more; errors with their trace")
        if command == name:
            importlib.import_module(module).configure(sub)
    return parser


def _fail(error: VerbatimError, *, exit_code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    sys.stderr.write(f"verbatim: {error.message}\n")
    return exit_code
