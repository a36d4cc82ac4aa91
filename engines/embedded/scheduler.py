"""Which sequences run, in which slots, and what each step computes.

`Generation` is one request on its way through the engine. `SlotTable` remembers what every slot holds (token ids,
routing rows), also after its sequence ended, so that the next turn of a conversation finds its prefix. `Scheduler`
admits, chunks prompts, retracts and lets go. Nothing here knows torch or HTTP.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.embedded.sampler import Draw, SamplingSettings
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import TopLogprob

FREE = -1
"""`Generation.slot` of a sequence that is not running."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request; the engine's thread writes it, HTTP reads it after `on_progress`.

    token_ids: prompt and output together. num_computed: how many of them have keys and values.
    logprob_start: first prompt position whose log-prob is wanted (prompt length: none). routed_start: first routing row
    wanted, None for none. cache_key: prefixes are shared with requests of the same key only. version_starts: (label,
    first output token it sampled). finish: SGLang's finish_reason, the last field to be set.
    """

    rid: str
    prompt_length: int
    token_ids: list[int]
    settings: SamplingSettings
    draw: Draw
    logprob_start: int
    routed_start: int | None
    stream_interval: int
    on_progress: Callable[[], None]
    cache_key: str = ""
    stop_tail_tokens: int = 0
    slot: int = FREE
    num_computed: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    admitted: bool = False
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[TopLogprob]] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    input_top_logprobs: list[list[TopLogprob]] = field(default_factory=list)
    version_starts: list[tuple[str, int]] = field(default_factory=list)
    routed_experts: npt.NDArray[np.int32] | None = None
    weight_version: str = ""
    finish: dict[str, Any] | None = None

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed


class SlotTable:
    """What every slot holds: token_ids int32[slots, context], routing [slots, context, layers, top_k], lengths."""

    def __init__(self, *, num_slots: int, context_length: int, routing: RoutingShape | None) -> None:
        self.num_slots = num_slots
        self.token_ids = np.zeros((num_slots, context_length), dtype=np.int32)
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self.routing: npt.NDArray[np.integer] | None = None
        if routing is not None:
            shape = (num_slots, context_length, routing.num_layers, routing.top_k)
            self.routing = np.zeros(shape, dtype=routing.dtype)
        self._owners: list[Generation | None] = [None] * num_slots
        self._keys = [""] * num_slots
        self._last_used = np.zeros(num_slots, dtype=np.int64)
        self._clock = 0

    def is_free(self, slot: int) -> bool:
        """Whether no running sequence owns the slot."""
        return self._owners[slot] is None

    def has_free(self) -> bool:
        """Whether another sequence can be taken."""
        return None in self._owners

    def longest_prefix(self, token_ids: npt.NDArray[np.int32], limit: int, *, cache_key: str) -> tuple[int, int]:
        """The slot of that key sharing most leading tokens with `token_ids`, and how many (at most `limit`)."""
        limits = np.where([key == cache_key for key in self._keys], np.minimum(self.lengths, limit), 0)
        width = int(limits.max(initial=0))
        if width <= 0:
            return 0, 0
        differs = self.token_ids[:, :width] != token_ids[:width]
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        shared = np.minimum(shared, limits)
        slot = int(shared.argmax())
        return slot, int(shared[slot])

    def coldest_free(self, *, but_not: int | None) -> int | None:
        """An empty slot (the lowest, to keep running sequences neighbours), else the free one unused for longest."""
        free = [slot for slot in range(self.num_slots) if self.is_free(slot) and slot != but_not]
        empty = [slot for slot in free if self.lengths[slot] == 0]
        if empty:
            return empty[0]
        return min(free, key=lambda slot: int(self._last_used[slot]), default=None)

    def take(self, slot: int, generation: Generation, *, shared: int) -> None:
        """Give the slot to a sequence; its first `shared` positions stay valid."""
        self._owners[slot] = generation
        self._keys[slot] = generation.cache_key
        self.lengths[slot] = shared
        count = len(generation.token_ids)
        self.token_ids[slot, :count] = generation.token_ids

    def release(self, slot: int, *, keep: int) -> None:
        """Free the slot; its first `keep` positions stay for whoever comes with the same prefix."""
        self._clock += 1
        self._owners[slot] = None
        self._last_used[slot] = self._clock
        self.lengths[slot] = keep

    def forget(self) -> None:
        """Drop what the free slots hold."""
        for slot in range(self.num_slots):
            if self.is_free(slot):
                self.lengths[slot] = 0


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step: sequences that decode one token (by rising slot), and prompt chunks [first, stop)."""

    decode: tuple[Generation, ...]
    prompts: tuple[tuple[Generation, int, int], ...]

    def all(self) -> Iterator[tuple[Generation, int, int]]:
        """(sequence, first, stop) in the order of the packed row."""
        for generation in self.decode:
            yield generation, generation.num_computed, generation.num_computed + 1
        yield from self.prompts


class Scheduler:
    """Continuous batching: every step decodes all running sequences and computes up to `chunk_tokens` of prompts."""

    def __init__(
        self,
        table: SlotTable,
        *,
        max_running: int,
        chunk_tokens: int,
        copy_prefix: Callable[[int, int, int], None],
    ) -> None:
        self.table = table
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._copy_prefix = copy_prefix

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.running and not self.waiting

    def next_step(self) -> StepWork:
        """Admit what fits and choose the step's work; empty iff nothing runs."""
        while self.waiting and len(self.running) < self._max_running and self.table.has_free():
            self._admit(self.waiting.popleft())
        decode: list[Generation] = []
        prompts: list[tuple[Generation, int, int]] = []
        budget = self._chunk_tokens
        for generation in self.running:
            if generation.num_pending == 1:
                decode.append(generation)
            elif budget > 0:
                first = generation.num_computed
                stop = min(len(generation.token_ids), first + budget)
                prompts.append((generation, first, stop))
                budget -= stop - first
        decode.sort(key=lambda generation: generation.slot)
        return StepWork(tuple(decode), tuple(prompts))

    def _admit(self, generation: Generation) -> None:
        """Find a slot: the one with the longest prefix if it can be had, else a cold one with the prefix copied."""
        token_ids = np.array(generation.token_ids, dtype=np.int32)
        # The last token must be computed to sample; wanted prompt log-probs need their positions computed too.
        limit = len(token_ids) - 1
        if generation.logprob_start < generation.prompt_length:
            limit = min(limit, generation.logprob_start)
        source, shared = self.table.longest_prefix(token_ids, limit, cache_key=generation.cache_key)
        # Taking a slot over cuts what it holds behind the prefix: only where that is less than the prefix itself.
        continues = self.table.is_free(source) and 2 * shared >= self.table.lengths[source]
        if shared and continues:
            slot = source
        else:
            target = self.table.coldest_free(but_not=source if shared else None)
            slot = source if target is None else target
            if shared and slot != source:
                self._copy(source, slot, shared)
        self.table.take(slot, generation, shared=shared)
        generation.slot = slot
        generation.num_computed = shared
        if not generation.admitted:
            generation.admitted = True
            generation.cached_tokens = shared
        self.running.append(generation)

    def _copy(self, source: int, target: int, length: int) -> None:
        self._copy_prefix(source, target, length)
        if self.table.routing is not None:
            self.table.routing[target, :length] = self.table.routing[source, :length]

    def computed(self, generation: Generation, stop: int) -> None:
        """Note that positions below `stop` now have keys, values and routing rows."""
        generation.num_computed = stop
        self.table.lengths[generation.slot] = stop

    def append(self, generation: Generation, token_id: int) -> None:
        """Add a sampled token."""
        self.table.token_ids[generation.slot, len(generation.token_ids)] = token_id
        generation.token_ids.append(token_id)

    def release(self, generation: Generation) -> None:
        """End a sequence; a running one leaves its slot behind for the next turn."""
        if generation.slot == FREE:
            self.waiting.remove(generation)
            return
        self.running.remove(generation)
        self.table.release(generation.slot, keep=generation.num_computed)
        generation.slot = FREE

    def retract_all(self) -> None:
        """Send every running sequence back to the head of the queue; its cache will be computed anew."""
        for generation in reversed(self.running):
            self.table.release(generation.slot, keep=0)
            generation.slot = FREE
            generation.num_computed = 0
            generation.num_retractions += 1
            self.waiting.appendleft(generation)
        self.running.clear()

    def matching(self, rid: str) -> list[Generation]:
        """Running and waiting sequences whose id starts with `rid` (SGLang aborts by prefix)."""
        return [generation for generation in (*self.running, *self.waiting) if generation.rid.startswith(rid)]


def own_randomness(seed: int | None, engine_randomness: random.Random) -> random.Random:
    """A request's random numbers: from its seed, or from the engine's for those that gave none."""
    return random.Random(engine_randomness.getrandbits(64) if seed is None else seed)
