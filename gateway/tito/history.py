"""Whether a new turn's full render still shows the history that the last prompt was made of, and if not, why."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.conversation import Conversation
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.template import REASONING_KEYS, ChatTemplate


class History(Enum):
    """KEPT: the render starts with the last prompt's. Else it would rewrite it, by its reasoning alone or not."""

    KEPT = "kept"
    REASONING_DROPPED = "reasoning_dropped"
    REWRITTEN = "rewritten"


@dataclass(frozen=True, slots=True)
class _Prefix:
    length: int
    digest: bytes


class RenderedPrompts:
    """For prompts given out, what the template's render of them was: its length and digest, not its text.

    A cache that saves one render a turn: what it forgets, or never saw (a restart), is rendered again. Bounded.
    """

    def __init__(self, *, max_entries: int = 16_384) -> None:
        self._max_entries = max_entries
        self._prefixes: OrderedDict[bytes, _Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, prompt_ids: TokenIds, text: str) -> None:
        """Note that `text` was the full render when `prompt_ids`, int32[T], was the prompt."""
        prefix = _Prefix(len(text), _digest(text.encode(errors="surrogatepass")))
        with self._lock:
            self._prefixes[_digest(prompt_ids.tobytes())] = prefix
            if len(self._prefixes) > self._max_entries:
                self._prefixes.popitem(last=False)

    def length_in(self, prompt_ids: TokenIds, text: str) -> int | None:
        """The length of the render of `prompt_ids` if `text` starts with it; None also where it is unknown."""
        with self._lock:
            prefix = self._prefixes.get(_digest(prompt_ids.tobytes()))
        if prefix is None or len(text) < prefix.length:
            return None
        starts = _digest(text[: prefix.length].encode(errors="surrogatepass")) == prefix.digest
        return prefix.length if starts else None


def compare_history(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    num_messages: int,
    full_text: str,
    end: str,
    reasoning: ReasoningMarkers | None,
    past_length: int | None = None,
) -> History:
    """Hold the full render against a render of the messages before reply `num_messages - 1`, and against that reply.

    end: what the full render ends with, from the reply's stop token on. past_length: of the render of the past, where
    it is known that the full render starts with it.
    The rewrite is by reasoning alone if it vanishes when nobody has any. The opening of the sampled turn itself
    (`<think>` by the generation prompt, gone in history) counts as reasoning: recorded tokens stand there in any case.
    """
    past = replace(conversation, messages=conversation.messages[: num_messages - 1])
    try:
        if past_length is None:
            past_text = template.render(past)
            past_length = len(past_text) if full_text.startswith(past_text) else None
        if past_length is not None:
            reply_text = full_text[past_length : max(past_length, len(full_text) - len(end))]
            shown = _shows_reasoning(conversation.messages[num_messages - 1], reply_text)
            return History.KEPT if shown else History.REASONING_DROPPED
        if reasoning is None:
            bare_past = template.render(past, add_generation_prompt=False)
            return History.REASONING_DROPPED if full_text.startswith(bare_past) else History.REWRITTEN
        without = _without_reasoning(conversation, reasoning)
        past = replace(without, messages=without.messages[: num_messages - 1])
        bare_past = _without_empty_blocks(template.render(past, add_generation_prompt=False), reasoning)
        bare_full = _without_empty_blocks(template.render(without), reasoning)
    except TemplateRaised:
        return History.REWRITTEN
    return History.REASONING_DROPPED if bare_full.startswith(bare_past) else History.REWRITTEN


def _shows_reasoning(reply: Mapping[str, JsonValue], reply_text: str) -> bool:
    """Whether a reply's own reasoning is in its render, besides what its text and calls may repeat of it."""
    thought = next((reply[key] for key in REASONING_KEYS if reply.get(key)), None)
    if not isinstance(thought, str) or not thought.strip():
        return True
    visible = json.dumps([reply.get("content"), reply.get("tool_calls")], ensure_ascii=False)
    return reply_text.count(thought.strip()) > visible.count(thought.strip())


def _without_reasoning(conversation: Conversation, reasoning: ReasoningMarkers) -> Conversation:
    return replace(
        conversation, messages=tuple(_message_without_reasoning(m, reasoning) for m in conversation.messages)
    )


def _message_without_reasoning(message: JsonValue, reasoning: ReasoningMarkers) -> JsonValue:
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = bare.get("content")
    if isinstance(content, str) and reasoning.closer.text in content:
        bare["content"] = content.rpartition(reasoning.closer.text)[2].lstrip("\n")
    return bare


def _without_empty_blocks(text: str, reasoning: ReasoningMarkers) -> str:
    """Some templates write an empty block where there is no reasoning, and only in some turns; with it go newlines."""
    block = rf"{re.escape(reasoning.opening)}\s*{re.escape(reasoning.closer.text)}\n*"
    return re.sub(r"\n+", "\n", re.sub(block, "", text))


def _digest(content: bytes) -> bytes:
    # Processors have instructions for it: two to three times as fast as blake2b, over whole histories with each turn.
    return hashlib.sha256(content).digest()[:16]
