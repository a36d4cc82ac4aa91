"""A file of JSON objects, one a line, that a kill cannot spoil: lines are on disk when a call returns, and a torn last
line is left out when the file is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """The file; it need not exist yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.file.exists():
            return []
        whole, _, _torn = self.file.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add lines behind the last."""
        write_synced(self.file, _text(rows), mode="a")

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make these the file's lines, all at once."""
        partial = self.file.with_name(f".partial-{self.file.name}")
        write_synced(partial, _text(rows), mode="w")
        partial.replace(self.file)


def write_synced(file: Path, text: str, *, mode: str) -> None:
    """Write (mode "w") or append ("a") text that is on disk when this returns."""
    with file.open(mode) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
