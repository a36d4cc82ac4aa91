"""`verbatim feed`: who holds which rollouts, and rollouts as files; asks a running gateway, with the operator's key.

    verbatim feed                       figures of every consumer
    verbatim feed leases                what is lent at the moment
    verbatim feed rollouts              finished sessions
    verbatim feed release LEASE         give one lease back; --consumer NAME: all of a consumer's
    verbatim feed export --to DIR       one safetensors file for each finished rollout, and index.json

Looking and exporting lend nothing and change nothing: consumers get what they would have got. `--json` gives one JSON
object a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gateway.client import SyncGatewayClient
from gateway.contracts.errors import ConfigurationError, NotFound
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import SCHEMA_VERSION
from gateway.inspection import label_of, print_rows
from gateway.settings import OPERATOR_KEY_VARIABLE

_PAGE = 1000
_INDEX = "index.json"
_EXPORTED = ("session_id", "group", "task", "labels", "metadata", "origin", "complete", "gaps")


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags of `verbatim feed`."""
    parser.add_argument("action", nargs="?", default="counts", choices=sorted(_ACTIONS), help="what to do (counts)")
    parser.add_argument("lease", nargs="?", help="for release: the lease")
    parser.add_argument("--url", default="http://127.0.0.1:8600", help="the gateway (http://127.0.0.1:8600)")
    parser.add_argument("--consumer", metavar="NAME", help="only this consumer")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="only sessions so labelled")
    parser.add_argument("--to", type=Path, metavar="DIR", help="for export: the folder to write to")
    parser.add_argument("--pick", metavar="NAME", help="for export: which turns train (the gateway's default)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked for; raises LedgerError where no gateway answers, ConfigurationError for wrong flags."""
    if arguments.lease is not None and arguments.action != "release":
        raise ConfigurationError(f"{arguments.action} takes no lease: verbatim feed {arguments.action}")
    key = os.environ.get(OPERATOR_KEY_VARIABLE) or None
    with SyncGatewayClient(arguments.url, api_key=key, retry_seconds=0.0) as gateway:
        print_rows(_ACTIONS[arguments.action](gateway, arguments), as_json=arguments.json, nothing="nothing there")
    return 0


def _counts(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> list[Mapping[str, JsonValue]]:
    consumers = gateway.consumers() if arguments.consumer is None else (arguments.consumer,)
    return [{"consumer": consumer, **asdict(gateway.counts(consumer))} for consumer in consumers]


def _leases(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> list[Mapping[str, JsonValue]]:
    return [
        {
            "lease": lease.lease_id,
            "consumer": lease.consumer,
            "ends_in_seconds": round(lease.expires_at - time.time(), 1),
            "rollouts": len(lease.rollouts),
            "incomplete": sum(not rollout.complete for rollout in lease.rollouts),
            "sessions": [rollout.session_id for rollout in lease.rollouts],
        }
        for lease in gateway.leases(consumer=arguments.consumer)
    ]


def _rollouts(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> list[Mapping[str, JsonValue]]:
    names = ("session_id", "group", "outcome", "reward", "origin", "complete", "labels")
    return [{name: session[name] for name in names} for session in _finished(gateway, arguments)]


def _release(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> list[Mapping[str, JsonValue]]:
    if (arguments.lease is None) == (arguments.consumer is None):
        raise ConfigurationError("say what to release: verbatim feed release LEASE, or --consumer NAME")
    if arguments.lease is not None:
        gateway.release(arguments.lease)
        return [{"lease": arguments.lease, "state": "released"}]
    return [{"consumer": arguments.consumer, "released": gateway.release_consumer(arguments.consumer)}]


def _export(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> list[Mapping[str, JsonValue]]:
    """The index is written last, so that a folder that has one is whole."""
    if arguments.to is None:
        raise ConfigurationError("say where to: verbatim feed export --to DIR")
    folder: Path = arguments.to
    folder.mkdir(parents=True, exist_ok=True)
    sessions = list(_finished(gateway, arguments))
    entries, num_dropped = [], 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for session in progress.track(sessions, description="rollouts"):
            with suppress(NotFound):  # its data were dropped; the index says how many
                entries.append(_export_one(gateway, session["session_id"], folder, arguments.pick))
                continue
            num_dropped += 1
    index = {
        "schema_version": SCHEMA_VERSION,
        "pick": arguments.pick,
        "num_dropped": num_dropped,
        "rollouts": entries,
    }
    _write(folder / _INDEX, json.dumps(index, ensure_ascii=False, indent=1).encode())
    return [{"folder": str(folder), "rollouts": len(entries), "dropped": num_dropped}]


def _export_one(gateway: SyncGatewayClient, session_id: str, folder: Path, pick: str | None) -> Mapping[str, JsonValue]:
    """Write one rollout; the file has its snapshot's name, as ids may be anything."""
    session = gateway.session(session_id)
    finish = session["finish"]
    body = gateway.rollout_bytes(session_id, finish["snapshot"], pick=pick)
    file = f"{finish['snapshot']}.safetensors"
    _write(folder / file, body)
    return {
        "file": file,
        "num_bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        **{name: session[name] for name in _EXPORTED},
        "finish": finish,
    }


def _finished(gateway: SyncGatewayClient, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All finished sessions with the labels, in order of id."""
    labels = dict(label_of(text) for text in arguments.label)
    after = None
    while page := gateway.sessions(labels=labels, limit=_PAGE, after=after):
        yield from (session for session in page if session["state"] == "finished")
        after = page[-1]["session_id"]


def _write(file: Path, content: bytes | bytearray) -> None:
    """All of it or nothing."""
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content)
    beside.replace(file)


_ACTIONS = {"counts": _counts, "leases": _leases, "rollouts": _rollouts, "release": _release, "export": _export}
