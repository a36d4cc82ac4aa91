"""`verbatim sessions`: look into a ledger, also while a gateway writes it; nothing is changed.

Without an id it lists sessions with their totals, with one it shows the session's turns. `--json` gives one JSON object
a line instead of a table, for other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.contracts.errors import ConfigurationError, NotFound
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import SessionRecord, TurnRecord
from gateway.ledger.sqlite import SqliteLedger


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags of `verbatim sessions`."""
    parser.add_argument("session", nargs="?", help="show the turns of this session")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the gateway's data folder")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="only sessions so labelled")
    parser.add_argument("--limit", type=int, default=50, help="list at most so many sessions (default 50)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    """Print what is asked for; NotFound for an unknown session."""
    if not arguments.data.is_dir():
        raise ConfigurationError(f"{arguments.data}: no such data folder")
    labels = dict(_label(text) for text in arguments.label)
    rows = asyncio.run(_rows(arguments.data, arguments.session, labels=labels, limit=arguments.limit))
    if arguments.json:
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        _print_table(rows)
    return 0


async def _rows(
    data: Path, session_id: str | None, *, labels: Mapping[str, str], limit: int
) -> Sequence[dict[str, JsonValue]]:
    ledger = SqliteLedger.open(data, read_only=True)
    try:
        if session_id is not None:
            if await ledger.session(session_id) is None:
                raise NotFound(f"no session {session_id!r} in {data}")
            return [_turn_row(turn) for turn in await ledger.turns(session_id)]
        sessions = await ledger.sessions(labels=labels or None, limit=limit)
        return [await _session_row(ledger, session) for session in sessions]
    finally:
        await ledger.aclose()


async def _session_row(ledger: SqliteLedger, session: SessionRecord) -> dict[str, JsonValue]:
    turns = await ledger.turns(session.session_id)
    finish = await ledger.finish_record(session.session_id)
    return {
        "session": session.session_id,
        "group": session.group,
        "turns": len(turns),
        "segments": sum(turn.attachment.parent_id is None for turn in turns),
        "sampled_tokens": sum(len(turn.output_token_ids) for turn in turns),
        "policy_versions": _versions(turns),
        "outcome": "open" if finish is None else finish.outcome,
        "reward": None if finish is None else finish.reward,
    }


def _turn_row(turn: TurnRecord) -> dict[str, JsonValue]:
    attachment = turn.attachment
    return {
        "turn": turn.index,
        "attached": attachment.tier.value if attachment.segment_reason is None else attachment.segment_reason.value,
        "certified_by": turn.meta.get("certified_by"),
        "prompt_tokens_added": len(turn.prompt_token_ids),
        "sampled_tokens": len(turn.output_token_ids),
        "policy_versions": _versions([turn]),
        "routing_rows": turn.experts_stop - turn.experts_start,
        "finish": turn.finish.reason.value,
        "engine": turn.engine_id,
        "trainable": turn.untrainable_reason or "yes",
        "reply": _reply_text(turn.reply),
    }


def _versions(turns: Iterable[TurnRecord]) -> list[int]:
    return sorted({span.policy_version for turn in turns for span in turn.version_spans})


def _reply_text(reply: Mapping[str, Any]) -> str:
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in reply.get("tool_calls") or []]
    return " ".join(filter(None, [reply.get("content"), *calls]))


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--label {text!r}: write it as KEY=VALUE")
    return key, value


def _print_table(rows: Sequence[Mapping[str, JsonValue]]) -> None:
    """Aligned columns, never cut: ids are there to be copied."""
    if not rows:
        sys.stdout.write("nothing recorded\n")
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _cell(value: JsonValue) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value).replace("\n", "\\n")
