"""`verbatim sessions`: look into a ledger, also while a gateway writes it; nothing is changed.

Without an id it lists sessions with their totals, with one it shows the session's turns, with `--report` what happened
to its tokens. `--json` gives one JSON object a line instead of a table, for other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from gateway.contracts.errors import ConfigurationError, NotFound
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Ledger
from gateway.contracts.records import SessionRecord, TurnRecord
from gateway.ledger.postgres import PostgresLedger
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import DEFAULT_PICK, LeftOutReason, Pick, PickChoice, pick_turns
from gateway.sessions.report import DriftReport, Retokenisation, SessionReport, session_report
from gateway.sessions.segments import sealed_turns
from gateway.tito.conversation import HistoryPolicy


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags of `verbatim sessions`."""
    parser.add_argument("session", nargs="?", help="show the turns of this session")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the gateway's data folder")
    parser.add_argument("--ledger", metavar="URL", help="the database of gateways that share one, with --objects")
    parser.add_argument("--objects", metavar="URL", help="where its arrays are: s3://BUCKET/PREFIX or file:///FOLDER")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="only sessions so labelled")
    parser.add_argument("--limit", type=int, default=50, help="list at most so many sessions (default 50)")
    parser.add_argument("--report", action="store_true", help="what happened to this session's tokens")
    parser.add_argument("--model", type=Path, metavar="PATH", help="for --report: compare with re-tokenising")
    parser.add_argument(
        "--pick", default=DEFAULT_PICK, metavar="NAME", help="which turns train (delivered): all, final-path, …"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    """Print what is asked for; NotFound for an unknown session."""
    place = _place(arguments)
    pick = PickChoice.load(arguments.pick).default
    if arguments.report:
        return _report(arguments, place, pick)
    labels = dict(label_of(text) for text in arguments.label)
    rows = asyncio.run(_rows(place, arguments.session, pick, labels=labels, limit=arguments.limit))
    print_rows(rows, as_json=arguments.json, nothing="nothing recorded")
    return 0


def _report(arguments: argparse.Namespace, place: LedgerPlace, pick: Pick) -> int:
    if arguments.session is None:
        raise ConfigurationError("--report needs a session: verbatim sessions ID --data DIR --report")
    model = arguments.model
    retokenisation = None
    if model is not None:
        retokenisation = Retokenisation.of_model(ServedModel.load(model, history_policy=HistoryPolicy.KEEP))
    session, turns = asyncio.run(_session(place, arguments.session))
    report = session_report(session, turns, pick, retokenisation)
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(report), ensure_ascii=False) + "\n")
    else:
        print_report(report, Console(highlight=False))
    return 0


class LedgerPlace(NamedTuple):
    """Where a ledger is: a folder, or a database with the URL of its objects."""

    name: str
    objects: str | None

    def open(self) -> Ledger:
        """For reading only; raises ConfigurationError, SchemaMismatch."""
        if self.objects is None:
            return SqliteLedger.open(Path(self.name), read_only=True)
        return PostgresLedger.open(self.name, self.objects, read_only=True)


def _place(arguments: argparse.Namespace) -> LedgerPlace:
    data, dsn, objects = arguments.data, arguments.ledger, arguments.objects
    if (data is None) == (dsn is None) or (dsn is None) != (objects is None):
        raise ConfigurationError("give --data DIR (a gateway's data folder), or --ledger URL with --objects URL")
    if data is not None and not data.is_dir():
        raise ConfigurationError(f"{data}: no such data folder")
    return LedgerPlace(str(data or dsn), objects)


async def _session(place: LedgerPlace, session_id: str) -> tuple[SessionRecord, Sequence[TurnRecord]]:
    ledger = place.open()
    try:
        session = await ledger.session(session_id)
        if session is None:
            raise NotFound(f"no session {session_id!r} in {place.name}")
        return session, sealed_turns(await ledger.turns(session_id), await ledger.finish_record(session_id))
    finally:
        await ledger.aclose()


async def _rows(
    place: LedgerPlace, session_id: str | None, pick: Pick, *, labels: Mapping[str, str], limit: int
) -> Sequence[dict[str, JsonValue]]:
    if session_id is not None:
        _, turns = await _session(place, session_id)
        left_out = pick.leaves_out(turns)
        return [_turn_row(turn, left_out.get(turn.turn_id)) for turn in turns]
    ledger = place.open()
    try:
        sessions = await ledger.sessions(labels=labels or None, limit=limit)
        return [await _session_row(ledger, session, pick) for session in sessions]
    finally:
        await ledger.aclose()


async def _session_row(ledger: Ledger, session: SessionRecord, pick: Pick) -> dict[str, JsonValue]:
    finish = await ledger.finish_record(session.session_id)
    turns = sealed_turns(await ledger.turns(session.session_id), finish)
    account = pick_turns(turns, pick).report
    return {
        "session": session.session_id,
        "group": session.group,
        "complete": session.complete,
        "turns": len(turns),
        "segments": sum(turn.attachment.parent_id is None for turn in turns),
        "sampled_tokens": account.num_sampled_tokens,
        "trained_tokens": account.num_trained_tokens,
        "left_out": account.left_out_tokens,
        "policy_versions": _versions(turns),
        "outcome": "open" if finish is None else finish.outcome,
        "reward": None if finish is None else finish.reward,
    }


def _turn_row(turn: TurnRecord, left_out: LeftOutReason | None) -> dict[str, JsonValue]:
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
        "picked": "yes" if left_out is None else left_out.value,
        "reply": _reply_text(turn.reply),
    }


def _versions(turns: Iterable[TurnRecord]) -> list[int]:
    return sorted({span.policy_version for turn in turns for span in turn.version_spans})


def _reply_text(reply: Mapping[str, Any]) -> str:
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in reply.get("tool_calls") or []]
    return " ".join(filter(None, [reply.get("content"), *calls]))


def label_of(text: str) -> tuple[str, str]:
    """`KEY=VALUE` of a flag; raises ConfigurationError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--label {text!r}: write it as KEY=VALUE")
    return key, value


def print_rows(rows: Sequence[Mapping[str, JsonValue]], *, as_json: bool, nothing: str) -> None:
    """One JSON object a line, or aligned columns, never cut: ids are there to be copied. nothing: said without rows."""
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    if not rows:
        sys.stdout.write(f"{nothing}\n")
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def print_report(report: SessionReport, console: Console) -> None:
    """A session's report as a page: what it is, how turns were matched, what trains, what re-tokenising would break."""
    table = Table(title=f"session {report.session_id}", show_header=False, title_justify="left")
    account = report.pick
    for name, value in (
        ("complete", _complete(report)),
        ("turns", f"{report.num_turns} in {report.num_roots} trees of tokens"),
        ("forks", f"at {report.num_forks} turns that several others extend"),
        ("new tokens because", _named(report.segment_reasons)),
        ("matched", _named(report.tiers)),
        ("prompts certified by", _named(report.certified_by)),
        ("flags of replies", _named(report.flags)),
        ("hidden messages", f"{report.num_hidden_messages} that the template did not show to the model"),
        ("pick", f"{account.pick}: {report.num_segments} segments"),
        ("tokens", f"{account.num_sampled_tokens} sampled = {account.num_trained_tokens} trained "
         f"+ {account.num_left_out_tokens} left out"),
        ("left out", _named(account.left_out_tokens)),
        *_drift_rows(report.drift),
    ):  # fmt: skip
        table.add_row(name, value)
    console.print(table, soft_wrap=True)


def _complete(report: SessionReport) -> str:
    if report.complete:
        return "yes"
    gaps = (
        f"; not sampled here: messages {', '.join(map(str, report.gaps))} of the first request" if report.gaps else ""
    )
    return f"no ({report.origin.value}{gaps})"


def _drift_rows(drift: DriftReport | None) -> Sequence[tuple[str, str]]:
    if drift is None:
        return [("re-tokenised", "not compared; give --model PATH")]
    raised = f", {drift.num_raised_turns} refused by the template" if drift.num_raised_turns else ""
    return [
        (
            "re-tokenised",
            f"{drift.num_drifted_turns} of {drift.num_extending_turns} prompts would be other tokens{raised}",
        ),
        ("", f"{drift.num_wrong_tokens} of {drift.num_compared_tokens} sampled tokens in them would be wrong"),
    ]


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _cell(value: JsonValue) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{count}" for name, count in value.items()) or "-"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value).replace("\n", "\\n")
