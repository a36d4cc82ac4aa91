"""The contract of `gateway.ledger.objects.Objects`, run against a folder and a server of the S3 protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.contracts.errors import ConfigurationError, LedgerCorrupt
from gateway.contracts.media import Blob
from gateway.ledger.backend import Location
from gateway.ledger.objects import FileObjects, ObjectArrays, ObjectBlobs, Objects, StoredObject, open_objects
from tests.object_server import ObjectServer


@pytest.fixture(params=["file", "s3"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Objects]:
    """Open the same store once more."""
    if request.param == "file":
        return lambda: open_objects((tmp_path / "ob jects").as_uri())
    server: ObjectServer = request.getfixturevalue("object_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return lambda: open_objects(server.bucket_url(f"{tmp_path.parent.name}/{tmp_path.name}"))


def named(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class NotedInMemory:
    """`gateway.ledger.objects.Register` of one process; sessions refer to `kept`."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.noted: list[tuple[str, int]] = []
        self.kept: set[str] = set()

    def note(self, name: str, place: str, num_bytes: int) -> str:
        self.noted.append((name, num_bytes))
        return self.places.setdefault(name, place)

    def place_of(self, name: str) -> str | None:
        return self.places.get(name)

    def is_kept(self, name: str) -> bool:
        return name in self.kept


def test_what_was_put_is_there_for_the_next_process(reopen: Callable[[], Objects]) -> None:
    """I4."""
    content = bytes(range(256)) * 40_000
    reopen().put(named(content), content)
    again = reopen()
    assert again.get(named(content)) == content
    assert again.get("0" * 64) is None
    assert list(again.stored()) == [StoredObject(named(content), len(content))]


def test_the_same_content_twice_is_one_object(reopen: Callable[[], Objects]) -> None:
    objects = reopen()
    for _ in range(2):
        objects.put(named(b"x"), b"x")
    assert len(list(objects.stored())) == 1


def test_what_is_removed_is_gone_and_what_is_not_there_is_no_error(reopen: Callable[[], Objects]) -> None:
    objects = reopen()
    for content in (b"", b"1", b"2"):
        objects.put(named(content), content)
    objects.remove([named(b"1"), named(b"never put"), named(b"")])
    objects.remove([])
    assert [name for name, _ in objects.stored()] == [named(b"2")]


def test_a_record_is_noted_before_it_is_put_and_read_back_by_its_place(reopen: Callable[[], Objects]) -> None:
    """I4: what a crash leaves behind is in the register already."""
    register = NotedInMemory()
    location = ObjectArrays(reopen(), register).append(b'{"turn": 1}', b"\x00\xff" * 500)
    assert register.noted == [(location.file, location.num_bytes)]
    key, payload = ObjectArrays(reopen(), register).read(location, name="session s turn t")
    assert (key, bytes(payload)) == (b'{"turn": 1}', b"\x00\xff" * 500)


def test_a_changed_a_cut_and_a_missing_object_are_named(reopen: Callable[[], Objects]) -> None:
    objects = reopen()
    arrays = ObjectArrays(objects, NotedInMemory())
    location = arrays.append(b"key", b"payload")
    whole = objects.get(str(location.file))
    assert whole is not None
    for damaged in (whole[:-1], whole[:-1] + b"?", b""):
        objects.put(str(location.file), damaged)
        with pytest.raises(LedgerCorrupt, match=f"session s turn t.*{location.file}.*damaged"):
            arrays.read(location, name="session s turn t")
    objects.remove([str(location.file)])
    with pytest.raises(LedgerCorrupt, match=f"session s turn t.*{location.file} is missing"):
        arrays.read(location, name="session s turn t")


def test_an_object_that_is_no_record_is_not_read_as_one(reopen: Callable[[], Objects]) -> None:
    objects = reopen()
    arrays = ObjectArrays(objects, NotedInMemory())
    for content in (b"", b"a picture, not rows", b"VRO1\xff\xff\xff\xff"):
        objects.put(named(content), content)
        with pytest.raises(LedgerCorrupt, match="holds no routing rows"):
            arrays.read(Location(named(content), 0, len(content)), name="session s turn t")


def test_a_blob_that_a_session_refers_to_is_not_sent_again(reopen: Callable[[], Objects]) -> None:
    objects = reopen()
    register = NotedInMemory()
    blobs = ObjectBlobs(objects, register)
    blob = Blob.of(b"picture", "image/png")
    blobs.write(blob)
    assert blobs.read(blob.sha256, name="session s") == b"picture"
    [place] = [each.name for each in objects.stored()]
    objects.remove([place])
    register.kept.add(blob.sha256)
    blobs.write(blob)
    assert objects.get(place) is None
    assert [name for name, _ in register.noted] == [blob.sha256] * 2  # noted all the same: the sweep has to spare it


def test_a_blob_that_comes_again_after_it_was_swept_has_another_place(reopen: Callable[[], Objects]) -> None:
    """Whoever swept it and hangs before removing it takes the old one only."""
    objects, register = reopen(), NotedInMemory()
    blobs = ObjectBlobs(objects, register)
    blob = Blob.of(b"picture", "image/png")
    blobs.write(blob)
    old = register.places.pop(blob.sha256)
    blobs.write(blob)
    objects.remove([old])
    assert blobs.read(blob.sha256, name="session s") == b"picture"


def test_what_a_crash_left_half_written_is_neither_read_nor_kept_for_ever(tmp_path: Path) -> None:
    objects = open_objects(tmp_path.as_uri())
    objects.put(named(b"x"), b"x")
    folder = tmp_path / named(b"x")[:2]
    old, fresh = folder / f"{named(b'x')}.1.tmp", folder / f"{named(b'x')}.2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"ha")
    os.utime(old, (0, 0))
    assert list(objects.stored()) == [StoredObject(named(b"x"), 1)]
    open_objects(tmp_path.as_uri())
    assert (old.exists(), fresh.exists()) == (False, True)  # another gateway may be writing the fresh one


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory:", "s3://BUCKET/PREFIX or file:///FOLDER"),
        ("memory:///", "s3://BUCKET/PREFIX"),
        ("file://host/folder", "s3://BUCKET/PREFIX"),
        ("file:///", "s3://BUCKET/PREFIX"),
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("/folder", "s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/x", "keys come from the environment"),
        ("file:///proc/no/such/folder", "cannot be written"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refusal:
        open_objects(url)
    assert "\n" not in refusal.value.message
    assert "secret" not in refusal.value.message


def test_a_bucket_that_does_not_exist_is_refused_at_the_start(
    object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_server.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="objects s3://no-such-bucket/x: cannot be written"):
        open_objects("s3://no-such-bucket/x")


def test_a_folder_that_is_only_read_is_not_made(tmp_path: Path) -> None:
    assert isinstance(open_objects((tmp_path / "none").as_uri(), read_only=True), FileObjects)
    assert not (tmp_path / "none").exists()
