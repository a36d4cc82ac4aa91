"""Routing replay of a model folder, for `verbatim doctor --model`; the trainer tries it, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_NEEDED = ("torch", "transformers")


def replay_support(folder: Path) -> Mapping[str, Any]:
    """`status` (supported, dense, unsupported, unknown), `reason` unless supported, and what was found."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {"status": "unknown", "reason": f"needs {', '.join(missing)}: install verbatim-rl[train]"}
    # By name: the gateway's modules import neither the trainer nor torch.
    support: Mapping[str, Any] = importlib.import_module("trainer.replay.doctor").examine(folder)
    return support


def show_replay(replay: Mapping[str, Any]) -> None:
    """A few lines on standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table(show_header=False, box=None)
    table.add_row("routing replay", Text(_verdict(replay)))
    if "routers" in replay:
        layers = f"{replay['layers']} of {replay['decoder_layers']} layers of what was tried"
        experts = f"{replay['experts_per_token']} of {replay['experts']} experts a token"
        size = f"{replay['dtype']}, {replay['bytes_per_token']} bytes a token over {replay['model_layers']} layers"
        table.add_row("routers", Text(f"{', '.join(replay['routers'])} in {layers}, {experts}, {size}"))
        table.add_row("experts are selected by", Text(", ".join(replay["selected_by"])))
        table.add_row("used ids are read from", Text(", ".join(replay["witness"])))
        for name in replay["override"]:
            table.add_row("replayed by an override for", Text(name))
        for layer, reason in replay["left_alone"].items():
            table.add_row(f"layer {layer} is left alone", Text(reason))
    if "proved_on" in replay:
        table.add_row("tried on", Text(replay["proved_on"]))
    console.print(table)


def _verdict(replay: Mapping[str, Any]) -> str:
    if replay["status"] == "supported":
        return "supported: bitwise on its own routing, finite and with gradient on foreign routing, every id verified"
    if replay["status"] == "dense":
        return "dense: nothing to replay"
    return f"{replay['status']}: {replay['reason']}"
