"""What a sandbox is asked for, checked once before anything is made."""

from __future__ import annotations

import math
from typing import NamedTuple

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.ports import SandboxLimits, SandboxSpec

# The holder and its supervisors are Python processes of about 10 MiB that live in the sandbox too.
LEAST_MEMORY_BYTES = 48 * 2**20
_RESERVED_BYTES = 32 * 2**20
_MOST_TEMPORARY_BYTES = 16 * 2**20


class FileSystemSizes(NamedTuple):
    """Of the file systems in memory: /workspace, and each of /tmp and /dev/shm."""

    home_bytes: int
    temporary_bytes: int


def file_system_sizes(limits: SandboxLimits) -> FileSystemSizes:
    """What is asked for, but never so much that files alone could use up the sandbox's memory: then no process could
    run in it any more, not even the one that runs commands."""
    free_bytes = limits.memory_bytes - _RESERVED_BYTES
    home_bytes = min(limits.disk_bytes, free_bytes // 2)
    return FileSystemSizes(home_bytes, min(_MOST_TEMPORARY_BYTES, home_bytes, free_bytes // 8))


def check_spec(spec: SandboxSpec) -> None:
    """Raises ConfigurationError naming the limit that no sandbox can have, or the missing key."""
    if not spec.key:
        raise ConfigurationError("a sandbox needs a key (the rollout's id)")
    limits = spec.limits
    least = {
        "memory_bytes": (limits.memory_bytes, LEAST_MEMORY_BYTES),
        "num_processes": (limits.num_processes, 1),
        "disk_bytes": (limits.disk_bytes, 4096),
        "cpu_seconds_per_command": (limits.cpu_seconds_per_command, 1),
        "output_bytes": (limits.output_bytes, 0),
    }
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ConfigurationError(f"sandbox limit {name} is {value}; it must be at least {minimum}")


def check_timeout(timeout_seconds: float) -> None:
    """Raises InvalidRequest for a deadline that is no time at all or no number."""
    if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
        raise InvalidRequest(f"timeout_seconds is {timeout_seconds}; it must be a finite number above 0")
