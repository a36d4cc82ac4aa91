"""OpenAI's responses, the answering side: a reply as output items, and the events of its stream.

A reply that is whole is one reasoning item, one message and its function calls. In a stream an item ends where the next
one begins, so that text which goes on after a call is a message of its own; the last event holds the items as they were
streamed. The stream ends with `response.completed`, `response.incomplete` or `response.failed`, and nothing after it.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from gateway.contracts.errors import EngineError, VerbatimError
from gateway.contracts.generation import FinishReason, JsonValue, TokenIds
from gateway.contracts.replies import ContentDelta, ReasoningDelta, ReplyDelta, ToolCall, ToolCallDelta
from gateway.wire import sse
from gateway.wire.openai import experts_body, logprob_entries
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.request import TurnRequest, Wanted
from gateway.wire.responses import SEALED_REASONING, flat_tools, item_id, response_id, seal


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a response says again of its request. fields: as they were sent. tools: as chat spells them."""

    instructions: str | None
    fields: Mapping[str, JsonValue]
    tools: Sequence[JsonValue]
    wanted: Wanted

    @classmethod
    def by(cls, turn: TurnRequest, instructions: str | None) -> Asked:
        """Of a request that is about to run."""
        return cls(instructions, turn.kept["fields"], turn.tools, turn.wanted)


class ResponsesWriter:
    """`response` objects and their events; captured arrays are in them only where asked for (I7)."""

    def __init__(self, asked: Asked, turn_id: str, model: str, *, created_at: float | None = None) -> None:
        self._asked = asked
        self._turn_id = turn_id
        self._head = _head(asked, turn_id, model, int(time.time() if created_at is None else created_at))
        self._seals = SEALED_REASONING in asked.fields.get("include", ())
        self._sequence_number = 0
        self._done: list[JsonValue] = []
        self._open: _Item | None = None
        self._last: dict[str, JsonValue] = {}
        self._unshown: list[JsonValue] = []
        self._unshown_texts: list[str] = []

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """The whole response."""
        choice = choices[0]
        status = _status(choice)
        items = self._items(choice)
        bodies = [item.body("completed") for item in items[:-1]] + [items[-1].body(status)]
        return self._finished(choice, bodies)

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """The response begins; the prompt's ids come with the whole response only."""
        yield self._event("response.created", response=self._head)
        yield self._event("response.in_progress", response=self._head)

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """More of the item that is open, or of new ones."""
        if self._asked.wanted.logprobs:
            self._unshown += logprob_entries(tokens)
            self._unshown_texts += tokens.texts
        for delta in deltas:
            if self._open is None or not self._open.takes(delta):
                yield from self._close("completed")
                yield from self._begin(self._item_of(delta))
            yield from self._add(delta)

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """The last item ends; a reply without text and calls gets an empty message, or clients would not replay it."""
        is_silent = isinstance(self._open, _Reasoning | None) and not any(
            item["type"] != "reasoning" for item in self._done
        )
        if is_silent:
            yield from self._close("completed")
            yield from self._begin(_Message(self._next_id("msg")))
        yield from self._close(_status(choice))

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """The response as a whole."""
        response = self._finished(choices[0], self._done)
        kind = f"response.{response['status']}"
        value = {"type": kind, "sequence_number": self._sequence_number, "response": response}
        yield from sse.event_pieces(value, kind=kind)

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """What is wrong, and the response as far as it came."""
        yield from self._close("incomplete")
        yield self._event("error", code=error.code, message=error.message, param=None)
        yield self._event("response.failed", response={**self._head, "output": self._done} | _failed(error))

    def _items(self, choice: FinishedChoice) -> list[_Item]:
        """A whole reply as items; at least a message."""
        reply, items = choice.reply, list[_Item]()
        if reply.reasoning:
            items.append(_Reasoning(item_id("rs", self._turn_id, 0), [reply.reasoning], self._seals))
        if reply.content or not reply.tool_calls:
            text = reply.content or ""
            logprobs = self._logprobs(text, choice)
            items.append(_Message(item_id("msg", self._turn_id, len(items)), [text], logprobs))
        for call in reply.tool_calls:
            items.append(_Call(item_id("fc", self._turn_id, len(items)), call.call_id, call.name, [call.arguments]))
        return items

    def _logprobs(self, text: str, choice: FinishedChoice) -> list[JsonValue]:
        """Of the text's tokens; where their texts do not show which those are, of all after the reasoning."""
        if not self._asked.wanted.logprobs or not text:
            return []
        texts = choice.tokens.texts[choice.usage.reasoning_tokens :]
        visible = logprob_entries(choice.tokens)[choice.usage.reasoning_tokens :]
        start, stop = _position(text, texts) or (0, len(visible))
        return visible[start:stop]

    def _item_of(self, delta: ReplyDelta) -> _Item:
        if isinstance(delta, ReasoningDelta):
            return _Reasoning(self._next_id("rs"), [], self._seals)
        if isinstance(delta, ContentDelta):
            return _Message(self._next_id("msg"))
        return _Call(self._next_id("fc"), delta.call_id or "", delta.name or "", [], delta.index)

    def _next_id(self, prefix: str) -> str:
        return item_id(prefix, self._turn_id, len(self._done))

    def _begin(self, item: _Item) -> Iterator[bytes]:
        self._open = item
        yield self._event("response.output_item.added", output_index=len(self._done), item=item.body("in_progress"))
        if (part := item.part()) is not None:
            yield self._item_event(item, "response.content_part.added", content_index=0, part=part)

    def _add(self, delta: ReplyDelta) -> Iterator[bytes]:
        item = self._open
        logprobs = self._take_logprobs(delta.arguments if isinstance(delta, ToolCallDelta) else delta.text)
        if isinstance(item, _Reasoning) and isinstance(delta, ReasoningDelta):
            item.texts.append(delta.text)
            yield self._item_event(item, "response.reasoning_text.delta", content_index=0, delta=delta.text)
        elif isinstance(item, _Message) and isinstance(delta, ContentDelta):
            item.texts.append(delta.text)
            item.logprobs.extend(logprobs)
            fields = {"content_index": 0, "delta": delta.text, "logprobs": logprobs}
            yield self._item_event(item, "response.output_text.delta", **fields)
        elif isinstance(item, _Call) and isinstance(delta, ToolCallDelta) and delta.arguments:
            item.texts.append(delta.arguments)
            yield self._item_event(item, "response.function_call_arguments.delta", delta=delta.arguments)

    def _take_logprobs(self, text: str) -> list[JsonValue]:
        """Those of the tokens that `text` is made of; tokens before them were markup."""
        if not self._unshown:
            return []
        start, stop = _position(text, self._unshown_texts) or (0, len(self._unshown))
        taken, self._unshown = self._unshown[start:stop], self._unshown[stop:]
        self._unshown_texts = self._unshown_texts[stop:]
        return taken

    def _close(self, status: str) -> Iterator[bytes]:
        item, self._open = self._open, None
        if item is None:
            return
        yield from (self._item_event(item, name, **fields) for name, fields in item.last_events())
        body = item.body(status)
        yield self._event("response.output_item.done", output_index=len(self._done), item=body)
        self._done.append(body)

    def _item_event(self, item: _Item, kind: str, **fields: JsonValue) -> bytes:
        return self._event(kind, item_id=item.id, output_index=len(self._done), **fields)

    def _event(self, kind: str, **fields: JsonValue) -> bytes:
        value = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: " + kind.encode() + b"\n" + sse.event(value)

    def _finished(self, choice: FinishedChoice, output: Sequence[JsonValue]) -> dict[str, JsonValue]:
        status, wanted = _status(choice), self._asked.wanted
        body: dict[str, JsonValue] = {**choice.reply_fields, **self._head, "status": status, "output": output}
        body["usage"] = _usage(choice.usage)
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if choice.meta_info:
            body["meta_info"] = choice.meta_info
        if wanted.token_ids:
            body["prompt_token_ids"] = choice.prompt_token_ids.tolist()
            body["token_ids"] = choice.tokens.token_ids.tolist()
            if wanted.logprobs:
                body["logprobs"] = {"content": logprob_entries(choice.tokens), "refusal": None}
        if wanted.routed_experts:
            body["routed_experts"] = None if choice.experts is None else experts_body(choice.experts)
        return body


def _failed(error: VerbatimError) -> dict[str, JsonValue]:
    """Status and error of a response that broke off."""
    code = "server_error" if isinstance(error, EngineError) or error.http_status >= 500 else error.code
    return {"status": "failed", "error": {"code": code, "message": error.message}}


class _Item(Protocol):
    """An output item under way."""

    @property
    def id(self) -> str: ...

    def takes(self, delta: ReplyDelta) -> bool:
        """Whether a delta is more of it."""
        ...

    def body(self, status: str) -> dict[str, JsonValue]:
        """The item as far as it is known."""
        ...

    def part(self) -> dict[str, JsonValue] | None:
        """Its one content part, None for an item without parts."""
        ...

    def last_events(self) -> Sequence[tuple[str, dict[str, JsonValue]]]:
        """What is said of it before it is done."""
        ...


@dataclass(slots=True)
class _Reasoning:
    id: str
    texts: list[str]
    is_sealed: bool

    def takes(self, delta: ReplyDelta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def body(self, status: str) -> dict[str, JsonValue]:
        content = [self.part()] if self.texts else []
        body: dict[str, JsonValue] = {"id": self.id, "type": "reasoning", "summary": [], "content": content}
        if self.is_sealed:
            body["encrypted_content"] = seal("".join(self.texts)) if self.texts else None
        return body | {"status": status}

    def part(self) -> dict[str, JsonValue]:
        return {"type": "reasoning_text", "text": "".join(self.texts)}

    def last_events(self) -> Sequence[tuple[str, dict[str, JsonValue]]]:
        return (
            ("response.reasoning_text.done", {"content_index": 0, "text": "".join(self.texts)}),
            ("response.content_part.done", {"content_index": 0, "part": self.part()}),
        )


@dataclass(slots=True)
class _Message:
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[JsonValue] = field(default_factory=list)

    def takes(self, delta: ReplyDelta) -> bool:
        return isinstance(delta, ContentDelta)

    def body(self, status: str) -> dict[str, JsonValue]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self) -> dict[str, JsonValue]:
        return {"type": "output_text", "text": "".join(self.texts), "annotations": [], "logprobs": self.logprobs}

    def last_events(self) -> Sequence[tuple[str, dict[str, JsonValue]]]:
        text = {"content_index": 0, "text": "".join(self.texts), "logprobs": self.logprobs}
        return (
            ("response.output_text.done", text),
            ("response.content_part.done", {"content_index": 0, "part": self.part()}),
        )


@dataclass(slots=True)
class _Call:
    id: str
    call_id: str
    name: str
    texts: list[str]
    index: int = 0

    def takes(self, delta: ReplyDelta) -> bool:
        return isinstance(delta, ToolCallDelta) and delta.index == self.index

    def body(self, status: str) -> dict[str, JsonValue]:
        call = ToolCall(self.call_id, self.name, "".join(self.texts))
        named = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        return {"id": self.id, "type": "function_call", **named, "status": status}

    def part(self) -> None:
        return None

    def last_events(self) -> Sequence[tuple[str, dict[str, JsonValue]]]:
        return (("response.function_call_arguments.done", {"arguments": "".join(self.texts)}),)


def _head(asked: Asked, turn_id: str, model: str, created_at: int) -> dict[str, JsonValue]:
    """All fields of a response that has not yet begun. `truncation`: nothing is ever dropped from an input here."""
    fields = asked.fields
    return {
        "id": response_id(turn_id),
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": fields.get("max_tool_calls"),
        "metadata": fields.get("metadata", {}),
        "model": fields.get("model", model),
        "output": [],
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": fields.get("previous_response_id"),
        "prompt_cache_key": fields.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None} | fields.get("reasoning", {}),
        "safety_identifier": fields.get("safety_identifier"),
        "store": fields.get("store", True),
        "temperature": fields.get("temperature", 1.0),
        "text": {"format": {"type": "text"}} | fields.get("text", {}),
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": flat_tools(asked.tools),
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": fields.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
        "user": fields.get("user"),
    }


def _status(choice: FinishedChoice) -> str:
    return "completed" if choice.finish.reason is FinishReason.STOP else "incomplete"


def _usage(usage: Usage) -> dict[str, JsonValue]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _position(text: str, tokens: Sequence[str]) -> tuple[int, int] | None:
    """Which tokens' texts `text` is made of, [start, stop); None if their texts do not hold it.

    Text that begins with a token is meant before text inside of one, for markup holds letters too.
    """
    ends = list(accumulate(map(len, tokens)))
    joined = "".join(tokens)
    begin = next((at for at in (0, *ends[:-1]) if joined.startswith(text, at)), joined.find(text))
    if begin < 0:
        return None
    return bisect_right(ends, begin), bisect_left(ends, begin + len(text)) + 1
