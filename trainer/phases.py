"""Where a step's time goes: each phase timed, and told to whoever shows progress when it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum


class Phase(StrEnum):
    """The parts of a step, in order. `rollout`: until the step's rollouts are taken; `assemble`: checked, scored and
    packed; `measure`: forwards without gradient (old log-probs, recorded routing, the live router); `reference`: that
    of the reference policy; `update`: optimiser steps; `checkpoint`; `publish`: weights to the engines."""

    ROLLOUT = "rollout"
    ASSEMBLE = "assemble"
    MEASURE = "measure"
    REFERENCE = "reference"
    UPDATE = "update"
    CHECKPOINT = "checkpoint"
    PUBLISH = "publish"


TRAINING_PHASES = (Phase.MEASURE, Phase.REFERENCE, Phase.UPDATE)
"""The model's own work, which trained tokens a second are counted over."""


class PhaseClock:
    """The phases of one step. `on_begin` hears of each as it begins; phases follow each other and do not nest."""

    def __init__(self, on_begin: Callable[[Phase], None] | None = None) -> None:
        self._on_begin = on_begin
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Time the block; a phase that comes twice adds up. Safe in a worker thread while no other phase runs."""
        if self._on_begin is not None:
            self._on_begin(phase)
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase.value] = self._seconds.get(phase.value, 0.0) + time.monotonic() - began

    def seconds(self) -> Mapping[str, float]:
        """Seconds of the phases that have ended so far, by name."""
        return dict(self._seconds)
