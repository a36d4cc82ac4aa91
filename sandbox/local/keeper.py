"""A small shell process beside a driver that outlives its sudden death, and then leaves nothing behind.

It does what only a second process can:
- It leads the process group in which sandboxes start, and at its end kills what is in it. A running sandbox has left
  the group and ends with the driver's process; one that was about to start when that was killed would wait for ever.
- It removes the driver's control groups, which are empty then.
- It holds a mount namespace in which the interpreter lies where unprivileged users may read it, if only root may reach
  its own place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from gateway.contracts.errors import SandboxUnavailable

MOUNT_POINT = Path("/mnt")
"""Where the interpreter's prefix lies in the keeper's own mount namespace; the host's /mnt is untouched."""

# Standard input closes when the driver ends, however it ends; a moment later its groups are empty.
_SCRIPT = """
if [ -n "$1" ]; then mount --bind -o ro "$1" "$2" || exit 1; fi
shift 2
echo ready
read -r _
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  left=
  for folder; do
    [ -d "$folder" ] || continue
    rmdir "$folder"/*/ "$folder" 2>/dev/null
    [ -d "$folder" ] && left=1
  done
  [ -z "$left" ] && break
  sleep 0.25
done
kill -9 0
"""


class Keeper:
    """The keeper process of one driver."""

    def __init__(self, *, prefix: Path | None, folders: Sequence[Path]) -> None:
        """`prefix`: an interpreter to make readable (needs root); `folders`: control groups to remove at the end.

        Raises SandboxUnavailable if the private mount cannot be made.
        """
        script = ["/bin/sh", "-c", _SCRIPT, "sandbox-keeper", str(prefix or ""), str(MOUNT_POINT), *map(str, folders)]
        private = ["unshare", "--mount", "--propagation", "private", "--"] if prefix else []
        self._process = subprocess.Popen(
            [*private, *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            _, reason = self._process.communicate()
            raise SandboxUnavailable(f"cannot make {prefix} readable to sandboxes: {reason.decode().strip()}")

    @property
    def process_group(self) -> int:
        """The group in which sandboxes are to be started."""
        return self._process.pid

    @property
    def enter(self) -> list[str]:
        """The command prefix that runs a program in the keeper's mount namespace."""
        return ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", "--"]

    def close(self) -> None:
        """End the keeper; it has removed the groups when this returns (at most some seconds, usually a millisecond)."""
        self._process.communicate(b"\n")  # a line, as the pipe may be open in forks of this process too
