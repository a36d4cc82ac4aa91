"""A program: a consumer of the feed that writes down every token it trains, before it acknowledges.

    python -m benchmarks.custody.trainer --url URL --journal FILE --group-size N

Its journal is its checkpoint, one JSON line each:

    {"rollout": …, "lease": …, "segments": …}   what would be trained, token by token
    {"commit": lease, "sessions": […]}          on disk from here on: these rollouts are trained
    {"acked": lease}                            and the gateway knows

Killed at any instant and started again, it acknowledges what it had committed, gives back what it had not, and leaves
out what it has trained already, should it be lent again. It ends with SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.client import GatewayClient
from gateway.contracts.errors import Conflict, LedgerError, NotFound, RequestError
from gateway.contracts.rollouts import FinishedRollout, Lease
from gateway.contracts.samples import Segment

CONSUMER = "chaos"

_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 0.2
_LEASE_SECONDS = 60.0
_WAIT_SECONDS = 2.0


class Journal:
    """The trainer's own durable record; a line that was torn by a kill is cut off."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._descriptor, len(whole))
        self.committed: dict[str, list[str]] = {}
        self.acknowledged: set[str] = set()
        for line in whole.splitlines():
            if not line.startswith(b'{"rollout"'):
                self._learn(json.loads(line))

    @property
    def trained(self) -> set[str]:
        """Sessions that are on disk as trained."""
        return {session_id for sessions in self.committed.values() for session_id in sessions}

    def write(self, *lines: Mapping[str, Any], durable: bool) -> None:
        """Append; with `durable` all that was written so far is on disk when this returns."""
        for line in lines:
            os.write(self._descriptor, json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._learn(line)
        if durable:
            os.fdatasync(self._descriptor)

    def _learn(self, line: Mapping[str, Any]) -> None:
        if "commit" in line:
            self.committed[line["commit"]] = line["sessions"]
        elif "acked" in line:
            self.acknowledged.add(line["acked"])


class ChaosTrainer:
    """Leases whole groups, journals them, acknowledges; exactly once for each rollout."""

    def __init__(self, gateway: GatewayClient, journal: Journal, *, group_size: int) -> None:
        self._gateway = gateway
        self._journal = journal
        self._group_size = group_size

    async def run(self) -> None:
        """Until cancelled. A gateway that is away is asked again."""
        await self._patiently(self._resume)
        while True:
            await self._patiently(self._step)

    async def _patiently(self, work: Any) -> None:
        try:
            await work()
        except (LedgerError, RequestError) as error:
            _log.warning("again in a moment: %s", error.message)
            await asyncio.sleep(_PAUSE_SECONDS)
            if work != self._resume:  # an answer that was lost may have been a lease, which nobody knows of
                await self._patiently(self._resume)
            else:
                await self._patiently(work)

    async def _resume(self) -> None:
        for lease_id in self._journal.committed.keys() - self._journal.acknowledged:
            await self._acknowledge(lease_id)
        await self._gateway.release_consumer(CONSUMER)

    async def _step(self) -> None:
        lease = await self._gateway.lease(
            consumer=CONSUMER, limit=4 * self._group_size, wait_seconds=_WAIT_SECONDS, lease_seconds=_LEASE_SECONDS
        )
        if lease is not None:
            await self.train(lease)

    async def train(self, lease: Lease) -> None:
        """Journal, then acknowledge."""
        await self.keep(lease)
        await self._acknowledge(lease.lease_id)

    async def keep(self, lease: Lease) -> None:
        """Read the rollouts of a lease and have them on disk."""
        trained = self._journal.trained
        fresh = [rollout for rollout in lease.rollouts if rollout.session_id not in trained]
        for leased in fresh:
            rollout = await self._gateway.rollout(leased.session_id, leased.snapshot)
            self._journal.write(rollout_line(rollout, lease.lease_id), durable=False)
        self._journal.write(
            {"commit": lease.lease_id, "at": time.time(), "sessions": [rollout.session_id for rollout in fresh]},
            durable=True,
        )

    async def _acknowledge(self, lease_id: str) -> None:
        try:
            await self._gateway.acknowledge(lease_id)
        except (Conflict, NotFound) as error:  # lent anew since: it will come again, and is trained already
            _log.warning("%s", error.message)
        self._journal.write({"acked": lease_id, "at": time.time()}, durable=False)


def rollout_line(rollout: FinishedRollout, lease_id: str) -> dict[str, Any]:
    """One rollout as the journal has it."""
    return {
        "rollout": rollout.session.session_id,
        "snapshot": rollout.finish.snapshot,
        "group": rollout.session.group,
        "lease": lease_id,
        "sampled": rollout.num_sampled_tokens,
        "left_out": rollout.pick.left_out_tokens,
        "segments": [_segment(segment) for segment in rollout.segments],
    }


def _segment(segment: Segment) -> dict[str, Any]:
    """Arrays as JSON; routing rows as base64 of one byte an expert, with which of them are valid."""
    rows = segment.routed_experts
    return {
        "ids": segment.token_ids.tolist(),
        "mask": segment.loss_mask.astype(int).tolist(),
        "logprobs": [None if value != value else value for value in segment.rollout_logprobs.tolist()],
        "versions": segment.policy_version.tolist(),
        "experts": None if rows is None else base64.b64encode(rows.astype("uint8").tobytes()).decode(),
        "valid": segment.routed_valid.astype(int).tolist(),
    }


async def train(arguments: Sequence[str] | None = None, *, kind: type[ChaosTrainer] = ChaosTrainer) -> None:
    """The program; `kind`: a trainer that does it in another order."""
    parser = argparse.ArgumentParser(description="a trainer that journals what it trains")
    parser.add_argument("--url", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    given = parser.parse_args(arguments)
    async with GatewayClient(given.url, timeout_seconds=10.0) as gateway:
        trainer = kind(gateway, Journal(given.journal), group_size=given.group_size)
        work = asyncio.create_task(trainer.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(train())
