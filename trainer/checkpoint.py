"""Checkpoints: all that a run needs to go on bit-exactly after SIGKILL, and folders that are whole or absent.

    DIR/step-000003/  state.json     step, policy version, leases not yet acknowledged, the step's metrics
                      backend.pt     parameters, optimiser, random state (the backend's own file)

Exactly once: a step's leases are acknowledged only after its checkpoint names them. Killed in between, the next start
acknowledges them again (acknowledging is idempotent); killed before, the rollouts return to the feed untrained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.contracts.errors import ConfigurationError, SchemaMismatch
from trainer.metrics import StepMetrics

CHECKPOINT_VERSION = 2
_STATE_FILE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after `step` steps.

    The data cursor is `step`: tasks are a function of seed and step. `lease_ids` and `session_ids`: what the last step
    consumed, which may not be acknowledged yet. `metrics`: of the last step, None before the first.
    """

    run_name: str
    seed: int
    step: int
    policy_version: int
    lease_ids: tuple[str, ...] = ()
    session_ids: tuple[str, ...] = ()
    metrics: StepMetrics | None = None


class CheckpointStore:
    """The checkpoints of one run folder; keeps the newest `keep`."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, state: RunState, write_backend: Callable[[Path], None]) -> Path:
        """Write one checkpoint; it exists under its name only when all of it is on disk."""

        def write(partial: Path) -> None:
            write_backend(partial)
            values = asdict(state) | {"checkpoint_version": CHECKPOINT_VERSION}
            (partial / _STATE_FILE).write_text(json.dumps(values, indent=1))

        target = self._folder / f"{_PREFIX}{state.step:06d}"
        write_folder(target, write)
        retain_newest(self._folder, _PREFIX, self._keep)
        return target

    def latest(self) -> tuple[RunState, Path] | None:
        """The newest checkpoint's state and folder; None before the first. Raises SchemaMismatch for another format."""
        folders = _numbered(self._folder, _PREFIX)
        if not folders:
            return None
        file = folders[-1] / _STATE_FILE
        return _read_state(json.loads(file.read_text()), where=file), folders[-1]


def check_same_run(state: RunState, *, run_name: str, seed: int, where: Path) -> None:
    """Raise ConfigurationError if a checkpoint is of another run than the settings describe."""
    if (state.run_name, state.seed) != (run_name, seed):
        raise ConfigurationError(
            f"{where} holds run {state.run_name!r} with seed {state.seed}, not {run_name!r} with seed {seed}; "
            "choose another run.dir"
        )


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `target` by `write(partial)`, so that it is never seen half-written, also after a power cut.

    An older folder of that name is replaced; partial folders of killed runs are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    sync(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retain_newest(folder: Path, prefix: str, keep: int) -> None:
    """Remove all but the `keep` highest-numbered folders named `prefix` + number."""
    for old in _numbered(folder, prefix)[:-keep]:
        shutil.rmtree(old)


def _numbered(folder: Path, prefix: str) -> list[Path]:
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def _read_state(values: dict[str, Any], *, where: Path) -> RunState:
    version = values.pop("checkpoint_version", None)
    if version != CHECKPOINT_VERSION:
        raise SchemaMismatch(f"{where} has checkpoint version {version}, this program reads {CHECKPOINT_VERSION}")
    metrics = values.pop("metrics")
    values["lease_ids"], values["session_ids"] = tuple(values["lease_ids"]), tuple(values["session_ids"])
    return RunState(**values, metrics=None if metrics is None else StepMetrics(**metrics))
