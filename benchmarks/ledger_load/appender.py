"""A program: one of several processes that append to one store.

Usage: `appender.py DATA LOCK PREFIX AGENTS TURNS`; prints a line when it is ready, begins when it reads one, prints its
figures as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvloop

from benchmarks.ledger_load.turns import append_turns
from gateway.ledger.sqlite import SqliteLedger


async def main(data: str, lock: str, prefix: str, num_agents: str, num_turns: str) -> None:
    """Append and report."""
    ledger = SqliteLedger.open(Path(data), lock=int(lock))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    figures = await append_turns(ledger, int(num_agents), int(num_turns), prefix=prefix)
    await ledger.aclose()
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
