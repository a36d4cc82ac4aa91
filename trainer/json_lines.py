"""A file of JSON objects, one a line, that a kill cannot spoil: lines are on disk when a call returns, and a torn last
line is left out when the file is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.durable import write_text


class JsonLines:
    """The file; it need not exist yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.file.exists():
            return []
        whole, _, _torn = self.file.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add lines behind the last."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(_text(rows))
            stream.flush()
            os.fsync(stream.fileno())

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make these the file's lines, all at once."""
        write_text(self.file, _text(rows))


def _text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
