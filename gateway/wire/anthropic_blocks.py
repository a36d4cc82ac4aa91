"""Anthropic's content blocks → messages as chat completions spell them.

One spelling for all dialects is what lets a session mix them: a turn that one dialect recorded is found by the other.
So a reply of ours, sent back as blocks, becomes the message that was recorded: its thinking is the reasoning, its texts
are one text, its `tool_use` blocks are the calls. Keys and blocks that chat completions have no word for stay beside
the message; only marks of the prompt cache go, for they come and go between calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.contracts.media import SENT_BLOCKS
from gateway.wire.fields import kind_of
from gateway.wire.json_text import dump_json

_CACHE_MARK = "cache_control"
_BILLING = "x-anthropic-billing-header:"
"""How Claude Code begins a system text that is meant for Anthropic's accounting: it differs from call to call."""

_SPELT = {
    "text": frozenset(("type", "text", _CACHE_MARK)),
    "thinking": frozenset(("type", "thinking", "signature", _CACHE_MARK)),
}
"""Keys of an assistant's blocks that a chat message can say. A signature says only that the block is unchanged."""


_DOCUMENT_KEYS = frozenset(("type", "source", "title", "context", "content"))


class System(NamedTuple):
    """The system message, or none; whether accounting texts were taken out of it."""

    messages: tuple[JsonValue, ...]
    had_billing: bool


def system_message(system: JsonValue) -> System:
    """The field `system`, a text or text blocks; raises InvalidRequest for anything else."""
    if system is None:
        return System((), had_billing=False)
    sent = [{"type": "text", "text": system}] if isinstance(system, str) else _blocks(system, "system")
    kept = [block for block in map(_without_billing, sent) if block is not None]
    content = _content(kept)
    return System(({"role": "system", "content": content},) if content else (), had_billing=kept != list(sent))


def chat_messages(sent: Sequence[Mapping[str, JsonValue]]) -> list[JsonValue]:
    """Messages of any shape that a template might read (I6); what it cannot read, it refuses in its own words.

    Raises InvalidRequest naming what is no message, or no block.
    """
    if not sent:
        raise InvalidRequest("messages: at least one message is needed")
    spelt: list[JsonValue] = []
    for i, message in enumerate(sent):
        at = f"messages[{i}]"
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{at}.role: expected a string, got {kind_of(message.get('role'))}")
        plain = {name: value for name, value in message.items() if name != _CACHE_MARK}
        content = message.get("content")
        if content is None or isinstance(content, str):
            spelt.append(plain)
            continue
        blocks = _blocks(content, f"{at}.content")
        spelt += [_assistant(plain, blocks)] if message["role"] == "assistant" else _user(plain, blocks, at)
    return spelt


def _without_billing(block: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
    """A block of the system text without a first line for Anthropic's accounting; None if that was all."""
    text = block.get("text")
    if not isinstance(text, str) or not text.startswith(_BILLING):
        return block
    rest = text.partition("\n")[2].lstrip("\n")
    return {**block, "text": rest} if rest else None


def _user(message: Mapping[str, JsonValue], blocks: Sequence[Mapping[str, JsonValue]], at: str) -> list[JsonValue]:
    """A user's blocks: results of tools first, as messages of their own; the others are one message behind them."""
    results = [_tool_result(block, at) for block in blocks if block.get("type") == "tool_result"]
    others = [block for block in blocks if block.get("type") != "tool_result"]
    if results and not others:
        unknown = {name: value for name, value in message.items() if name not in ("role", "content")}
        return [*results[:-1], results[-1] | unknown]
    return [*results, {**message, "content": _content(others)}]


def _tool_result(block: Mapping[str, JsonValue], at: str) -> dict[str, JsonValue]:
    """`is_error` stays beside the result where it is true: templates have no word for it."""
    content = block.get("content")
    if content is not None and not isinstance(content, str):
        content = _content(_blocks(content, f"{at}: tool_result.content"))
    known = ("type", "tool_use_id", "content", _CACHE_MARK)
    unknown = {name: value for name, value in block.items() if name not in known}
    if not unknown.get("is_error"):
        unknown.pop("is_error", None)
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content or "", **unknown}


def _assistant(message: Mapping[str, JsonValue], blocks: Sequence[Mapping[str, JsonValue]]) -> JsonValue:
    """An assistant's blocks as one message.

    Texts are joined without anything between them, as deltas are: where a reply went on after a call, the stream had
    a text block before that call and one behind it, and the record has one text (I3).
    """
    texts, thoughts = _texts(blocks, "text"), _texts(blocks, "thinking")
    calls = [_call(block) for block in blocks if block.get("type") == "tool_use"]
    spelt: dict[str, JsonValue] = {**message, "content": "".join(texts) if texts else None}
    if any(thoughts):
        spelt["reasoning_content"] = "".join(thoughts)
    if calls:
        spelt["tool_calls"] = calls
    return spelt if all(map(_is_spelt, blocks)) else spelt | {SENT_BLOCKS: [_unmarked(block) for block in blocks]}


def _call(block: Mapping[str, JsonValue]) -> JsonValue:
    arguments = dump_json(block.get("input") if block.get("input") is not None else {}).decode()
    call = {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments}}
    known = ("type", "id", "name", "input", _CACHE_MARK)
    return call | {name: value for name, value in block.items() if name not in known and value is not None}


def _texts(blocks: Sequence[Mapping[str, JsonValue]], kind: str) -> list[str]:
    """Texts of the blocks of a kind, which have them under its name."""
    return [block[kind] for block in blocks if block.get("type") == kind and isinstance(block.get(kind), str)]


def _is_spelt(block: Mapping[str, JsonValue]) -> bool:
    """Whether a chat message can say all of an assistant's block."""
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _SPELT:
        return kind == "tool_use"
    return isinstance(block.get(kind), str) and all(name in _SPELT[kind] or block[name] is None for name in block)


def _content(blocks: Sequence[Mapping[str, JsonValue]]) -> JsonValue:
    """Blocks as chat content: one text is a text, others are parts."""
    parts = [_part(block) for block in blocks]
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        return parts[0]["text"]
    return parts


def _part(block: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Texts, images and plain-text documents as chat parts; what chat completions have no part for stays as it is."""
    part = _unmarked(block)
    kind, source = part.get("type"), part.get("source")
    if kind == "image" and isinstance(source, dict) and (reference := _reference(source)) is not None:
        unknown = {name: value for name, value in part.items() if name not in ("type", "source")}
        return {"type": "image_url", "image_url": {"url": reference}, **unknown}
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return _text_part(part, (part.get("title"), part.get("context"), source.get("data")))
    if kind == "search_result" and isinstance(part.get("content"), list):
        texts = [item.get("text") for item in part["content"] if isinstance(item, dict)]
        return _text_part(part, (part.get("title"), source, *texts))
    return part


def _reference(source: Mapping[str, JsonValue]) -> JsonValue:
    """Where an image is, or itself as a data URL; None for a file at Anthropic's."""
    if source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    return source.get("url") if source.get("type") == "url" else None


def _text_part(part: Mapping[str, JsonValue], texts: Sequence[JsonValue]) -> dict[str, JsonValue]:
    """A document's texts, a line each: templates show no other documents."""
    unknown = {name: value for name, value in part.items() if name not in _DOCUMENT_KEYS}
    return {"type": "text", "text": "\n".join(text for text in texts if isinstance(text, str) and text), **unknown}


def _unmarked(block: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Without the mark of the prompt cache, and without the null that clients write where a text cites nothing."""
    marks = (_CACHE_MARK, *(("citations",) if block.get("citations") is None else ()))
    return {name: value for name, value in block.items() if name not in marks}


def _blocks(content: JsonValue, at: str) -> Sequence[Mapping[str, JsonValue]]:
    if not isinstance(content, list):
        raise InvalidRequest(f"{at}: expected a text or a list of blocks, got {kind_of(content)}")
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise InvalidRequest(f"{at}[{i}]: expected a block, got {kind_of(block)}")
        if block.get("type") == "text" and not isinstance(block.get("text"), str):
            raise InvalidRequest(f"{at}[{i}].text: expected a string, got {kind_of(block.get('text'))}")
    return content
