"""A trainer whose only weights are the list of what it learned from: `python counting_trainer.py URL DIR NUM`.

It goes the real trainer's way (lease, read, checkpoint, acknowledge) with the real source and checkpoints, and ends
when its list holds NUM rollouts. Killed at any moment, it goes on from its newest checkpoint, whose `history.json` has
the session ids with the number of their trained tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from gateway.client import GatewayClient
from trainer.checkpoint import CheckpointStore, RunState
from trainer.data.source import RolloutSource

RUN = "counting"


async def count(url: str, folder: Path, wanted: int) -> None:
    checkpoints = CheckpointStore(folder, keep=2)
    async with GatewayClient(url, retry_seconds=60.0) as gateway:
        source = RolloutSource(gateway, run_name=RUN, group_size=2, lease_seconds=60.0)
        latest = checkpoints.latest()
        state, history = RunState(RUN, 0, 0, 0), []
        if latest is not None:
            state, history = latest[0], json.loads((latest[1] / "history.json").read_text())
        await source.resume(lease_ids=state.lease_ids, consumed=state.session_ids)
        while len(history) < wanted:
            taken = await source.take(2, wait_seconds=1.0)
            async with source.holding(taken):
                history += [[r.session.session_id, r.num_trained_tokens] for r in taken.rollouts]
                state = RunState(RUN, 0, state.step + 1, 0, lease_ids=taken.lease_ids, session_ids=taken.session_ids)
                text = json.dumps(history)
                checkpoints.save(state, lambda partial, text=text: _write(partial / "history.json", text))
                await source.acknowledge(taken.lease_ids)


def _write(file: Path, text: str) -> None:
    file.write_text(text)


if __name__ == "__main__":
    asyncio.run(count(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
