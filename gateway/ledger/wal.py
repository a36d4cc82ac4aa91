"""A look at SQLite's write-ahead log before SQLite reads it: is there a damaged frame in front of whole ones?

SQLite replays a log up to the first frame whose checksum does not hold, takes that for the end, and forgets the rest.
After a torn write at the end this is right. After a flipped byte in the middle it silently loses commits that were
answered. The two can be told apart: each frame's checksum continues the one that is stored before it, so the frames
behind a damaged one can still be verified, and a second commit behind it proves that it was whole on disk once
(synchronous=FULL: a commit is synced before the next one is written).

Format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gateway.contracts.errors import LedgerCorrupt

_HEADER = struct.Struct(">IIIIIIII")
_FRAME = struct.Struct(">IIIIII")
_MAGIC = 0x377F0682
_BIG_ENDIAN_SUMS = 1
_VERSION = 3007000
_WORD = 0xFFFFFFFF


class LogDamage(NamedTuple):
    """The first frame that does not hold. offset: its first byte in the file. num_commits_behind: whole commits behind
    it, which SQLite would forget; one may never have been answered (a torn write), two or more prove damage."""

    offset: int
    num_commits_behind: int

    @property
    def is_proven(self) -> bool:
        """Whether answered commits would be lost."""
        return self.num_commits_behind > 1


def find_damage(log: Path) -> LogDamage | None:
    """None for a log that is whole, empty, absent, or ends in a torn write. Nobody may write to it meanwhile."""
    try:
        content = log.read_bytes()
    except FileNotFoundError:
        return None
    if not any(content[: _HEADER.size]):
        return None
    header = _header(content)
    if header is None:
        return LogDamage(0, len(content) // max(1, _HEADER.size)) if len(content) > _HEADER.size else None
    broken: int | None = None
    commits = 0
    for offset, holds, is_commit in _frames(content, header):
        if broken is None and not holds:
            broken = offset
        elif broken is not None and holds and is_commit:
            commits += 1
    if broken is None or not commits:
        return None
    return LogDamage(broken, commits)


def check_log(log: Path) -> None:
    """Raise LedgerCorrupt if answered commits would be lost by opening the store."""
    damage = find_damage(log)
    if damage is not None and damage.is_proven:
        raise LedgerCorrupt(
            f"{log.name}: byte {damage.offset}: a damaged frame stands before {damage.num_commits_behind} whole "
            "commits, which opening the store would lose; keep a copy of the folder, then "
            "`verbatim doctor --data DIR --repair`"
        )


class _Header(NamedTuple):
    page_bytes: int
    salts: tuple[int, int]
    sums: tuple[int, int]
    words: str


def _header(content: bytes) -> _Header | None:
    if len(content) < _HEADER.size:
        return None
    magic, version, page_bytes, _, salt_1, salt_2, sum_1, sum_2 = _HEADER.unpack_from(content)
    if magic & ~_BIG_ENDIAN_SUMS != _MAGIC or version != _VERSION or not 512 <= page_bytes <= 65536:
        return None
    words = ">" if magic & _BIG_ENDIAN_SUMS else "<"
    if _sums(content[:24], (0, 0), words) != (sum_1, sum_2):
        return None
    return _Header(page_bytes, (salt_1, salt_2), (sum_1, sum_2), words)


def _frames(content: bytes, header: _Header) -> Iterator[tuple[int, bool, bool]]:
    """Offset, whether it holds, whether it commits: of every frame that may be of this log and not of an older one."""
    before = header.sums
    size = _FRAME.size + header.page_bytes
    for offset in range(_HEADER.size, len(content) - size + 1, size):
        _, num_pages, *rest = _FRAME.unpack_from(content, offset)
        found = (rest[2], rest[3])
        body = content[offset : offset + 8] + content[offset + _FRAME.size : offset + size]
        holds = (rest[0], rest[1]) == header.salts and _sums(body, before, header.words) == found
        yield offset, holds, num_pages != 0
        before = found


def _sums(data: bytes, start: tuple[int, int], words: str) -> tuple[int, int]:
    one, two = start
    numbers = struct.unpack(f"{words}{len(data) // 4}I", data)
    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        one = (one + first + two) & _WORD
        two = (two + second + one) & _WORD
    return one, two
