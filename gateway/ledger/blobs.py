"""Bytes that messages refer to (images, recordings, films), each once, as a file named by the sha256 of its content.

    data/blobs/<sha256 hex>          the content and nothing else; its name is its checksum
    data/blobs/<sha256 hex>.*.tmp    being written; what a crash leaves of these goes at the next start

A file is durable, name and all, before `write` returns. Which sessions refer to it stands in the ledger's tables.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gateway.contracts.errors import LedgerCorrupt
from gateway.contracts.media import Blob
from gateway.ledger.segments_file import sync_folder

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".tmp"


class BlobFiles:
    """The files of one folder; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder and clear what a crash left half-written; for the one process that writes."""
        self._folder.mkdir(exist_ok=True)
        for entry in self._folder.iterdir():
            if entry.name.endswith(_UNFINISHED):
                entry.unlink(missing_ok=True)

    def write(self, blob: Blob) -> None:
        """Store a blob unless it is there already; durable when it returns. Raises OSError, and nothing remains."""
        path = self._folder / blob.sha256
        if not self._is_whole(path, len(blob.content)):
            descriptor, name = tempfile.mkstemp(_UNFINISHED, f"{blob.sha256}.", self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(blob.content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        sync_folder(self._folder)  # also where another thread made the file: its name may not be durable yet

    def has(self, sha256: str) -> bool:
        """Whether a content is there."""
        return (self._folder / sha256).is_file()

    def read(self, sha256: str, *, name: str) -> bytes:
        """A content; `name` is said in errors. Raises LedgerCorrupt if it is missing or another one."""
        try:
            content = (self._folder / sha256).read_bytes()
        except FileNotFoundError as error:
            raise LedgerCorrupt(f"{name}: the file blobs/{sha256} is missing") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise LedgerCorrupt(f"{name}: the file blobs/{sha256} holds another content; the ledger is damaged there")
        return content

    def remove(self, sha256: str) -> None:
        """Delete a content; one that is not there is fine."""
        (self._folder / sha256).unlink(missing_ok=True)

    def stored(self) -> Sequence[str]:
        """Names of all contents that are there."""
        return [entry.name for entry in self._folder.iterdir() if _NAME.fullmatch(entry.name)]

    def _is_whole(self, path: Path, num_bytes: int) -> bool:
        """A renamed file is whole; one of another length was cut by something else and is written anew."""
        try:
            return path.stat().st_size == num_bytes
        except FileNotFoundError:
            return False
