"""Runs the real gateway with an engine whose routing rows are as wide as the model's configuration says.

An engine `wide=TEXT` answers every request with the tokens of TEXT. Its rows are made without the temporary arrays that
`ScriptedEngine` needs for its distinct ones, so that what a reply of hundreds of megabytes costs can be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engines.scripted import ScriptedEngine, ScriptedReply
from gateway import main
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import EngineIdentity, GenerateChunk, GenerateEnd, GenerateRequest
from gateway.contracts.ports import Engine
from gateway.sessions.model import ServedModel


class WideEngine(ScriptedEngine):
    """A scripted engine with rows of zeros and ones up to k."""

    def __init__(self, text: str, model: ServedModel, engine_id: str) -> None:
        reply = (*model.tokenizer.encode(text).tolist(), *model.tokenizer.eos_token_ids[:1])
        super().__init__([ScriptedReply(reply, chunk_size=100)], engine_id=engine_id)
        self._wide = model.routing

    async def identity(self) -> EngineIdentity:
        """With the model's routing."""
        return replace(await super().identity(), routing=self._wide, captures_experts=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """With rows at the end."""
        start = request.routed_experts_start
        async for item in super().generate(request):
            if isinstance(item, GenerateEnd) and self._wide is not None and start is not None:
                num_rows = item.prompt_tokens + item.completion_tokens - 1 - start
                row = np.arange(self._wide.top_k, dtype=self._wide.dtype)
                rows = np.tile(row, (num_rows, self._wide.num_layers, 1))
                yield replace(item, routed_experts=RoutedExperts(rows, start))
            else:
                yield item


def wide_engine(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
    return WideEngine(url, model, engine_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    main.configure(parser)
    main.serve(main._settings(parser.parse_args()), operator_key=None, engine_kinds={"wide": wide_engine})
