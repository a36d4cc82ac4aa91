"""One turn's generation over as many engine requests as it takes (design 4, Interruption).

An attempt that ends early (a broken stream, an abort) leaves its tokens here; the next asks for prompt + those tokens.
Version spans are shifted, expert rows joined; no token and no row is kept twice, and none is invented (I9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from gateway.contracts.errors import EngineProtocolError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.fresh_ids import fresh_hex
from gateway.contracts.generation import (
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    TokenIds,
    TopLogprob,
)
from gateway.contracts.versions import CacheFlag, VersionSpan, join_spans, shifted_spans


class Generated(Struct, frozen=True, eq=False):
    """All that one turn's generation gave.

    token_ids int32[C], logprobs float32[C]; experts: rows [start, P+C-1) or less if the last were never returned, None
    if there are none. lost_attempts: streams that broke; engines: who sampled, in order. versions_certain: False
    where a stream broke and the policy version of its tokens could only be assumed, or its engine could not say it.
    top_logprobs: a row for each token, () for one whose engine gave none; no rows where none were asked for.
    prompt_tokens: as the engine counted them, 0 where it never said. cache_flags: where weights changed meanwhile.
    recomputed_rows: ranges [start, stop) of rows whose tokens other weights sampled than those that computed the row.
    """

    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    version_spans: tuple[VersionSpan, ...]
    experts: RoutedExperts | None
    experts_complete: bool
    finish: Finish
    cached_tokens: int
    num_retractions: int
    engines: tuple[EngineIdentity, ...]
    num_attempts: int
    lost_attempts: int
    versions_certain: bool
    meta_info: Mapping[str, JsonValue]
    reply_fields: Mapping[str, JsonValue]
    prompt_tokens: int
    top_logprobs: Sequence[Sequence[TopLogprob]] = ()
    cache_flags: tuple[CacheFlag, ...] = ()
    recomputed_rows: tuple[tuple[int, int], ...] = ()


_NO_IDS = np.zeros(0, dtype=np.int32)
_NO_LOGPROBS = np.zeros(0, dtype=np.float32)
_NO_FLAGS: frozenset[CacheFlag] = frozenset()


class Continuation:
    """Collects a turn's tokens across attempts; at every moment `generated` says what there is.

    `request` is the whole turn as first asked. Order of calls: `next_request`, then `add_chunk` and either `end` or
    `lose`, then perhaps `next_request` again.
    """

    __slots__ = (
        "_asked",
        "_asked_of",
        "_attempt_start",
        "_cache_flags",
        "_cached_tokens",
        "_engines",
        "_experts",
        "_logprobs",
        "_lost_attempts",
        "_meta_info",
        "_num_attempts",
        "_num_retractions",
        "_prompt_tokens",
        "_recomputed_rows",
        "_reply_fields",
        "_spans",
        "_token_ids",
        "_top_logprobs",
        "_versions_certain",
        "is_open",
        "num_tokens",
    )

    def __init__(self, request: GenerateRequest) -> None:
        self._asked = request
        self._token_ids: list[TokenIds] = []
        self._logprobs: list[npt.NDArray[np.float32]] = []
        self._top_logprobs: list[Sequence[TopLogprob]] = []
        self._spans: tuple[VersionSpan, ...] = ()
        self._experts: tuple[RoutedExperts, ...] = ()
        self.num_tokens = 0
        """Output tokens so far."""
        self._attempt_start = 0
        self.is_open = False
        """Whether an attempt is under way."""
        self._cached_tokens: int | None = None
        self._prompt_tokens: int | None = None
        self._num_retractions = 0
        self._engines: list[EngineIdentity] = []
        self._num_attempts = 0
        self._lost_attempts = 0
        self._versions_certain = True
        self._asked_of: EngineIdentity | None = None
        self._cache_flags = _NO_FLAGS
        self._recomputed_rows: tuple[tuple[int, int], ...] = ()
        self._meta_info: Mapping[str, JsonValue] = {}
        self._reply_fields: Mapping[str, JsonValue] = {}

    @property
    def remaining_tokens(self) -> int:
        """How many more may be sampled."""
        return self._asked.sampling.max_new_tokens - self.num_tokens

    @property
    def last_token(self) -> int | None:
        """The newest output token."""
        return int(self._token_ids[-1][-1]) if self._token_ids else None

    def next_request(self, engine: EngineIdentity) -> GenerateRequest:
        """What to ask now: prompt and tokens so far, for the rest of the budget, with the rows that are missing."""
        self._num_attempts += 1
        self._attempt_start = self.num_tokens
        self.is_open = True
        if not self._engines or self._engines[-1].engine_id != engine.engine_id:
            self._engines.append(engine)
        asked, self._asked_of = self._asked, engine
        wants_experts = asked.routed_experts_start is not None and engine.captures_experts
        is_first = not self.num_tokens  # then it is the prompt and the sampling as they are: nothing is copied
        return GenerateRequest(
            fresh_hex(32),  # of fixed length: SGLang aborts by prefix
            asked.token_ids if is_first else np.concatenate([asked.token_ids, *self._token_ids]),
            asked.sampling if is_first else replace(asked.sampling, max_new_tokens=self.remaining_tokens),
            self._next_row if wants_experts else None,
            asked.passthrough,
            asked.reasons_first,
            asked.num_top_logprobs,
            asked.media,
            asked.routing_key,
            engine.weight_version,  # I9: no prefix of other weights is read
            asked.pace,
            asked.written if is_first else None,
        )

    def add_chunk(self, chunk: GenerateChunk) -> None:
        """Keep new tokens; raises EngineProtocolError if there is not one log-prob a token."""
        number = len(chunk.token_ids)
        if number != len(chunk.logprobs):
            raise EngineProtocolError(
                f"engine {self._engine_id} sent {len(chunk.token_ids)} tokens with {len(chunk.logprobs)} log-probs"
            )
        if chunk.top_logprobs and number != len(chunk.top_logprobs):
            raise EngineProtocolError(
                f"engine {self._engine_id} sent {len(chunk.token_ids)} tokens with {len(chunk.top_logprobs)} rows of "
                "likeliest tokens"
            )
        if number:
            self._token_ids.append(chunk.token_ids)
            self._logprobs.append(chunk.logprobs)
            if self._asked.num_top_logprobs:  # I9: what an engine does not give stays missing, at its own place
                self._top_logprobs += chunk.top_logprobs or [()] * number
            self.num_tokens += number

    def end(self, end: GenerateEnd) -> None:
        """Close the attempt as its engine describes it; raises EngineProtocolError if that does not fit the chunks."""
        received = self.num_tokens - self._attempt_start
        if end.completion_tokens != received:
            raise EngineProtocolError(
                f"engine {self._engine_id} streamed {received} tokens and counts {end.completion_tokens}"
            )
        spans, known = end.version_spans, self._asked_of
        if len(spans) != 1 or known is None or spans[0].policy_version != known.policy_version:
            self._note_cache(end)
        if self._spans or self._attempt_start:
            self._add_spans(spans)
        else:
            self._spans = spans
        self._versions_certain = self._versions_certain and end.versions_certain
        self.is_open = False
        rows = end.routed_experts
        if rows is not None and self._asked.routed_experts_start is not None:
            if rows.start != self._next_row:
                raise EngineProtocolError(
                    f"engine {self._engine_id} sent routing rows from {rows.start}, asked from {self._next_row}"
                )
            self._experts += (rows,)
        if self._cached_tokens is None:
            self._cached_tokens = end.cached_tokens
            self._prompt_tokens = end.prompt_tokens - self._attempt_start
        self._num_retractions += end.num_retractions
        self._meta_info = {**self._meta_info, **end.meta_info} if self._meta_info else end.meta_info
        self._reply_fields = {**self._reply_fields, **end.reply_fields} if self._reply_fields else end.reply_fields

    def lose(self, policy_version: int, *, certain: bool) -> None:
        """Close an attempt that broke or was cut off: its tokens stay, sampled by `policy_version` as far as known."""
        if not self.is_open:
            return
        received = self.num_tokens - self._attempt_start
        if received:
            self._add_spans((VersionSpan(0, received, policy_version),))
            self._versions_certain = self._versions_certain and certain
        self.is_open = False
        self._lost_attempts += 1

    def generated(self, finish: Finish) -> Generated:
        """What there is, ended by `finish`."""
        rows = self._joined_experts() if self._experts else None
        complete = rows is not None and rows.stop == len(self._asked.token_ids) + self.num_tokens - 1
        ids, logprobs = self._token_ids, self._logprobs
        return Generated(
            token_ids=ids[0] if len(ids) == 1 else np.concatenate([_NO_IDS, *ids]),
            logprobs=logprobs[0] if len(logprobs) == 1 else np.concatenate([_NO_LOGPROBS, *logprobs]),
            version_spans=self._spans if len(self._spans) == 1 and self.num_tokens else join_spans(self._spans),
            experts=rows,
            experts_complete=complete,
            finish=finish,
            cached_tokens=self._cached_tokens or 0,
            num_retractions=self._num_retractions,
            engines=tuple(self._engines),
            num_attempts=self._num_attempts,
            lost_attempts=self._lost_attempts,
            versions_certain=self._versions_certain,
            meta_info=self._meta_info,
            reply_fields=self._reply_fields,
            top_logprobs=tuple(self._top_logprobs),
            prompt_tokens=self._prompt_tokens or 0,
            cache_flags=tuple(sorted(self._cache_flags)) if self._cache_flags else (),
            recomputed_rows=self._recomputed_rows,
        )

    def stop_if_over(self, stop_token_ids: frozenset[int]) -> Finish | None:
        """How the turn ended if a broken stream had in truth said everything: budget used up, or a stop token last."""
        sampling = self._asked.sampling
        last = self.last_token
        stops = set(sampling.stop_token_ids) if sampling.ignore_eos else stop_token_ids | set(sampling.stop_token_ids)
        if last is not None and last in stops:
            return Finish(FinishReason.STOP, last)
        return Finish(FinishReason.LENGTH) if self.remaining_tokens < 1 else None

    @property
    def _engine_id(self) -> str:
        return self._engines[-1].engine_id

    @property
    def _next_row(self) -> int:
        if self._experts:
            return self._experts[-1].stop
        return self._asked.routed_experts_start or 0

    def _note_cache(self, end: GenerateEnd) -> None:
        """What weights that changed during this attempt did to its cache, by what the engine says of it (I5, I9)."""
        spans = join_spans(end.version_spans)
        if not spans:
            return
        known = self._asked_of.policy_version if self._asked_of is not None else spans[0].policy_version
        if end.cached_tokens and spans[0].policy_version != known:
            self._cache_flags |= {CacheFlag.OLDER}  # the prefix was looked up under a label of before
        num_changes = len(spans) - 1
        if end.num_retractions and num_changes:
            self._cache_flags |= {CacheFlag.RECOMPUTED}
            # Row i made token i + 1; all rows before the last change were computed again after it.
            first_row = len(self._asked.token_ids) + self._attempt_start - 1
            if spans[-1].start:
                self._recomputed_rows += ((first_row, first_row + spans[-1].start),)
        if end.num_retractions < num_changes:
            self._cache_flags |= {CacheFlag.OLDER}

    def _add_spans(self, spans: tuple[VersionSpan, ...]) -> None:
        if spans and self._spans and spans[0].policy_version != self._spans[-1].policy_version:
            self._cache_flags |= {CacheFlag.RECOMPUTED}  # the prompt of this attempt is what other weights sampled
        self._spans = (*self._spans, *shifted_spans(spans, self._attempt_start))

    def _joined_experts(self) -> RoutedExperts:
        if len({rows.ids.shape[1:] for rows in self._experts}) > 1:
            names = ", ".join(engine.engine_id for engine in self._engines)
            raise EngineProtocolError(f"engines {names} return routing rows of different shapes")
        if len(self._experts) == 1:
            return self._experts[0]
        return RoutedExperts(np.concatenate([rows.ids for rows in self._experts]), self._experts[0].start)
