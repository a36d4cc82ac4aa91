"""Looks after one gateway's store while it serves: is there room, what is dropped by itself, how large is it.

every second ────────▶ reserve.refresh      back to taking turns as soon as there is room
every sweep_seconds ─▶ sweep by the rules   drops, then files are given back; then full files are compressed
each new turn ───────▶ admit                LedgerFull where it might not be recorded
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict

from gateway.contracts.errors import VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Ledger
from gateway.ledger.reserve import Space, SpaceReserve, SpaceState
from gateway.ledger.sweeping import KeepRules, StorageSettings, SweepReport, sweep

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class StorageKeeper:
    """`reserve` is None where the store is not on a disk of ours; then there is always room."""

    def __init__(self, ledger: Ledger, settings: StorageSettings, reserve: SpaceReserve | None) -> None:
        self._ledger = ledger
        self._settings = settings
        self._reserve = reserve
        self._sweeping = asyncio.Lock()
        self._last_sweep: SweepReport | None = None

    @property
    def space(self) -> Space | None:
        """The disk as of the last look, None where it is not ours."""
        return None if self._reserve is None else self._reserve.space

    @property
    def last_sweep(self) -> SweepReport | None:
        """The latest that was no dry run."""
        return self._last_sweep

    @property
    def rules(self) -> KeepRules:
        """Of regular sweeps."""
        return self._settings.rules

    def admit(self, num_running: int) -> None:
        """Raise LedgerFull if another turn, beside those running, might not be recorded."""
        if self._reserve is not None:
            self._reserve.check(num_running)

    async def sweep(self, rules: KeepRules | None = None, *, dry_run: bool = False) -> SweepReport:
        """One sweep by `rules` (None: those of the settings); sweeps wait for each other."""
        async with self._sweeping:
            report = await sweep(self._ledger, rules or self.rules, now=time.time(), dry_run=dry_run)
            if not dry_run:
                self._last_sweep = report
                await self._look()
            return report

    async def watch(self) -> None:
        """Look at the disk until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def sweep_regularly(self) -> None:
        """Sweep until cancelled; one process of a folder does. What fails is logged and tried at the next time."""
        while True:
            await asyncio.sleep(self._settings.sweep_seconds)
            try:
                await self.sweep()
            except VerbatimError as error:
                _log.warning("the store was not swept: %s", error)
            if self._settings.compress:
                await self._compress()

    async def _compress(self) -> None:
        try:
            done = await self._ledger.compress(bytes_per_second=self._settings.compress_bytes_per_second)
        except VerbatimError as error:
            _log.warning("routing rows were not compressed: %s", error)
            return
        if done.num_records:
            _log.info(
                "%d records of routing rows take %d bytes less (of %d)",
                done.num_records, done.num_saved_bytes, done.num_bytes,
            )  # fmt: skip

    async def status(self) -> Mapping[str, JsonValue]:
        """For operators: the disk, the store by kind, rules, the last sweep."""
        usage, stored_bytes = await self._ledger.usage(), await self._ledger.stored_bytes()
        return {
            "space": None if self.space is None else asdict(self.space),
            "usage": asdict(usage),
            "stored_bytes": stored_bytes,
            "settings": {**asdict(self._settings), "consumers": list(self._settings.consumers)},
            "last_sweep": None if self._last_sweep is None else report_json(self._last_sweep),
        }

    async def _look(self) -> None:
        if self._reserve is None:
            return
        before = self._reserve.space.state
        try:
            space = await asyncio.to_thread(self._reserve.refresh)
        except OSError as error:
            _log.warning("the data folder's disk cannot be looked at: %s", error)
            return
        if space.state is not before:
            level = logging.INFO if space.state is SpaceState.OPEN else logging.WARNING
            _log.log(level, "room on the disk: %s, %d bytes are free", space.state.value, space.free_bytes)


def report_json(report: SweepReport, *, num_named: int = 1000) -> dict[str, JsonValue]:
    """A sweep's report as JSON; of more than `num_named` rollouts only so many are named."""
    return {
        **asdict(report),
        "num_dropped": len(report.dropped),
        "num_dropped_bytes": report.num_dropped_bytes,
        "dropped": [asdict(each) for each in report.dropped[:num_named]],
        "missed": list(report.missed[:num_named]),
    }
