"""What a sandbox is asked for, checked once before anything is made."""

from __future__ import annotations

import math

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.ports import SandboxLimits, SandboxSpec

# The holder and one supervisor are Python processes of about 10 MiB that live in the sandbox too.
LEAST_MEMORY_BYTES = 32 * 2**20
TEMPORARY_BYTES = 16 * 2**20
"""Size of /tmp and of /dev/shm, each beside the `disk_bytes` of the home folder (never larger than that)."""


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


def temporary_bytes(limits: SandboxLimits) -> int:
    """How large /tmp and /dev/shm are."""
    return min(TEMPORARY_BYTES, limits.disk_bytes)
