"""Openings: what the first prompts of many conversations have in common, rendered and spelled once.

The rollouts of an environment begin with the same tools and system prompt, and differ in the text of their last
message, a user's. Of such conversations the render begins with the same text (the *head*) up to a control token, and
goes on with a frame around the user's text (`frames`). The ids of the head are kept; only the rest is spelled.

    <|im_start|>system … tools … <|im_end|>\\n      <|im_start|>user\\n   task   <|im_end|>\\n<|im_start|>assistant\\n
    ╰────────── head: ids kept ─────────────╯      ╰────────────── rest: filled in and spelled ──────────────╯

An opening is learned off the hot path, from the conversations' own tools and messages, once as many prompts have begun
with it as it takes renders to learn: so learning never costs more than was spent without it. It is kept only if head
and rest give the ids of the whole render for a score of awkward texts, and it is silent about texts for which frames
are. As with certificates that is evidence and no proof; the audit (`prompt`) builds some prompts the long way too.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import orjson
from msgspec import Struct

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.certificate import is_audited
from gateway.tito.conversation import Conversation
from gateway.tito.frames import NUM_TRIED, Frame, TextPath, fitted_frame, with_text
from gateway.tito.junction import unseen_messages
from gateway.tito.lookalikes import AnyOf, LookalikeGuard
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

NUM_USES_BEFORE = NUM_TRIED + 2
"""As many as learning takes renders."""

_MAX_MESSAGES = 8
_MAX_KEY_BYTES = 262_144
_MAX_KEPT_BYTES = 16 * 2**20
_MAX_COUNTED = 1_024
_MAX_PENDING = 4
_SENTINEL = "Opening sentinel 7f3a"


class OpenedPrompt(Struct, frozen=True, eq=False):
    """A whole prompt: the ids of its head, int32[H], and the text that follows it, which is to be spelled.

    key: of its opening (`Openings.withdraw`). is_audited: whether it should be.
    """

    key: bytes
    head: str
    head_ids: TokenIds
    rest: str
    is_audited: bool

    @property
    def text(self) -> str:
        """What the template would have rendered."""
        return self.head + self.rest


@dataclass(slots=True, eq=False)
class _Opening:
    """frame: of what follows the head, None where none was found, or it was wrong."""

    head: str
    head_ids: TokenIds
    frame: Frame | None
    num_bytes: int
    num_uses: int = 0


class Openings:
    """The openings of one template and vocabulary: counted, learned, withdrawn. Bounded, safe between threads.

    untold: texts of which a certificate does not speak (`short_path`).
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: ChatTokenizer, guard: LookalikeGuard, *, untold: AnyOf
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._guard = guard
        self._untold = untold
        self._known: OrderedDict[bytes, _Opening] = OrderedDict()
        self._num_kept_bytes = 0
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._pending: OrderedDict[bytes, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def has_pending(self) -> bool:
        """Whether `learn_next` has something to do."""
        return bool(self._pending)

    def find(self, conversation: Conversation) -> OpenedPrompt | None:
        """The prompt of a conversation without a recorded turn, if its opening is known and speaks for its text."""
        parted = _parted(conversation)
        if parted is None:
            return None
        key, text = parted
        with self._lock:
            opening = self._known.get(key)
            if opening is None:
                self._count(key, conversation)
                return None
            self._known.move_to_end(key)
        if opening.frame is None or self._untold.are_in(text):
            return None
        rest = opening.frame.fill(conversation.messages[-1:])
        if rest is None:
            return None
        with self._lock:
            opening.num_uses += 1
            return OpenedPrompt(key, opening.head, opening.head_ids, rest, is_audited(opening.num_uses))

    def withdraw(self, key: bytes) -> None:
        """Never rely on this opening again."""
        with self._lock:
            if key in self._known:
                self._known[key].frame = None

    def learn_next(self) -> bool:
        """Learn one opening that was met often enough (some twenty renders); whether there was one."""
        with self._lock:
            if not self._pending:
                return False
            key, conversation = next(iter(self._pending.items()))
        opening = self._learned(conversation, len(key))
        with self._lock:
            del self._pending[key]
            self._known[key] = opening
            self._num_kept_bytes += opening.num_bytes
            while self._num_kept_bytes > _MAX_KEPT_BYTES:
                _, oldest = self._known.popitem(last=False)
                self._num_kept_bytes -= oldest.num_bytes
        return True

    def _count(self, key: bytes, conversation: Conversation) -> None:
        """Under the lock."""
        digest = hashlib.blake2b(key, digest_size=16).digest()
        count = self._counts.pop(digest, 0) + 1
        if count >= NUM_USES_BEFORE and len(self._pending) < _MAX_PENDING:
            self._pending.setdefault(key, conversation)
            return
        self._counts[digest] = count
        if len(self._counts) > _MAX_COUNTED:
            self._counts.popitem(last=False)

    def _learned(self, conversation: Conversation, num_key_bytes: int) -> _Opening:
        head = self._head(conversation)
        if head is None:
            return _Opening("", np.zeros(0, dtype=np.int32), None, num_key_bytes)
        head_ids = self._tokenizer.encode_surely(head)
        last = conversation.messages[-1]

        def rest_of(messages: Sequence[JsonValue]) -> str | None:
            try:
                text = self._template.render(_ending_with(conversation, messages[0]))
            except TemplateRaised:
                return None
            rest = text.removeprefix(head)
            ids = np.concatenate([head_ids, self._tokenizer.encode(rest)])
            # Unequal too where the render does not begin with the head, so that nothing was removed.
            return rest if np.array_equal(ids, self._tokenizer.encode(text)) else None

        frame = fitted_frame(self._template, [last], [((0, *_place_of_text(last)), "")], rest_of)
        return _Opening(head, head_ids, frame, num_key_bytes + len(head) + head_ids.nbytes)

    def _head(self, conversation: Conversation) -> str | None:
        """What stands before the control token that the last message's text comes behind; None where its ids, or what
        the model is not shown, might depend on that text."""
        last = conversation.messages[-1]
        probe = _ending_with(conversation, with_text(last, _place_of_text(last), _SENTINEL))
        if self._template.tells_time or self._guard.guard(probe).brackets is not None:
            return None
        try:
            text = self._template.render(probe)
        except TemplateRaised:
            return None
        before, found, _ = text.partition(_SENTINEL)
        starts = [match.start() for match in self._guard.control.pattern.finditer(before)]
        if not found or not starts or not starts[-1] or unseen_messages(self._template, probe, text):
            return None
        return before[: starts[-1]]


def _parted(conversation: Conversation) -> tuple[bytes, str] | None:
    """What tells openings apart (all but the last message's text, as JSON), and that text; None for other endings."""
    messages = conversation.messages
    if not 0 < len(messages) <= _MAX_MESSAGES:
        return None
    last = messages[-1]
    if type(last) is not dict or last.get("role") != "user":
        return None
    place = _place_of_text(last)
    text = last.get("content") if place == ("content",) else last["content"][0].get("text")
    if type(text) is not str or not text or text.isspace():
        return None
    like = (messages[:-1], with_text(last, place, ""), conversation.tools, dict(conversation.template_arguments))
    try:
        key = orjson.dumps(like)
    except orjson.JSONEncodeError:  # halves of surrogate pairs, integers beyond 64 bits
        return None
    return (key, text) if len(key) <= _MAX_KEY_BYTES else None


def _place_of_text(message: dict[str, JsonValue]) -> TextPath:
    """Where a message has its text, if it is one: in its one text part, else in its content."""
    content = message.get("content")
    if type(content) is list and len(content) == 1 and type(content[0]) is dict and content[0].get("type") == "text":
        return ("content", 0, "text")
    return ("content",)


def _ending_with(conversation: Conversation, last: JsonValue) -> Conversation:
    return replace(conversation, messages=(*conversation.messages[:-1], last))
