"""What a turn says as Anthropic's `message`, whole or as its stream of events, and errors in Anthropic's shape.

Blocks come in the order in which their text is sampled: a whole reply is thinking, text, calls; a stream opens a new
block wherever the kind changes. Sent back, both become the same recorded message (see `anthropic_blocks`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gateway.contracts.errors import (
    ContextOverflow,
    EngineTimeout,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    LedgerError,
    NotFound,
    PayloadTooLarge,
    RequestError,
    TooManyRequests,
    Unauthorized,
    UnknownPrevious,
    VerbatimError,
)
from gateway.contracts.generation import FinishReason, JsonValue, TokenIds
from gateway.contracts.replies import ContentDelta, ReasoningDelta, ReplyDelta, ToolCall, ToolCallDelta
from gateway.wire import sse
from gateway.wire.errors import shown_message
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import experts_body
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.request import Wanted

_NOT_STOPPED: dict[str, JsonValue] = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
_OVERLOADED_STATUS = 529
_ERROR_TYPES: tuple[tuple[type[VerbatimError], str], ...] = (
    (Unauthorized, "authentication_error"),
    (Forbidden, "permission_error"),
    (NotFound, "not_found_error"),
    (UnknownPrevious, "not_found_error"),
    (TooManyRequests, "rate_limit_error"),
    (PayloadTooLarge, "request_too_large"),
    (EngineTimeout, "timeout_error"),
    (EngineUnavailable, "overloaded_error"),
    (LedgerError, "overloaded_error"),
    (RequestError, "invalid_request_error"),
)


@dataclass(slots=True)
class _OpenBlock:
    """The block of a stream that is being written. call: index of a tool call, None for text and thinking."""

    index: int
    kind: str
    call: int | None = None
    thoughts: list[str] = field(default_factory=list)


class MessagesWriter:
    """A `message` or its events; captured arrays are in it only where asked for (I7).

    shows_thinking: False leaves the text of thinking out; its block and signature stay.
    """

    def __init__(self, wanted: Wanted, turn_id: str, model: str, *, shows_thinking: bool = True) -> None:
        self._wanted = wanted
        self._shows_thinking = shows_thinking
        self._head = {"id": f"msg_{turn_id}", "type": "message", "role": "assistant", "model": model}
        self._block: _OpenBlock | None = None
        self._num_blocks = 0

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """The whole reply."""
        [choice] = choices
        body = {**choice.reply_fields, **self._head, "content": self._content(choice), **_stop(choice)}
        body |= {"usage": _usage(choice.usage)} | _closing_fields(choice, self._wanted)
        return body | ({"prompt_token_ids": choice.prompt_token_ids.tolist()} if self._wanted.token_ids else {})

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """`message_start`: an empty message; how much of the prompt was cached is not known yet."""
        usage = _usage(Usage(len(prompt_token_ids), 0, 0, 0))
        message: dict[str, JsonValue] = {**self._head, "content": [], **_NOT_STOPPED, "usage": usage}
        if self._wanted.token_ids:
            message["prompt_token_ids"] = prompt_token_ids.tolist()
        yield _event("message_start", {"message": message})
        yield _event("ping", {})

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """Deltas of the open block; another kind of text, or another call, closes it and opens the next."""
        for delta in deltas:
            if not isinstance(delta, ToolCallDelta) and not delta.text:
                continue
            yield from self._turn_to(delta)
            yield from self._delta(delta)

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """`message_delta`: why it ended, and all counts."""
        yield from self._close()
        ending = {"delta": _stop(choice), "usage": _usage(choice.usage), **_closing_fields(choice, self._wanted)}
        fields = {**choice.reply_fields, **ending, "type": "message_delta"}
        yield from sse.event_pieces(fields, kind="message_delta")

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """`message_stop`."""
        yield _event("message_stop", {})

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """An error after the first token: an event of its own, and no end."""
        yield _event("error", {"error": error_body(error)["error"]})

    def _content(self, choice: FinishedChoice) -> list[JsonValue]:
        reply, blocks = choice.reply, []
        if reply.reasoning:
            shown = reply.reasoning if self._shows_thinking else ""
            blocks.append({"type": "thinking", "thinking": shown, "signature": _signature(reply.reasoning)})
        if reply.content:
            blocks.append({"type": "text", "text": reply.content})
        return [*blocks, *map(_tool_use, reply.tool_calls)]

    def _turn_to(self, delta: ReplyDelta) -> Iterator[bytes]:
        """Have the block open that a delta belongs to."""
        kind, call = _place(delta)
        if self._block is not None and (self._block.kind, self._block.call) == (kind, call):
            return
        yield from self._close()
        self._block = _OpenBlock(self._num_blocks, kind, call)
        self._num_blocks += 1
        yield _event("content_block_start", {"index": self._block.index, "content_block": _beginning(delta)})

    def _delta(self, delta: ReplyDelta) -> Iterator[bytes]:
        if isinstance(delta, ContentDelta):
            yield self._block_delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, ToolCallDelta):
            yield self._block_delta({"type": "input_json_delta", "partial_json": delta.arguments})
        else:
            if self._block is not None:
                self._block.thoughts.append(delta.text)
            if self._shows_thinking:
                yield self._block_delta({"type": "thinking_delta", "thinking": delta.text})

    def _close(self) -> Iterator[bytes]:
        if self._block is None:
            return
        if self._block.kind == "thinking":
            signature = _signature("".join(self._block.thoughts))
            yield self._block_delta({"type": "signature_delta", "signature": signature})
        yield _event("content_block_stop", {"index": self._block.index})
        self._block = None

    def _block_delta(self, delta: JsonValue) -> bytes:
        return _event("content_block_delta", {"index": self._num_blocks - 1, "delta": delta})


def error_body(error: VerbatimError) -> dict[str, JsonValue]:
    """`{"type": "error", "error": {type, message}}` as Anthropic spells it."""
    kind = next((name for known, name in _ERROR_TYPES if isinstance(error, known)), "api_error")
    if error.http_status == 409:
        kind = "conflict_error"
    # These words are what agents on this API look for; ours, behind them, name both lengths.
    message = shown_message(error)
    if isinstance(error, ContextOverflow):
        message = f"prompt is too long: {message}"
    body: dict[str, JsonValue] = {"type": kind, "message": message}
    if isinstance(error, UnknownPrevious):  # which has clients send the whole conversation again
        body["details"] = {"error_code": "thread_not_found"}
    return {"type": "error", "error": body}


def error_status(error: VerbatimError) -> int:
    """The HTTP status: ours, but 529 for what Anthropic calls overloaded, and 404 for a thread that is not here."""
    if isinstance(error, UnknownPrevious):
        return NotFound.http_status
    return _OVERLOADED_STATUS if isinstance(error, EngineUnavailable | LedgerError) else error.http_status


def _event(kind: str, fields: dict[str, JsonValue]) -> bytes:
    return b"event: " + kind.encode() + b"\n" + sse.event({**fields, "type": kind})


def _place(delta: ReplyDelta) -> tuple[str, int | None]:
    if isinstance(delta, ToolCallDelta):
        return "tool_use", delta.index
    return ("thinking" if isinstance(delta, ReasoningDelta) else "text"), None


def _beginning(delta: ReplyDelta) -> JsonValue:
    if isinstance(delta, ToolCallDelta):
        return {"type": "tool_use", "id": delta.call_id, "name": delta.name, "input": {}}
    if isinstance(delta, ReasoningDelta):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _tool_use(call: ToolCall) -> JsonValue:
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": _arguments(call.arguments)}


def _arguments(text: str) -> dict[str, JsonValue]:
    """As an object; text that is none, or holds a number that no client could read, is one field of one."""
    try:
        return load_json_object(text.encode("utf-8", "surrogatepass"))
    except InvalidRequest:
        return {"arguments": text}


def _signature(thoughts: str) -> str:
    """Anthropic's clients expect one and send it back. Nothing rests on it: the record knows what was thought."""
    return base64.b64encode(hashlib.sha256(thoughts.encode("utf-8", "surrogatepass")).digest()).decode("ascii")


def _stop(choice: FinishedChoice) -> dict[str, JsonValue]:
    finish = choice.finish
    if finish.reason is not FinishReason.STOP:
        return _NOT_STOPPED | {"stop_reason": "max_tokens"}
    if isinstance(finish.matched, str):
        return _NOT_STOPPED | {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    return _NOT_STOPPED | {"stop_reason": "tool_use" if choice.reply.tool_calls else "end_turn"}


def _usage(usage: Usage) -> dict[str, JsonValue]:
    """Anthropic counts cached tokens apart: the prompt is `input_tokens` and `cache_read_input_tokens` together."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _closing_fields(choice: FinishedChoice, wanted: Wanted) -> dict[str, JsonValue]:
    """Captured arrays that were asked for, and what the engine added (I8)."""
    fields: dict[str, JsonValue] = {}
    if wanted.token_ids:
        fields["token_ids"] = choice.tokens.token_ids.tolist()
    if wanted.routed_experts:
        fields["routed_experts"] = None if choice.experts is None else experts_body(choice.experts)
    if choice.meta_info:
        fields["meta_info"] = choice.meta_info
    return fields
