"""A real file system of a few MiB, for tests of full disks: a tmpfs in a mount namespace of its own.

The namespace belongs to a process of ours and goes with it, so nothing stays mounted. Files are reached by that
process's view of the file tree; programs that resolve paths (SQLite does) run inside, by `enter`. Needs no root where
users may make namespaces.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """folder: its root, seen from outside. inside: the same for programs that are started with `enter` before them."""

    folder: Path
    inside: Path
    enter: tuple[str, ...]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[SmallDisk]:
    """A new file system; raises RuntimeError, saying why, where this machine cannot make one."""
    with tempfile.TemporaryDirectory() as point:
        script = f'mount -t tmpfs -o size={num_bytes} tmpfs "$0" && echo mounted && exec cat'
        namespaces = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
        holder = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", script, point],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "mounted\n":
                _, complaint = holder.communicate(timeout=10)
                raise RuntimeError(f"no small file system can be mounted here: {complaint.strip()}")
            users = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
            enter = ("nsenter", "--target", str(holder.pid), "--mount", *users)
            yield SmallDisk(Path(f"/proc/{holder.pid}/root{point}"), Path(point), enter)
        finally:
            holder.communicate(timeout=10)  # the end of its input ends it


def fill(path: Path, *, leave_bytes: int = 0) -> None:
    """Take all room of a disk but `leave_bytes` with one file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            disk = os.fstatvfs(descriptor)
            room = disk.f_bavail * disk.f_frsize - leave_bytes
            if room <= 0:
                return
            try:
                os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, room)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # another process was writing just now: look again
                    raise
    finally:
        os.close(descriptor)
