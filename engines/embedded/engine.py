"""The engine: one thread that turns requests into tokens, a step at a time.

    submit ─▶ inbox ─▶ scheduler ─▶ forward (model's own modules) ─▶ sampler ─▶ Generation ─▶ on_progress
                          ▲   slots, prefixes                 └▶ router hooks ─▶ routing rows of the slots
              pause · resume · abort · flush · new weights, all between two steps

Callers talk to it through methods that are safe from any thread; what touches the model happens on its own thread only.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from engines.embedded.cache import SlotCache, plan_step
from engines.embedded.experts import RouterCapture
from engines.embedded.model import LoadedModel, load_weights
from engines.embedded.sampler import Draw, SamplingSettings, sample, top_logprobs
from engines.embedded.scheduler import FREE, Generation, Scheduler, SlotTable, StepWork, own_randomness
from gateway.contracts.errors import TransportError
from gateway.contracts.generation import LogprobKind, TopLogprob
from gateway.contracts.ports import PauseMode

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes. `num_slots` above `max_running` keep the prefixes of ended turns for the next ones."""

    context_length: int
    max_running: int
    num_slots: int
    chunk_tokens: int
    stream_interval: int


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """New weights wanted; waits for running requests unless generation is paused (SGLang's rule)."""

    folder: Path
    weight_version: str | None
    flush_cache: bool
    outcome: Future[str]


class EmbeddedEngine:
    """Continuous batching over one model; start it, submit generations, stop it."""

    def __init__(
        self, model: LoadedModel, *, limits: EngineLimits, weight_version: str, seed: int, logprob_kind: LogprobKind
    ) -> None:
        self.model = model
        self.limits = limits
        self.logprob_kind = logprob_kind
        self.weight_version = weight_version
        self.model_path: Path | None = None
        self.paused = False
        self._randomness = random.Random(seed)
        self._capture = RouterCapture(model.network, model.routing) if model.routing is not None else None
        config = model.network.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._cache = SlotCache(
            num_layers=config.num_hidden_layers,
            num_slots=limits.num_slots,
            num_kv_heads=config.num_key_value_heads,
            context_length=limits.context_length,
            head_dim=head_dim,
            dtype=model.dtype,
        )
        table = SlotTable(num_slots=limits.num_slots, context_length=limits.context_length, routing=model.routing)
        self._scheduler = Scheduler(
            table,
            max_running=limits.max_running,
            chunk_tokens=limits.chunk_tokens,
            copy_prefix=self._cache.copy_prefix,
        )
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._held: list[Generation] = []
        self._updates: deque[WeightUpdate] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self.num_sampled_tokens = 0

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self, *, on_failure: Callable[[], None]) -> None:
        """Begin to take requests; `on_failure` is called on the engine's thread if an error ends it."""
        self._on_failure = on_failure
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; open generations stay unfinished."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def generation(
        self,
        *,
        rid: str,
        prompt: list[int],
        settings: SamplingSettings,
        logprob_start: int,
        routed_start: int | None,
        on_progress: Callable[[], None],
        num_top_logprobs: int = 0,
        cache_key: str = "",
    ) -> Generation:
        """A request ready to submit; `prompt` was checked by the caller (vocabulary, length)."""
        draw = Draw(settings, own_randomness(settings.seed, self._randomness), num_top_logprobs=num_top_logprobs)
        if settings.min_new_tokens:
            draw.forbidden = self._end_ids(settings)
        return Generation(
            rid=rid,
            prompt_length=len(prompt),
            token_ids=list(prompt),
            settings=settings,
            draw=draw,
            logprob_start=logprob_start,
            routed_start=routed_start,
            stream_interval=settings.stream_interval or self.limits.stream_interval,
            on_progress=on_progress,
            cache_key=cache_key,
            # A token is at least one byte of text, so a stop string lies within as many last tokens as it has bytes.
            stop_tail_tokens=max((len(stop.encode()) for stop in settings.stop), default=0) + 4,
        )

    def submit(self, generation: Generation) -> None:
        """Queue a generation; its `on_progress` is called from the engine's thread."""
        self._inbox.put(lambda: self._enqueue(generation))

    def abort(self, rid: str, *, everything: bool = False) -> Future[None]:
        """End every request whose id starts with `rid` (or all) with what it has."""
        return self._call(lambda: self._abort(rid, everything=everything))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stop stepping; new requests wait until `resume`."""
        return self._call(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        """Go on."""
        return self._call(self._resume)

    def flush(self) -> Future[bool]:
        """Forget all prefixes; False, and nothing done, while requests run."""
        return self._call(self._flush)

    def set_weight_version(self, weight_version: str) -> Future[None]:
        """Relabel the current weights."""
        return self._call(lambda: setattr(self, "weight_version", weight_version))

    def update_weights(self, folder: Path, *, weight_version: str | None, flush_cache: bool) -> Future[str]:
        """Load new weights; the future holds SGLang's message, or TransportError with why they are not served."""
        update = WeightUpdate(folder, weight_version, flush_cache, Future())
        self._inbox.put(lambda: self._updates.append(update))
        return update.outcome

    def _call(self, action: Callable[[], Result]) -> Future[Result]:
        outcome: Future[Result] = Future()

        def run() -> None:
            outcome.set_result(action())

        self._inbox.put(run)
        return outcome

    # --- on the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._take_messages():
                    self._apply_updates()
                    if not self.paused and not self._scheduler.idle:
                        self._step()
                        self._apply_updates()
        except BaseException as error:
            self.failure = error
            logger.critical("the engine's thread ended", exc_info=error)
            self._on_failure()
            raise

    def _take_messages(self) -> bool:
        """Run what callers asked for; wait for it when there is nothing else to do. False ends the thread."""
        busy = not self.paused and not self._scheduler.idle
        while not (busy and self._inbox.empty()):
            action = self._inbox.get()
            if action is None:
                return False
            action()
            if self._inbox.empty():
                return True
        return True

    def _enqueue(self, generation: Generation) -> None:
        # A pending update is a writer waiting for its turn: later requests queue behind it.
        if self._updates and not self.paused:
            self._held.append(generation)
        else:
            self._scheduler.waiting.append(generation)

    def _abort(self, rid: str, *, everything: bool) -> None:
        if not everything and not rid:
            return
        matching = self._scheduler.matching("" if everything else rid)
        matching += [held for held in self._held if everything or held.rid.startswith(rid)]
        for generation in matching:
            self._finish(generation, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})

    def _pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode is PauseMode.ABORT:
            self._abort("", everything=True)
        elif mode is PauseMode.RETRACT:
            self._scheduler.retract_all()

    def _resume(self) -> None:
        self.paused = False
        self._release_held()

    def _release_held(self) -> None:
        self._scheduler.waiting.extend(self._held)
        self._held.clear()

    def _flush(self) -> bool:
        if self._scheduler.running or (self._scheduler.waiting and not self.paused):
            return False
        self._scheduler.table.forget()
        return True

    def _apply_updates(self) -> None:
        while self._updates and (self.paused or self._scheduler.idle):
            update = self._updates.popleft()
            try:
                update.outcome.set_result(self._apply(update))
            except TransportError as error:
                update.outcome.set_exception(error)
        if not self._updates and self._held:
            self._release_held()

    def _apply(self, update: WeightUpdate) -> str:
        load_weights(self.model, update.folder)
        self.model_path = update.folder
        if update.weight_version is not None:
            self.weight_version = update.weight_version
        if update.flush_cache and not self._flush():
            raise TransportError(
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache."
            )
        label = f" Weight version updated to {update.weight_version}." if update.weight_version is not None else ""
        return f"Succeeded to update model weights.{label}"

    def _step(self) -> None:
        """Compute one step: forward, routing rows, one sampled token for every sequence that is ready for it."""
        work = self._scheduler.next_step()
        logits, samplers = self._forward(work)
        if not samplers:
            return
        sampled = sample(logits, [generation.draw for generation in samplers], kind=self.logprob_kind)
        self.num_sampled_tokens += len(sampled.token_ids)
        for generation, token_id, logprob, tops in zip(samplers, *sampled, strict=True):
            if generation.settings.max_new_tokens == 0:
                self._finish(generation, {"type": "length", "length": 0})
            else:
                self._take_token(generation, token_id, logprob, tops)

    def _forward(self, work: StepWork) -> tuple[torch.Tensor, list[Generation]]:
        """Run the model on the step's tokens; logits [B, vocab] of the B sequences that sample now."""
        plan = plan_step(
            decode=[(generation.slot, generation.num_computed) for generation in work.decode],
            prompts=[(generation.slot, first, stop) for generation, first, stop in work.prompts],
            dtype=self.model.dtype,
        )
        table = self._scheduler.table
        slots, positions = plan.slots.numpy(), plan.positions.numpy()
        token_ids = torch.from_numpy(table.token_ids[slots, positions].astype(np.int64))
        wanted = _wanted_rows(work)
        self._cache.plan = plan
        logits = self.model.network(
            input_ids=token_ids[None],
            position_ids=plan.positions[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(wanted.rows, dtype=torch.int64),
            plan=plan,
        ).logits[0]
        if self._capture is not None and table.routing is not None:
            table.routing[slots, positions] = self._capture.take(len(slots))
        for generation, _, stop in work.all():
            self._scheduler.computed(generation, stop)
        if wanted.prompt_rows:
            self._note_prompt_logprobs(logits, wanted)
        return logits[wanted.sampling], wanted.samplers

    def _note_prompt_logprobs(self, logits: torch.Tensor, wanted: WantedRows) -> None:
        """Log-probs of prompt tokens, of the unscaled distribution as SGLang gives them."""
        for generation, row, following in wanted.prompt_rows:
            if following - generation.logprob_start - 1 < len(generation.input_logprobs):
                continue  # computed again after a retraction
            logprobs = torch.log_softmax(logits[row].float(), dim=-1)
            generation.input_logprobs.append(float(logprobs[generation.token_ids[following]]))
            generation.input_top_logprobs.append(top_logprobs(logprobs, generation.draw.num_top_logprobs))

    def _take_token(self, generation: Generation, token_id: int, logprob: float, tops: list[TopLogprob]) -> None:
        if not generation.version_starts or generation.version_starts[-1][0] != self.weight_version:
            # I5: weights may change inside a turn.
            generation.version_starts.append((self.weight_version, generation.num_output))
        generation.top_logprobs.append(tops)
        generation.logprobs.append(logprob)  # after all else that is told of a token: readers count these
        self._scheduler.append(generation, token_id)
        finish = self._finish_reason(generation, token_id)
        if finish is not None:
            self._finish(generation, finish)
            return
        if generation.draw.forbidden and generation.num_output >= generation.settings.min_new_tokens:
            generation.draw.forbidden = []
        if generation.num_output == 1 or generation.num_output % generation.stream_interval == 0:
            generation.on_progress()

    def _finish_reason(self, generation: Generation, token_id: int) -> dict[str, Any] | None:
        settings = generation.settings
        if settings.stop:
            matched = self._matched_stop(generation)
            if matched is not None:
                return {"type": "stop", "matched": matched}
        if not settings.ignore_eos and (token_id in settings.stop_token_ids or token_id in self.model.end_token_ids):
            return {"type": "stop", "matched": token_id}
        full = len(generation.token_ids) >= self.limits.context_length
        if generation.num_output >= settings.max_new_tokens or full:
            return {"type": "length", "length": generation.num_output}
        return None

    def _matched_stop(self, generation: Generation) -> str | None:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return None
        count = min(generation.num_output, generation.stop_tail_tokens)
        tail = tokenizer.decode(
            generation.token_ids[-count:], skip_special_tokens=generation.settings.skip_special_tokens
        )
        return next((stop for stop in generation.settings.stop if stop in tail), None)

    def _end_ids(self, settings: SamplingSettings) -> list[int]:
        return sorted(self.model.end_token_ids | settings.stop_token_ids)

    def _finish(self, generation: Generation, finish: dict[str, Any]) -> None:
        generation.weight_version = self.weight_version
        if generation.slot != FREE and generation.routed_start is not None:
            generation.routed_experts = self._routing_rows(generation)
        if generation in self._held:
            self._held.remove(generation)
        else:
            self._scheduler.release(generation)
        generation.finish = finish
        generation.on_progress()

    def _routing_rows(self, generation: Generation) -> np.ndarray[Any, np.dtype[np.int32]] | None:
        """int32 rows [start, P + C - 1); None where not every row was computed (an abort inside the prompt)."""
        table, start = self._scheduler.table, generation.routed_start
        stop = len(generation.token_ids) - 1
        if table.routing is None or start is None or generation.num_computed < stop:
            return None
        return table.routing[generation.slot, start:stop].astype("<i4")


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Which packed rows need logits. `rows`: packed indices; the rest index into `rows`.

    sampling: rows that sample the next token, of `samplers`. prompt_rows: (sequence, row, prompt position it predicts).
    """

    rows: list[int]
    sampling: list[int]
    samplers: list[Generation]
    prompt_rows: list[tuple[Generation, int, int]]


def _wanted_rows(work: StepWork) -> WantedRows:
    wanted = WantedRows([], [], [], [])
    offset = 0
    for generation, first, stop in work.all():
        if generation.logprob_start < generation.prompt_length:
            for position in range(max(first, generation.logprob_start), min(stop, generation.prompt_length - 1)):
                wanted.prompt_rows.append((generation, len(wanted.rows), position + 1))
                wanted.rows.append(offset + position - first)
        if stop == len(generation.token_ids):
            wanted.sampling.append(len(wanted.rows))
            wanted.samplers.append(generation)
            wanted.rows.append(offset + stop - first - 1)
        offset += stop - first
    return wanted
