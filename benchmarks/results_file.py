"""benchmarks/results/NAME.json: one entry a measurement, each with what it was measured on; others stay."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("verbatim-rl", "torch", "transformers", "numpy")


def merge(
    file: Path,
    part: str,
    name: str,
    figures: Mapping[str, Any],
    *,
    command: str,
    packages: Sequence[str] = _PACKAGES,
) -> None:
    """Put `figures` at [part][name], with the command that gave them, machine, and versions of `packages`."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    entry = {"command": command, **figures, "measured_on": _environment(packages)}
    content[part] = content.get(part, {}) | {name: entry}
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    if file.exists() and not file.is_file():  # /dev/null and its like are not replaced
        file.write_text(text)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text)
    partial.replace(file)


def entries(file: Path, part: str) -> dict[str, Any]:
    """What the file holds of one part."""
    return dict(json.loads(file.read_text()).get(part, {})) if file.is_file() else {}


def _environment(packages: Sequence[str]) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
        | _processor(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, str]:
    """The processor's name, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(({"name": line.partition(":")[2].strip()} for line in lines if line.startswith("model name")), {})
