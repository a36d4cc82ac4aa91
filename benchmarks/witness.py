"""What the engine saw and gave, noted at its own door: the truth that records are held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from benchmarks.policy import SEED_FIELD
from gateway.contracts.errors import IntegrityError
from gateway.contracts.generation import EngineIdentity, GenerateChunk, GenerateEnd, GenerateRequest, TokenIds
from gateway.contracts.ports import Engine, PauseMode


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One engine request: its prompt and what was streamed back until the caller or the engine ended it."""

    prompt_token_ids: TokenIds
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A turn as the engine knows it, its interrupted attempts joined."""

    prompt_token_ids: TokenIds
    output_token_ids: TokenIds
    output_logprobs: npt.NDArray[np.float32]


class Witness:
    """An `Engine` that hands everything on to another one and remembers it by the seed of the agent's request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._served: defaultdict[int, list[Served]] = defaultdict(list)

    @property
    def engine_id(self) -> str:
        """The engine's own."""
        return self._engine.engine_id

    @property
    def url(self) -> str:
        """The engine's own."""
        return self._engine.url

    def take(self, seed: int) -> list[Served]:
        """All engine requests of one agent's request, in order; they are forgotten here."""
        return self._served.pop(seed, [])

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Pass on; note the prompt before, each chunk as it goes by."""
        served = Served(request.token_ids)
        self._served[int(request.passthrough[SEED_FIELD])].append(served)
        async with aclosing(self._engine.generate(request)) as stream:
            async for item in stream:
                if isinstance(item, GenerateChunk):
                    served.token_ids.extend(item.token_ids.tolist())
                    served.logprobs.extend(item.logprobs.tolist())
                yield item

    async def identity(self) -> EngineIdentity:
        """The engine's own."""
        return await self._engine.identity()

    async def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """The engine's."""
        return await self._engine.tokenize(texts)

    async def healthy(self) -> bool:
        """The engine's own."""
        return await self._engine.healthy()

    async def abort(self, request_id: str) -> None:
        """Pass on."""
        await self._engine.abort(request_id)

    async def pause(self, mode: PauseMode) -> None:
        """Pass on."""
        await self._engine.pause(mode)

    async def resume(self) -> None:
        """Pass on."""
        await self._engine.resume()

    async def aclose(self) -> None:
        """Pass on."""
        await self._engine.aclose()


def joined(served: list[Served]) -> Sampled:
    """Attempts of one turn as one; raises IntegrityError if one did not begin where the one before it ended."""
    first = served[0].prompt_token_ids
    token_ids: list[int] = []
    logprobs: list[float] = []
    for attempt in served:
        expected = np.concatenate([first, np.asarray(token_ids, dtype=np.int32)])
        if not np.array_equal(attempt.prompt_token_ids, expected):
            raise IntegrityError("an interrupted turn went on from other tokens than it had")
        token_ids += attempt.token_ids
        logprobs += attempt.logprobs
    return Sampled(first, np.asarray(token_ids, dtype=np.int32), np.asarray(logprobs, dtype=np.float32))
