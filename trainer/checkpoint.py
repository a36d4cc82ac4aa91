"""Checkpoints: all that a run needs to go on bit-exactly after SIGKILL, and folders that are whole or absent.

    DIR/step-000003/  state.json     step, policy version, leases not yet acknowledged, the step's metrics, and of every
                                     other file its size and, up to 1 GiB, its CRC-32
                      backend.pt …   parameters, optimiser, random state (the backend's own files)

Exactly once: a step's leases are acknowledged only after its checkpoint names them. Killed in between, the next start
acknowledges them again (acknowledging is idempotent); killed before, the rollouts return to the feed untrained.

A checkpoint that was damaged later is refused with a line that says what to do, never skipped: the rollouts that it
consumed are acknowledged, so going back costs their step, which is for a person to decide.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.contracts.errors import ConfigurationError, IntegrityError, SchemaMismatch, TrainingError
from trainer.durable import write_folder
from trainer.metrics import StepMetrics

CHECKPOINT_VERSION = 3
_STATE_FILE = "state.json"
_PREFIX = "step-"
_SUMMED_BYTES = 2**30
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after `step` steps.

    The data cursor is `step`: tasks are a function of seed and step. `lease_ids` and `session_ids`: what the last step
    consumed, which may not be acknowledged yet. `metrics`: of the last step, None before the first. Evaluations are not
    part of it: metrics.jsonl has those that were made, and those that were not are made again.
    """

    run_name: str
    seed: int
    step: int
    policy_version: int
    lease_ids: tuple[str, ...] = ()
    session_ids: tuple[str, ...] = ()
    metrics: StepMetrics | None = None


class CheckpointStore:
    """The checkpoints of one run folder: the newest `keep`, and those of every `keep_every`-th step (0: of none)."""

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0) -> None:
        self._folder = folder
        self._keep = keep
        self._keep_every = keep_every

    def save(self, state: RunState, write_backend: Callable[[Path], None]) -> Path:
        """Write one checkpoint; it exists under its name only when all of it is on disk.

        Raises TrainingError where the disk does not take it; what was there before is still there.
        """

        def write(partial: Path) -> None:
            write_backend(partial)
            values = asdict(state) | {"checkpoint_version": CHECKPOINT_VERSION, "files": _files(partial)}
            (partial / _STATE_FILE).write_text(json.dumps(values, indent=1))

        target = self._folder / f"{_PREFIX}{state.step:06d}"
        try:
            write_folder(target, write)
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
            raise TrainingError(
                f"the checkpoint of step {state.step} cannot be written to {self._folder} ({_first_line(error)}); make "
                "room there and start again: earlier checkpoints are whole, and the step's rollouts are still leased"
            ) from error
        retain_newest(self._folder, _PREFIX, self._keep, keep_every=self._keep_every)
        return target

    def latest(self) -> tuple[RunState, Path] | None:
        """The newest checkpoint's state and folder; None before the first.

        Raises SchemaMismatch for another format, IntegrityError for a damaged one.
        """
        folders = _numbered(self._folder, _PREFIX)
        if not folders:
            return None
        newest = folders[-1]
        try:
            values = json.loads((newest / _STATE_FILE).read_text())
            state = _read_state(values, where=newest / _STATE_FILE)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise _damaged(folders, f"{_STATE_FILE} cannot be read ({_first_line(error)})") from error
        if damage := _damage(newest, values["files"]):
            raise _damaged(folders, damage)
        return state, newest


def check_same_run(state: RunState, *, run_name: str, seed: int, where: Path) -> None:
    """Raise ConfigurationError if a checkpoint is of another run than the settings describe."""
    if (state.run_name, state.seed) != (run_name, seed):
        raise ConfigurationError(
            f"{where} holds run {state.run_name!r} with seed {state.seed}, not {run_name!r} with seed {seed}; "
            "choose another run.dir"
        )


def retain_newest(folder: Path, prefix: str, keep: int, *, keep_every: int = 0) -> None:
    """Remove folders named `prefix` + number, except the `keep` highest and multiples of `keep_every` (0: of none)."""
    for old in _numbered(folder, prefix)[:-keep]:
        if not keep_every or _number(old, prefix) % keep_every:
            shutil.rmtree(old)


def _numbered(folder: Path, prefix: str) -> list[Path]:
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: _number(path, prefix))


def _number(path: Path, prefix: str) -> int:
    return int(path.name.removeprefix(prefix))


def _read_state(values: Mapping[str, Any], *, where: Path) -> RunState:
    version = values["checkpoint_version"]
    if version != CHECKPOINT_VERSION:
        raise SchemaMismatch(f"{where} has checkpoint version {version}, this program reads {CHECKPOINT_VERSION}")
    metrics = values["metrics"]
    return RunState(
        run_name=values["run_name"],
        seed=values["seed"],
        step=values["step"],
        policy_version=values["policy_version"],
        lease_ids=tuple(values["lease_ids"]),
        session_ids=tuple(values["session_ids"]),
        metrics=None if metrics is None else StepMetrics(**metrics),
    )


def _files(folder: Path) -> dict[str, dict[str, int | None]]:
    """By path in the folder: size and CRC-32, None where the file is too large to read it all twice."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "crc32": _crc32(path)} for path in files
    }


def _damage(folder: Path, files: Mapping[str, Mapping[str, int | None]]) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {written['num_bytes']} were written"
        if _crc32(path) != written["crc32"]:
            return f"{name} has other bytes than were written"
    return None


def _crc32(file: Path) -> int | None:
    if file.stat().st_size > _SUMMED_BYTES:
        return None
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _damaged(folders: list[Path], what: str) -> IntegrityError:
    newest, before = folders[-1], folders[-2].name if len(folders) > 1 else None
    then = (
        f"the run goes on after {before}, without the rollouts that later steps have consumed"
        if before
        else "the run begins anew"
    )
    return IntegrityError(f"{newest} is damaged: {what}; restore it from a copy, or move it away, and {then}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
