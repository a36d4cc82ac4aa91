"""The sink for Weights & Biases: one run there, the same one whenever training goes on; its files in `FOLDER/wandb`.

What was told is read back at each start, from the files of earlier starts and, online, from the server, because wandb's
own process writes with a delay and takes what it had in hand with it when the trainer is killed. Those steps are then
told anew from metrics.jsonl, and no step is told twice.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway.contracts.errors import ConfigurationError
from trainer.metrics import Evaluation, StepMetrics, evaluation_figures, figures

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 15
_UPLOAD_SECONDS = 60
"""For what is not sent yet when a run ends; it stays on disk for `wandb sync`."""
_PROJECT = "verbatim"
_STEP = "step"
_EVALUATED = "evaluation/policy_version"


class WandbSink:
    """wandb's own environment variables are obeyed, and nothing is ever asked at a terminal: without WANDB_MODE it is
    online where there is a key and the server answers in time, else offline, for `wandb sync`.

    Raises ImportError where wandb is not installed.
    """

    def __init__(self, folder: Path, *, run_name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._folder = folder
        self._run_name = run_name
        self._settings = settings
        self._run: Any = None
        self._steps: set[int] = set()
        self._evaluated: set[int] = set()

    def resume(self, *, step: int) -> None:
        """The same run id as before. A server forgets nothing: a run that went back repeats no step here."""
        self._note_history()
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it advertises another product on standard error
        self._run = self._start(self._run_id())
        self._run.define_metric("*", step_metric=_STEP)
        self._steps.update(range(1, int(self._run.summary.get(_STEP, 0)) + 1))
        self._evaluated.update(range(int(self._run.summary.get(_EVALUATED, -1)) + 1))

    def step(self, metrics: StepMetrics) -> None:
        """One row of history, with x = step."""
        if metrics.step not in self._steps:
            self._steps.add(metrics.step)
            self._run.log({_STEP: metrics.step, **figures(metrics)})

    def evaluation(self, evaluation: Evaluation, *, step: int) -> None:
        """A row of its own, of the same x."""
        if evaluation.policy_version not in self._evaluated:
            self._evaluated.add(evaluation.policy_version)
            self._run.log({_STEP: step, **evaluation_figures(evaluation)})

    def close(self) -> None:
        """Wait until everything is sent or, offline, written: `finish` alone returns before wandb's process did so."""
        if self._run is None:
            return
        self._run.finish()
        self._wandb.teardown()

    def _note_history(self) -> None:
        for file in (self._folder / "wandb").glob("*run-*/run-*.wandb"):
            for row in read_history(file):
                if _EVALUATED in row:
                    self._evaluated.add(int(row[_EVALUATED]))
                elif _STEP in row:
                    self._steps.add(int(row[_STEP]))

    def _run_id(self) -> str:
        """Made once a run folder."""
        file = self._folder / "wandb" / "run-id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(uuid.uuid4().hex[:12])
        return file.read_text()

    def _start(self, run_id: str) -> Any:
        asked = os.environ.get("WANDB_MODE", "")
        if asked not in ("", "online", "offline", "disabled"):
            raise ConfigurationError(f"WANDB_MODE is {asked!r}; set it to online or offline")
        if asked == "online" and not _has_key():
            raise ConfigurationError("WANDB_MODE is online, but there is no key: set WANDB_API_KEY or `wandb login`")
        try:
            return self._init(run_id, asked or ("online" if _has_key() else "offline"))
        except self._wandb.errors.Error as error:
            if asked:
                raise ConfigurationError(f"metrics.sinks wandb: {' '.join(str(error).split())}") from error
            _log.warning("wandb writes offline into %s (`wandb sync`): %s", self._folder / "wandb", error)
            return self._init(run_id, "offline")

    def _init(self, run_id: str, mode: Any) -> Any:
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id,
            name=self._run_name,
            dir=str(self._folder),
            config=dict(self._settings),
            resume="allow",
            mode=mode,
            settings=self._wandb.Settings(
                init_timeout=_ANSWER_SECONDS,
                finish_timeout=_UPLOAD_SECONDS,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )


def read_history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that a run's file holds, in order; a torn end is left out.

    Format: seven bytes that begin with `:W&B`, then LevelDB's log format (records in blocks of 32 KiB, each part with
    CRC, length and kind before it) of protocol buffers.
    """
    from wandb.proto import wandb_internal_pb2

    for body in _log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at import
        record.ParseFromString(body)
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _log_records(body: bytes) -> Iterator[bytes]:
    block, head, at, parts = 32_768, 7, 7, b""
    if body[:4] != b":W&B":
        return
    while True:
        if block - at % block < head:  # too little for a head: the rest of a block is padding
            at += block - at % block
        if at + head > len(body):
            return
        length, kind = struct.unpack("<HB", body[at + 4 : at + head])
        if at + head + length > len(body):
            return
        parts += body[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def _has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
