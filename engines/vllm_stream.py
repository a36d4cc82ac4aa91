"""What vLLM streams, read into tokens: `/inference/v1/generate` in the shapes of 0.30 and 0.32, and `/v1/completions`.

All three send what is new in each event. Ids, log-probs, counts, versions and routing rows are checked against each
other and against the request (I1, I2, I9). What is missing stays missing; what contradicts itself is an
EngineProtocolError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.answers import new_token_ids
from engines.likeliest import Row, likeliest
from engines.refusals import failure
from engines.routing_rows import NpyLayout, RoutingRows, decode_routing
from gateway.contracts.errors import EngineProtocolError, EngineUnavailable, ExpertsMismatch, LengthMismatch
from gateway.contracts.experts import RoutedExperts, RoutingShape
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    TopLogprob,
)
from gateway.contracts.versions import VersionSpan, join_spans

_log = logging.getLogger(__name__)

_KNOWN_TOP = frozenset(("request_id", "id", "object", "created", "model", "choices", "usage", "prompt_token_ids"))
_KNOWN_CHOICE = frozenset(
    (
        "index",
        "text",
        "token_ids",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "prompt_token_ids",
        "routed_experts",
        "weight_versions",
    )
)
_NO_LOGPROB = -9999.0
"""What vLLM writes for a log-prob that it does not have, and its floor for those that it has."""

_ID_MARK = "token_id:"

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "repetition": FinishReason.STOP,  # the agent asked for `repetition_detection`
}


class VllmStream:
    """One answer as it is read: `read` every event, then ask `end`.

    `named`: who answers what, for errors. `routing`: the model's shape, None if it has none or it is not known.
    `rows`: takes its routing rows as they arrive, None where there will be none.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        named: str,
    ) -> None:
        self._request = request
        self._routing = routing
        self._policy_version_of = policy_version_of
        self.named = named
        self.rows = RoutingRows.of(request, routing, NpyLayout)
        self._num_output = 0
        self._last_token: int | None = None
        self._finish: Finish | None = None
        self._usage: Mapping[str, Any] | None = None
        self._experts: str | None = None
        self._versions: Sequence[Mapping[str, Any]] | None = None
        self._reply_fields: dict[str, JsonValue] = {}
        self._choice_fields: dict[str, JsonValue] = {}

    @property
    def tells_versions(self) -> bool:
        """Whether the answer said which weights sampled which token (0.32 does, 0.30 does not)."""
        return self._versions is not None

    def read(self, event: Any) -> GenerateChunk | None:
        """The new tokens of one event, None if it brought none."""
        try:
            if "error" in event:
                raise failure(event["error"], self.named)
            return self._read(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineProtocolError(f"{self.named}: unreadable event ({type(error).__name__}: {error})") from error

    def check_over(self) -> None:
        """Raise EngineUnavailable if the events ended before the request did."""
        if self._finish is None and self._usage is None:
            raise EngineUnavailable(f"{self.named}: the stream ended before the request did")

    def end(self, *, labels: tuple[str, str] | None, notes: Mapping[str, JsonValue]) -> GenerateEnd:
        """The end of a complete answer.

        labels: of the weights before and after, where the answer does not tell its versions. notes: further fields for
        `meta_info`. Raises EngineProtocolError for what does not fit together.
        """
        usage = self._usage or {}
        num_prompt = len(self._request.token_ids)
        self._check_counts(usage)
        try:
            return GenerateEnd(
                # vLLM leaves out the last event of an aborted stream, which has no token, and with it the reason.
                finish=self._finish or Finish(FinishReason.ABORT),
                version_spans=self._version_spans(labels),
                routed_experts=self._routed_experts(num_prompt + self._num_output - 1),
                prompt_tokens=num_prompt,
                completion_tokens=self._num_output,
                cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
                num_retractions=0,
                meta_info={**self._choice_fields, **notes},
                reply_fields=self._reply_fields,
                versions_certain=self._versions is not None or (labels is not None and labels[0] == labels[1]),
            )
        except (LengthMismatch, ExpertsMismatch) as error:
            raise EngineProtocolError(f"{self.named}: {error.message}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineProtocolError(f"{self.named}: unreadable end ({type(error).__name__}: {error})") from error

    def _read(self, event: Mapping[str, Any]) -> GenerateChunk | None:
        self._usage = event.get("usage") or self._usage
        self._reply_fields |= {key: value for key, value in event.items() if key not in _KNOWN_TOP}
        self._check_prompt(event.get("prompt_token_ids"))
        choices = event["choices"]
        if not choices:
            return None
        (choice,) = choices
        if self.rows is not None:
            self.rows.note(choice.get("routed_experts"))
        self._check_prompt(choice.get("prompt_token_ids"))
        self._choice_fields |= {key: value for key, value in choice.items() if key not in _KNOWN_CHOICE}
        chunk = self._new_tokens(choice)
        if choice.get("finish_reason") is not None:
            self._finish = self._finished(choice)
            self._experts = choice.get("routed_experts")
            self._versions = choice.get("weight_versions")
        return chunk if len(chunk.token_ids) else None

    def _check_prompt(self, token_ids: Sequence[int] | None) -> None:
        if token_ids is not None and not np.array_equal(np.array(token_ids), self._request.token_ids):
            raise EngineProtocolError(
                f"{self.named}: the engine read other prompt ids than it was sent, {len(token_ids)} for "
                f"{len(self._request.token_ids)} (I1)"
            )

    def _new_tokens(self, choice: Mapping[str, Any]) -> GenerateChunk:
        fresh = choice.get("token_ids")
        if fresh is None:
            raise EngineProtocolError(f"{self.named}: an event without token ids (is this vLLM?)")
        token_ids = new_token_ids(fresh, named=self.named)
        if fresh and self._finish is not None:
            raise EngineProtocolError(f"{self.named}: tokens after the end")
        logprobs = self._new_logprobs(choice.get("logprobs"), fresh)
        top_logprobs = self._new_top_logprobs(choice.get("logprobs"), fresh, logprobs)
        self._num_output += len(fresh)
        self._last_token = int(fresh[-1]) if fresh else self._last_token
        return GenerateChunk(token_ids, logprobs, top_logprobs)

    def _new_logprobs(self, given: Any, fresh: list[int]) -> npt.NDArray[np.float32]:
        """float32[n]; NaN where the engine gave none (I9)."""
        if not fresh or given is None:
            return np.full(len(fresh), np.nan, dtype=np.float32)
        if "content" in given:
            values = [entry.get("logprob") for entry in given["content"]]
            if [_token_of(entry) for entry in given["content"]] != fresh:
                raise EngineProtocolError(f"{self.named}: log-probs are of other tokens than token_ids (I2)")
        else:
            values = given["token_logprobs"]
        if len(values) != len(fresh):
            raise EngineProtocolError(f"{self.named}: {len(values)} log-probs for {len(fresh)} new tokens (I2)")
        return np.array([np.nan if v is None or v <= _NO_LOGPROB else v for v in values], dtype=np.float32)

    def _new_top_logprobs(
        self, given: Any, fresh: list[int], logprobs: npt.NDArray[np.float32]
    ) -> tuple[tuple[TopLogprob, ...], ...]:
        """A row for each new token; () where none were asked for or the engine gave none (I9)."""
        wanted = self._request.num_top_logprobs
        if not fresh or not wanted or given is None:
            return ()
        if "content" in given:
            rows = [_generated_row(entry, wanted) for entry in given["content"]]
        else:
            rows = [None if row is None else _completed_row(row) for row in given.get("top_logprobs") or ()]
        return likeliest(rows, fresh, logprobs, most=wanted, named=self.named) if any(rows) else ()

    def _finished(self, choice: Mapping[str, Any]) -> Finish:
        """`stop_reason` names what matched, but not an end token of the model; 0.30 has no such field."""
        reason = _REASONS.get(choice["finish_reason"])
        if reason is None:
            raise EngineProtocolError(f"{self.named}: unknown finish reason {choice['finish_reason']!r}")
        matched = choice.get("stop_reason")
        if (
            matched is None
            and reason is FinishReason.STOP
            and self._last_token in self._request.sampling.stop_token_ids
        ):
            matched = self._last_token
        return Finish(reason, matched)

    def _check_counts(self, usage: Mapping[str, Any]) -> None:
        """An engine that counts otherwise than it streamed has lost something (I1, I2)."""
        expected = {"prompt_tokens": len(self._request.token_ids), "completion_tokens": self._num_output}
        for name, number in expected.items():
            if usage.get(name, number) != number:
                raise EngineProtocolError(f"{self.named}: the engine counts {usage[name]} {name}, we {number}")

    def _version_spans(self, labels: tuple[str, str] | None) -> tuple[VersionSpan, ...]:
        spans = self._versions
        if spans is None:
            if labels is None:
                raise EngineProtocolError(f"{self.named}: the answer does not say which weights sampled it (I5)")
            spans = [{"version": labels[0], "start": 0, "end": self._num_output}]
        return join_spans(
            VersionSpan(int(span["start"]), int(span["end"]), self._policy_version_of(str(span["version"])))
            for span in spans
        )

    def _routed_experts(self, stop: int) -> RoutedExperts | None:
        if self.rows is not None and self.rows.strayed:
            raise EngineProtocolError(f"{self.named}: a big routed_experts at an unknown place of an event")
        start = self._request.routed_experts_start
        if start is None or self._experts is None:
            return None  # I9: missing stays missing
        if self._routing is None:
            raise EngineProtocolError(f"{self.named}: routing came, but the model's routing shape is not known")
        try:
            if self.rows is not None and self._experts == self.rows.stand_in:
                return self.rows.rows(stop)
            return decode_routing(self._experts, self._routing, NpyLayout, start=start, stop=stop)
        except ExpertsMismatch as error:  # I9: tokens and log-probs are sound; that its rows are missing is counted
            _log.warning("%s: %s; the turn is recorded without routing rows", self.named, error.message)
            return None


def _generated_row(entry: Mapping[str, Any], wanted: int) -> Row:
    """The likeliest of one position, and among them the sampled token whatever its rank; 0.30 does not say ranks."""
    tops = [top for top in entry.get("top_logprobs") or () if (top.get("rank") or 1) <= wanted]
    row = [(_token_of(top), _known(top.get("logprob"))) for top in tops]
    sampled, *others = row or [(0, None)]
    # A server that grants no entry for the sampled token beside the likeliest: nobody can tell whether it is one.
    is_doubtful = "rank" not in entry and len(row) == wanted and all(_less(sampled, other) for other in others)
    return others if is_doubtful else row


def _completed_row(row: Mapping[str, float]) -> Row:
    """The same of `/v1/completions`, whose rows hold the sampled token beside the likeliest; None where a server names
    tokens by their texts all the same, which several may share."""
    if not all(name.startswith(_ID_MARK) for name in row):
        return None
    return [(_token_of({"token": name}), _known(logprob)) for name, logprob in row.items()]


def _less(one: tuple[int, float | None], other: tuple[int, float | None]) -> bool:
    return one[1] is None or (other[1] is not None and one[1] < other[1])


def _known(logprob: float | None) -> float | None:
    return None if logprob is None or logprob <= _NO_LOGPROB else logprob


def _token_of(entry: Mapping[str, Any]) -> int:
    """0.32 names the id, 0.30 spells it `token_id:17`."""
    token_id = entry.get("token_id")
    return int(entry["token"].removeprefix(_ID_MARK)) if token_id is None else int(token_id)
