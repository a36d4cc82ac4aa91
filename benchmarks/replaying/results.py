"""benchmarks/results/replay.json: one entry a measurement, each with what it was measured on; others stay."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("verbatim-rl", "torch", "transformers", "numpy")


def merge(file: Path, part: str, name: str, figures: Mapping[str, Any], *, command: str) -> None:
    """Put `figures` at [part][name], with the command that gave them, versions and machine."""
    content = json.loads(file.read_text()) if file.exists() else {}
    entry = {"command": command, **figures, "measured_on": _environment()}
    content[part] = content.get(part, {}) | {name: entry}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    partial.replace(file)


def entries(file: Path, part: str) -> dict[str, Any]:
    """What the file holds of one part."""
    return dict(json.loads(file.read_text()).get(part, {})) if file.exists() else {}


def _environment() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }
