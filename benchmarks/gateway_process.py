"""A program: the gateway of `verbatim serve`, with a scripted engine whose every prompt and token goes to a file.

Usage: `gateway_process.py FAMILY HISTORY_POLICY DATA MODEL PORT WITNESS_FILE`. What the engine saw is one
JSON line an engine request.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models.families import FAMILIES
from benchmarks.policy import SEED_FIELD, Policy
from benchmarks.witness import Witness
from engines.scripted import ScriptedEngine
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest
from gateway.contracts.ports import Engine
from gateway.main import serve
from gateway.sessions.model import ServedModel
from gateway.settings import GatewaySettings
from gateway.tito.conversation import HistoryPolicy


class _WritingWitness(Witness):
    """A witness whose notes outlive the process."""

    def __init__(self, engine: Engine, file: Path) -> None:
        super().__init__(engine)
        self._file = file

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Pass on, then write a line, however the request ended."""
        seed = int(request.passthrough[SEED_FIELD])
        try:
            async for item in super().generate(request):
                yield item
        finally:
            with self._file.open("a") as file:
                for served in self.take(seed):
                    line = {
                        "seed": seed,
                        "prompt": served.prompt_token_ids.tolist(),
                        "ids": served.token_ids,
                        "logprobs": served.logprobs,
                    }
                    file.write(json.dumps(line) + "\n")


def main(family: str, policy: str, data: str, model: str, port: str, witness_file: str) -> None:
    """Serve until SIGTERM."""

    def scripted(engine_id: str, url: str, served: ServedModel, policies: Mapping[str, int]) -> Engine:
        reply = Policy(served.path, FAMILIES[family]).reply
        engine = ScriptedEngine(reply, engine_id=engine_id, vocab_size=served.tokenizer.vocab_size)
        return _WritingWitness(engine, Path(witness_file))

    settings = GatewaySettings(
        model=Path(model),
        data=Path(data),
        port=int(port),
        engines=("scripted=here",),
        history_policy=HistoryPolicy(policy),
    )
    serve(settings, operator_key=None, engine_kinds={"scripted": scripted})


if __name__ == "__main__":
    main(*sys.argv[1:])
