"""Routing rows in append-only segment files beside the SQLite store.

A folder holds `routing-00000001.seg`, `routing-00000002.seg`, …; a writer appends to the last, or begins another where
a writer of another process has that one (it holds a lock on the file for as long). Every record carries its own key,
lengths and checksum, so that a reader trusts nothing but the bytes and an index can be remade from them:

    magic "VRX1" · crc32 u32 · key length u32 · payload length u64 · key (JSON) · payload        (little-endian)
    magic "VRX2" · the same, its payload packed (packing.py)

The checksum covers all that follows it. The order of writing is: append, fdatasync (`flush`), then commit the row that
points at the record. So a crash leaves at worst a tail that no row points at: later records are appended behind it, and
it goes away with its file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gateway.contracts.errors import LedgerCorrupt
from gateway.ledger.backend import Buffer, Location
from gateway.ledger.packing import unpack
from gateway.ledger.rows import decode_json

MAX_FILE_BYTES = 256 * 2**20

_HEADER = struct.Struct("<4sIIQ")
_LENGTHS = struct.Struct("<IQ")
_MAGIC = b"VRX1"
_PACKED_MAGIC = b"VRX2"
_ANY_MAGIC = _MAGIC[:-1]
_NAME = re.compile(r"routing-(\d{8})\.seg")


class SegmentFileWriter:
    """The appender of a process to a folder of segment files; not thread-safe, used from the ledger's writer thread."""

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        folder.mkdir(exist_ok=True)
        self._number = max(_numbers(folder), default=0)
        self._descriptor: int | None = None
        self._end = 0
        self._batch_start = 0
        self._unsynced = False

    def append(self, key: bytes, payload: Buffer, *, is_packed: bool = False) -> Location:
        """Write one record, without a copy of it; it is durable after `flush`. Raises OSError, and then nothing of it
        remains. is_packed: the payload is a frame of packing.py."""
        lengths = _LENGTHS.pack(len(key), len(payload))
        checksum = zlib.crc32(payload, zlib.crc32(key, zlib.crc32(lengths)))
        record_bytes = _HEADER.size + len(key) + len(payload)
        descriptor = self._file_for(record_bytes)
        try:
            magic = _PACKED_MAGIC if is_packed else _MAGIC
            _write_all(descriptor, [_HEADER.pack(magic, checksum, len(key), len(payload)), key, payload])
        except OSError:
            os.ftruncate(descriptor, self._end)  # a full disk: the half-written record must not stay in the way
            raise
        location = Location(self._number, self._end, record_bytes)
        self._end += record_bytes
        self._unsynced = True
        return location

    def begin(self) -> None:
        """What is appended from here on belongs together."""
        self._batch_start = self._end

    def begin_next(self) -> None:
        """Append to a new file from here on, so that the one until now can be emptied and removed; raises OSError."""
        self._open_next()

    @property
    def number(self) -> int:
        """Of the file that is appended to, or will be."""
        return self._number

    @property
    def num_bytes(self) -> int:
        """Of that file."""
        return self._end if self._descriptor is not None else file_sizes(self._folder).get(self._number, 0)

    def forget(self) -> None:
        """Cut off what was appended since `begin`, to which nobody will ever point; raises OSError."""
        if self._descriptor is not None and self._end > self._batch_start:
            os.ftruncate(self._descriptor, self._batch_start)
            self._end = self._batch_start

    def flush(self) -> None:
        """Make every appended record durable (fdatasync); cheap when there is none."""
        if self._unsynced and self._descriptor is not None:
            os.fdatasync(self._descriptor)
            self._unsynced = False

    def remove_files(self, is_used: Callable[[int], bool]) -> None:
        """Delete the files whose number `is_used` denies; those being written stay, here or in another process."""
        for number in _numbers(self._folder) - {self._number}:
            if not is_used(number):
                _remove_unless_held(_path(self._folder, number))

    def close(self) -> None:
        """Flush and close; repeating it is fine."""
        if self._descriptor is not None:
            self.flush()
            os.close(self._descriptor)
            self._descriptor = None

    def _file_for(self, record_bytes: int) -> int:
        if self._descriptor is None and self._number > 0:
            self._open_last()
        if self._descriptor is None or (self._end > 0 and self._end + record_bytes > self._max_file_bytes):
            self._open_next()
        assert self._descriptor is not None
        return self._descriptor

    def _open_last(self) -> None:
        """Go on with the last file, unless another process does, or has deleted it, or it is one of packed rows: among
        those, new ones would not be found when files are packed."""
        try:
            descriptor = os.open(_path(self._folder, self._number), os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return
        if os.pread(descriptor, len(_PACKED_MAGIC), 0) == _PACKED_MAGIC:
            os.close(descriptor)
        elif _hold(descriptor):
            self._descriptor = descriptor
            self._end = self._batch_start = os.fstat(descriptor).st_size

    def _open_next(self) -> None:
        self.close()
        number = max(self._number, *_numbers(self._folder), 0)
        while self._descriptor is None:
            number += 1
            self._descriptor = _made(_path(self._folder, number))
        self._number = number
        self._end = self._batch_start = 0
        sync_folder(self._folder)  # the new name must be as durable as what will be written under it


def _made(path: Path) -> int | None:
    """A new file's descriptor, held; None if another process was faster."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    return descriptor if _hold(descriptor) else None


def _hold(descriptor: int) -> bool:
    """Take a file for this process's appends; if another process has it or has just deleted it, close it instead."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return False
    return True


def _remove_unless_held(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


class StoredRecord(NamedTuple):
    """A record as it lies in its file; its checksum holds."""

    key: bytes
    payload: memoryview
    is_packed: bool


def read_record(folder: Path, location: Location, *, name: str) -> tuple[bytes, memoryview]:
    """Key and rows of one record. `name` (session and turn) is said in errors; raises LedgerCorrupt."""
    key, payload, is_packed = read_stored(folder, location, name=name)
    return key, unpack(payload, decode_json(key), name=name) if is_packed else payload


def read_stored(folder: Path, location: Location, *, name: str) -> StoredRecord:
    """One record; as `read_record`."""
    path = _path(folder, int(location.file))
    where = f"{name}: routing rows in {path.name} at byte {location.offset}"
    try:
        with path.open("rb") as stream:
            record = os.pread(stream.fileno(), location.num_bytes, location.offset)
    except FileNotFoundError as error:
        raise LedgerCorrupt(f"{where}: the file is missing") from error
    if len(record) != location.num_bytes:
        raise LedgerCorrupt(f"{where}: the file is cut, {len(record)} bytes of {location.num_bytes} remain")
    magic, checksum, key_bytes, payload_bytes = _HEADER.unpack_from(record)
    if magic not in (_MAGIC, _PACKED_MAGIC) or _HEADER.size + key_bytes + payload_bytes != len(record):
        raise LedgerCorrupt(f"{where}: no record starts there")
    if zlib.crc32(memoryview(record)[_HEADER.size - _LENGTHS.size :]) != checksum:
        raise LedgerCorrupt(f"{where}: the checksum does not hold")
    body = memoryview(record)[_HEADER.size :]
    return StoredRecord(bytes(body[:key_bytes]), body[key_bytes:], magic == _PACKED_MAGIC)


def is_packed(folder: Path, location: Location) -> bool:
    """Whether a record is; True too where nothing can be read, which is for others to tell."""
    try:
        with _path(folder, int(location.file)).open("rb") as stream:
            return os.pread(stream.fileno(), len(_MAGIC), location.offset) != _MAGIC
    except FileNotFoundError:
        return True


def is_held(folder: Path, number: int) -> bool:
    """Whether somebody, of this process too, appends to a file; True for one that is gone."""
    try:
        descriptor = os.open(_path(folder, number), os.O_WRONLY)
    except FileNotFoundError:
        return True
    if not _hold(descriptor):
        return True
    os.close(descriptor)
    return False


class ScannedRecord(NamedTuple):
    """A whole record that lies in a file, whether or not a row points at it."""

    location: Location
    key: bytes


def scan_records(folder: Path, number: int, *, start: int = 0) -> Iterator[ScannedRecord]:
    """All records of one file from byte `start` on whose checksum holds; what lies between them is skipped."""
    if not _path(folder, number).stat().st_size:
        return  # nothing can be mapped
    with _path(folder, number).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = start
        while (offset := content.find(_ANY_MAGIC, offset)) >= 0:
            found = _record_at(content, number, offset)
            if found is not None:
                yield found
            offset += len(_ANY_MAGIC) if found is None else found.location.num_bytes


def _record_at(content: mmap.mmap, number: int, offset: int) -> ScannedRecord | None:
    if offset + _HEADER.size > len(content):
        return None
    magic, checksum, key_bytes, payload_bytes = _HEADER.unpack_from(content, offset)
    if magic not in (_MAGIC, _PACKED_MAGIC):
        return None
    stop = offset + _HEADER.size + key_bytes + payload_bytes
    if stop > len(content):
        return None
    if zlib.crc32(content[offset + _HEADER.size - _LENGTHS.size : stop]) != checksum:
        return None
    key = content[offset + _HEADER.size : offset + _HEADER.size + key_bytes]
    return ScannedRecord(Location(number, offset, stop - offset), key)


def file_sizes(folder: Path) -> dict[int, int]:
    """Bytes of every segment file, by its number; one that is removed meanwhile is left out."""
    sizes: dict[int, int] = {}
    for number in sorted(_numbers(folder)):
        with suppress(FileNotFoundError):
            sizes[number] = _path(folder, number).stat().st_size
    return sizes


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    rest = [memoryview(buffer) for buffer in buffers]
    while rest:
        num_bytes = os.writev(descriptor, rest)
        while rest and num_bytes >= len(rest[0]):
            num_bytes -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][num_bytes:]


def _numbers(folder: Path) -> set[int]:
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return {int(match[1]) for match in matches if match is not None}


def _path(folder: Path, number: int) -> Path:
    return folder / f"routing-{number:08d}.seg"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
