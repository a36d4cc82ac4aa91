"""The audit's file: appended to, turned over, its owner's only, and never in the gateway's way."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.contracts.errors import ConfigurationError
from gateway.routes.audit import AuditLog, AuditNote, audit_path


def scope(path: bytes = b"/admin/policy", method: str = "POST") -> dict[str, Any]:
    return {"method": method, "path": "", "raw_path": path, "query_string": b"a=\n", "client": ("127.0.0.1", 5)}


def note(*, status: int = 200, has_key: bool = True, **changed: Any) -> AuditNote:
    return AuditNote(is_operators=True, has_operators_key=has_key, key_fingerprint="ab", status=status, changed=changed)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_are_appended_after_a_restart_and_after_a_line_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "audit.jsonl"
    for i in range(2):
        log = AuditLog(file)
        log.record(scope(b"/x\n{}\xff"), b"req-%d" % i, note(outcome="a\nb"))
        log.close()
    with file.open("a") as cut:
        cut.write('{"time": "20')
    log = AuditLog(file)
    log.record(scope(), b"req-2", note())
    log.close()
    assert file.stat().st_mode & 0o777 == 0o600
    *first, cut_line, last = file.read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in [*first, last]] == ["req-0", "req-1", "req-2"]
    assert cut_line == '{"time": "20'
    assert json.loads(first[0])["changed"] == {"outcome": "a\nb"}


def test_full_files_are_turned_over_and_lose_nothing_that_is_kept(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a", max_bytes=1000, num_older=3)
    for i in range(30):
        log.record(scope(), b"req-%d" % i, note())
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a", "a.1", "a.2", "a.3"]
    assert all(file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size <= 1000 for file in files)
    found = [line["request_id"] for file in reversed(files) for line in lines(file)]
    assert found == [f"req-{i}" for i in range(30)][-len(found) :]
    assert len(found) > 9


def test_a_disk_that_is_full_is_counted_and_stops_nothing() -> None:
    seen: Counter[str] = Counter()
    log = AuditLog(Path("/dev/full"), observe=lambda state: seen.update([state]))
    for _ in range(50):
        log.record(scope(), b"r", note())
    log.close()
    assert seen["failed"] >= 50
    assert seen["written"] == 0


def test_refused_attempts_cannot_wash_out_what_operators_did(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a")
    began = time.monotonic()
    for _ in range(1000):
        log.record(scope(), b"stranger", note(status=403, has_key=False))
    seconds = time.monotonic() - began
    log.record(scope(), b"operator", note())
    log.close()
    found = lines(tmp_path / "a")
    assert 10 <= len(found) <= 11 + 10 * seconds + 1, "ten at once, ten more a second, and the operator"
    assert found[-1]["request_id"] == "operator"
    assert sum(line.get("refused_before", 0) for line in found) + len(found) == 1001


def test_only_what_succeeded_and_was_no_reading_has_changed_something(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a")
    log.record(scope(method="GET"), b"r", note(session_id="s"))
    log.record(scope(), b"r", note(status=409, session_id="s"))
    log.record(scope(), b"r", note(session_id="s"))
    log.record(scope(), b"r", AuditNote(key_fingerprint="cd", status=200))
    log.close()
    assert [line["changed"] for line in lines(tmp_path / "a")] == [None, None, {"session_id": "s"}]


def test_a_file_that_cannot_be_opened_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="audit"):
        AuditLog(tmp_path / "file" / "audit.jsonl")
    assert audit_path("none", tmp_path) is None
    assert audit_path("", tmp_path) == tmp_path / "audit.jsonl"
    assert not [thread for thread in threading.enumerate() if thread.name == "audit"]


def test_processes_that_share_a_file_turn_it_over_together(tmp_path: Path) -> None:
    """No line is lost, doubled or torn, and none goes into a file that was turned over long ago."""
    path = tmp_path / "audit.jsonl"
    code = (
        "import sys; from pathlib import Path; from gateway.routes.audit import _AuditFile\n"
        "file = _AuditFile(Path(sys.argv[1]), max_bytes=2_000, num_older=90)\n"
        "assert all(file.append(f'{sys.argv[2]} {number} ' + 'x' * 60) is None for number in range(400))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    files = sorted(tmp_path.glob("audit.jsonl*"), key=lambda file: int(file.suffix[1:]) if file != path else 0)
    lines = [line for file in reversed(files) for line in file.read_text().splitlines()]
    assert max(file.stat().st_size for file in files) <= 2_000
    for name in "abc":
        numbers = [int(line.split()[1]) for line in lines if line.startswith(name)]
        assert numbers == list(range(400))
