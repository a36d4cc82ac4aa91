"""Arrays and blobs as objects named by the sha256 of their content, in a bucket (S3's protocol) or a folder.

    note(name, place) ─▶ put(place, content) ─▶ the row that refers to it: COMMIT        what a crash leaves: a name in
                                                                                         the register that no row uses

Whoever reads a content checks it by its name. An object is durable when `put` returns, and it is put before the row
that speaks of it commits (I4). Which objects exist and who refers to them stands in the ledger's tables; the sweep
there removes what nobody refers to (register.py).

A record of routing rows is of one turn, so its place is its name. A blob's place has a suffix: a picture that comes
again after it was swept gets another place, and whoever is still about to remove the old one cannot take the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from gateway.contracts.errors import ConfigurationError, LedgerCorrupt
from gateway.contracts.media import Blob
from gateway.ledger.backend import Buffer, Location
from gateway.ledger.segments_file import sync_folder

ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"
"""Environment variable with the address of an S3 server that is not Amazon's."""

_PLACE = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")
_UNFINISHED = ".tmp"
_UNFINISHED_SECONDS = 24 * 3600.0  # nobody writes one object for a day
_MAGIC = b"VRO1"
_HEADER = struct.Struct("<4sI")
_PROBE = "probe"
"""Name of what is written to see that the store can be."""
_REQUEST_TIMEOUT = timedelta(seconds=60)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_RETRY_TIMEOUT = timedelta(seconds=30)
_OPEN_TIMEOUT = timedelta(seconds=10)


class StoredObject(NamedTuple):
    """One object that a store holds."""

    name: str
    num_bytes: int


class Objects(Protocol):
    """A store of contents by name; safe to use from several threads and processes.

    Raises what its library raises (`OBJECT_FAILURES`), which the ledger's backend makes ours.
    """

    @property
    def url(self) -> str:
        """What errors call it."""
        ...

    def probe(self) -> None:
        """Make the store ready and write something to it; gives up soon."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Store a content; durable, and seen by every reader, when it returns."""
        ...

    def get(self, name: str) -> bytes | None:
        """A content as it lies there, None if there is none."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Delete contents; those that are not there are fine."""
        ...

    def stored(self) -> Iterator[StoredObject]:
        """All contents that are there, in no order."""
        ...


OBJECT_FAILURES: tuple[type[Exception], ...] = (OSError, BaseError)
"""What a store of objects raises."""


class Register(Protocol):
    """Which contents there are, and where (register.py)."""

    def note(self, name: str, place: str, num_bytes: int) -> str:
        """Note a content durably, ahead of putting it, so that the sweep knows of it; its place, which is another one
        where it has one already."""
        ...

    def place_of(self, name: str) -> str | None:
        """Where a content lies, None if nobody noted it."""
        ...

    def is_kept(self, name: str) -> bool:
        """Whether a session refers to a blob of this name; ask after `note`, so that it stays."""
        ...


def open_objects(url: str, *, read_only: bool = False) -> Objects:
    """The store at `s3://bucket/prefix` or `file:///folder`; it is written to once, unless it is only read.

    Raises ConfigurationError for another kind of URL, and for a store that cannot be used.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigurationError(f"objects {_shown(url)}: a bucket or a folder only; keys come from the environment")
    if parts.scheme == "s3" and parts.netloc:
        objects: Objects = BucketObjects.open(parts.netloc, unquote(parts.path).strip("/"))
    elif parts.scheme == "file" and not parts.netloc and parts.path.strip("/"):
        objects = FileObjects(Path(unquote(parts.path)))
    else:
        raise ConfigurationError(f"objects {_shown(url)}: write it as s3://BUCKET/PREFIX or file:///FOLDER")
    if not read_only:
        _probe(objects)
    return objects


class BucketObjects:
    """Objects of an S3 bucket, or of any server that speaks S3's protocol."""

    def __init__(self, store: S3Store, probing: S3Store, url: str) -> None:
        """Use `open`; `probing` gives up sooner than `store`."""
        self._store = store
        self._probing = probing
        self._url = url

    @classmethod
    def open(cls, bucket: str, prefix: str) -> BucketObjects:
        """A bucket as the AWS_* variables describe it; nothing is asked yet."""
        url = f"s3://{bucket}/{prefix}"
        try:
            return cls(_bucket(bucket, prefix, _RETRY_TIMEOUT), _bucket(bucket, prefix, _OPEN_TIMEOUT), url)
        except (BaseError, ValueError) as error:
            raise ConfigurationError(f"objects {url}: {_first_line(error)}") from error

    @property
    def url(self) -> str:
        """Bucket and prefix."""
        return self._url

    def probe(self) -> None:
        """Write something; gives up soon."""
        obstore.put(self._probing, _key(_PROBE), b"", use_multipart=False)

    def put(self, name: str, content: bytes) -> None:
        """One request, so that nothing half-sent stays in the bucket."""
        obstore.put(self._store, _key(name), content, use_multipart=False)

    def get(self, name: str) -> bytes | None:
        """A content, None if there is none."""
        try:
            return bytes(obstore.get(self._store, _key(name)).bytes())
        except FileNotFoundError:
            return None

    def remove(self, names: Sequence[str]) -> None:
        """Delete contents, up to a thousand a request."""
        if names:
            obstore.delete(self._store, [_key(name) for name in names])

    def stored(self) -> Iterator[StoredObject]:
        """All contents under the prefix."""
        for chunk in obstore.list(self._store):
            for entry in chunk:
                name = entry["path"].rsplit("/", 1)[-1]
                if _PLACE.fullmatch(name):
                    yield StoredObject(name, entry["size"])


class FileObjects:
    """Objects of a folder, of this machine or shared by several.

    Our own files, because obstore's local store does not sync what it writes (0.12: rename only), and I4 needs that.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def url(self) -> str:
        """The folder as URL."""
        return self._folder.as_uri()

    def probe(self) -> None:
        """Make the folder, clear what crashes left half-written long ago, and write."""
        self._folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self._folder.parent)
        oldest = time.time() - _UNFINISHED_SECONDS
        for path in self._folder.glob(f"*/*{_UNFINISHED}"):
            with suppress(FileNotFoundError):  # another process clears it too
                if path.stat().st_mtime < oldest:
                    path.unlink()
        self.put(_PROBE, b"")

    def put(self, name: str, content: bytes) -> None:
        """Written beside, synced, renamed; then its name is synced."""
        path = self._path(name)
        self._make_folder(path.parent)
        descriptor, beside = tempfile.mkstemp(_UNFINISHED, f"{name}.", path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def get(self, name: str) -> bytes | None:
        """A content, None if there is none."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, names: Sequence[str]) -> None:
        """Delete files."""
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def stored(self) -> Iterator[StoredObject]:
        """All files that are whole."""
        for path in self._folder.glob("*/*"):
            if _PLACE.fullmatch(path.name):
                yield StoredObject(path.name, path.stat().st_size)

    def _path(self, name: str) -> Path:
        return self._folder / _key(name)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(self._folder)


class ObjectArrays:
    """`gateway.ledger.backend.ArrayStore` on objects: one object a record, its key in front of its payload."""

    before_transaction = True  # an upload takes longer than everybody else's commit may wait

    def __init__(self, objects: Objects, register: Register) -> None:
        self._objects = objects
        self._register = register

    def append(self, key: bytes, payload: Buffer) -> Location:
        """Store one record; durable when it returns."""
        content = b"".join((_HEADER.pack(_MAGIC, len(key)), key, payload))
        name = hashlib.sha256(content).hexdigest()
        self._register.note(name, name, len(content))
        self._objects.put(name, content)
        return Location(name, 0, len(content))

    def flush(self) -> None:
        """Nothing is left to do."""

    def read(self, location: Location, *, name: str) -> tuple[bytes, memoryview]:
        """Key and payload; raises LedgerCorrupt."""
        content = _read(self._objects, str(location.file), name=f"{name}: routing rows")
        magic, key_bytes = _HEADER.unpack_from(content) if len(content) >= _HEADER.size else (b"", 0)
        if magic != _MAGIC or _HEADER.size + key_bytes > len(content):
            raise LedgerCorrupt(f"{name}: the object {location.file} holds no routing rows")
        body = memoryview(content)[_HEADER.size :]
        return bytes(body[:key_bytes]), body[key_bytes:]


class ObjectBlobs:
    """`gateway.ledger.backend.BlobStore` on objects: the content and nothing else."""

    def __init__(self, objects: Objects, register: Register) -> None:
        self._objects = objects
        self._register = register

    def write(self, blob: Blob) -> None:
        """Store a content unless it is there; durable when it returns."""
        new_place = f"{blob.sha256}-{secrets.token_hex(8)}"
        # Before looking: from here on the sweep spares it.
        place = self._register.note(blob.sha256, new_place, len(blob.content))
        if not self._register.is_kept(blob.sha256):
            self._objects.put(place, blob.content)

    def has(self, sha256: str) -> bool:
        """True: the ledger writes before it refers, and a reference to what was swept meanwhile is refused."""
        return True

    def read(self, sha256: str, *, name: str) -> bytes:
        """A content; raises LedgerCorrupt."""
        place = self._register.place_of(sha256)
        if place is None:
            raise LedgerCorrupt(f"{name}: the object {sha256} is in no register")
        return _read(self._objects, place, name=name)


def _read(objects: Objects, place: str, *, name: str) -> bytes:
    content = objects.get(place)
    if content is None:
        raise LedgerCorrupt(f"{name}: the object {place} is missing in {objects.url}")
    if hashlib.sha256(content).hexdigest() != place.partition("-")[0]:
        raise LedgerCorrupt(f"{name}: the object {place} in {objects.url} holds another content; it is damaged")
    return content


def _bucket(bucket: str, prefix: str, patience: timedelta) -> S3Store:
    """`patience`: how long failing requests are tried again."""
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={
            "connect_timeout": _CONNECT_TIMEOUT,
            "timeout": _REQUEST_TIMEOUT,
            "allow_http": os.environ.get(ENDPOINT_VARIABLE, "").startswith("http://"),  # who writes http means it
        },
        retry_config={"retry_timeout": patience, "max_retries": 10},
    )


def _probe(objects: Objects) -> None:
    """A store that cannot be written to is told at the start, not at the first turn."""
    try:
        objects.probe()
    except OBJECT_FAILURES as error:
        raise ConfigurationError(f"objects {objects.url}: cannot be written ({_first_line(error)})") from error


def _key(name: str) -> str:
    """Folders of 256, so that none grows too large for a file system."""
    return f"{name[:2]}/{name}"


def _shown(url: str) -> str:
    """Without what may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"


def _first_line(error: Exception) -> str:
    """Of what the library says, which spreads its causes and advice over many lines."""
    return str(error).strip().split("\n", 1)[0]
