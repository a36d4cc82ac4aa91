"""A program: `verbatim` processes, each a fork of one that has imported the packages, so that they start quickly.

    python -m benchmarks.custody.forks        ← {"words": ["serve", …], "log": FILE}   one line each
                                              → the process id

Importing is most of a gateway's start. What a fork runs is `gateway.cli.main`, as the command does; it shares nothing
with its siblings. When standard input ends, the program does, and its children are killed with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import gateway.cli
import gateway.main
from gateway.child_process import end_with_parent


def serve_forks() -> None:
    """Fork for each line until there are no more."""
    parent = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order["words"], order["log"], parent)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


def _become(words: Sequence[str], log: str, parent: int) -> NoReturn:
    """Run a command and end with its exit code, whatever happens."""
    exit_code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with_parent(parent)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, target in ((nothing, 0), (nothing, 1), (descriptor, 2)):
            os.dup2(number, target)
        exit_code = gateway.cli.main(list(words))
    except BaseException:  # noqa: BLE001 (the parent's loop must never go on in the child)
        traceback.print_exc()
    os._exit(exit_code)


if __name__ == "__main__":
    serve_forks()
