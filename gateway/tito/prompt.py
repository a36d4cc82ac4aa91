"""The prompt of a turn: the recorded ids of the turn before it, plus the ids of what the template adds.

I1: recorded ids are never made again from text. Turns of a shape whose suffix is certified not to depend on the
conversation take the short path, O(new messages); all others the long one: the junction probe (`junction`), certified
against a full render of the agent's own conversation. First turns that begin as many others did are filled in and
spelled behind what they share (`openings`). Whatever cannot be certified is a full render and a new segment
with its reason (I6), never an error of ours. Only what is added is encoded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.records import SegmentReason
from gateway.tito.backends import BackendChoice
from gateway.tito.certificate import ShapeCertificate
from gateway.tito.conversation import BuiltPrompt, Conversation, HistoryPolicy, ParentTurn, check_parent
from gateway.tito.history import History, RenderedPrompts, compare_history
from gateway.tito.junction import (
    Junction,
    TurnTokens,
    call_close,
    learn_junction,
    reasoning_close,
    text_turn_close,
    unseen_messages,
)
from gateway.tito.lookalikes import GuardedConversation, LookalikeGuard, num_characters
from gateway.tito.openings import Openings
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.proof import Proven, ToProve, prove
from gateway.tito.shapes import Shape
from gateway.tito.short_path import ShortPath
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_log = logging.getLogger(__name__)

FULL_RENDER = "full_render"
OPENING = "opening"
SHAPE = "shape"
SHAPE_KEPT_HISTORY = "shape_kept_history"
PROBE = "probe"
PROBE_KEPT_HISTORY = "probe_kept_history"
PROBE_UNRENDERED = "probe_unrendered"
CLOSE = "close"

_PROBED = {History.KEPT: PROBE, History.REASONING_DROPPED: PROBE_KEPT_HISTORY}
_MAX_AUDITS = 16
"""Waiting at once; each keeps a conversation alive."""

_AUDIT_SHARE = 0.01
"""Of one core: what audits may take, however many turns there are. What cannot be audited in it is not."""

_AUDIT_SECONDS = 0.05
"""Of processor time at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class _Audit:
    """A turn that took a short way, to be built the long way too. claim: what is wrong if that differs; withdraw: never
    to rely on it again."""

    conversation: Conversation
    parent: ParentTurn | None
    built: BuiltPrompt
    claim: str
    withdraw: Callable[[], None]


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """Turns of the short ways that were built the long way too, and those among them that came out different."""

    num_audits: int = 0
    num_alarms: int = 0


class PromptBuilder:
    """Builds prompts for one model; safe to share between sessions and threads.

    stop_token_ids: ids at which the engine ends a turn on top of the tokenizer's own end tokens. parsing: how the
    model's replies are read; chosen from template and vocabulary where it is not given. backend: which tokenizer
    library `prepare` is to prove.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: ChatTemplate,
        *,
        parsing: ReplyParsing | None = None,
        stop_token_ids: Sequence[int] = (),
        history_policy: HistoryPolicy = HistoryPolicy.KEEP,
        backend: BackendChoice = BackendChoice.TOKENIZERS,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._history_policy = history_policy
        self._backend = backend
        self._parsing = parsing if parsing is not None else choose_parsing(template, tokenizer)
        self._guard = LookalikeGuard(tokenizer, template, markup=[marker.text for marker in self._parsing.markers])
        self._stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *tokenizer.eos_token_ids)))
        self._special = tuple(token.text for token in tokenizer.added_tokens.values() if token.special)
        self._rendered = RenderedPrompts()
        self._short_path = ShortPath(
            template,
            self._guard,
            tokens=self.turn_tokens,
            reasoning=self._parsing.reasoning,
        )
        self._openings = Openings(template, tokenizer, self._guard, untold=self._short_path.untold_of_others)
        self._audits: deque[_Audit] = deque(maxlen=_MAX_AUDITS)
        self._audit_counts = AuditCounts()
        self._audits_due_at = 0.0
        self._upkeep_lock = threading.Lock()

    def build(
        self, conversation: Conversation, parent: ParentTurn | None, *, reason: SegmentReason = SegmentReason.FIRST
    ) -> BuiltPrompt:
        """Tokens for the turn that answers `conversation`.

        Without a parent they are the whole prompt, and `reason` is passed on. With one they continue it where that is
        certified. `certified_by` is "full_render" or "opening" for whole prompts; else "shape" or "probe" (append-only,
        by a certificate of the turn's shape or in the conversation at hand), the same with "_kept_history" (the
        template may drop old reasoning here; policy `keep`), "probe_unrendered" (the template refuses the whole, but
        not what follows here) or "close" (the parent was cut; masked tokens end its turn).
        Raises TemplateRaised if the template refuses the conversation, LengthMismatch for a parent that does not fit.
        """
        short = self.build_short(conversation, parent, reason=reason)
        return self.build_long(conversation, parent, reason=reason) if short is None else short

    def build_short(
        self,
        conversation: Conversation,
        parent: ParentTurn | None,
        *,
        reason: SegmentReason = SegmentReason.FIRST,
        max_characters: int | None = None,
    ) -> BuiltPrompt | None:
        """The same at a cost that grows with what is new only; None where that cannot be.

        max_characters: of all that would be looked at; None is given for more, too.
        """
        if parent is not None:
            check_parent(parent, conversation)
        if max_characters is not None:
            first_read = 0 if parent is None else parent.num_messages - 1
            if num_characters(conversation.messages[first_read:]) > max_characters:
                return None
        return self._by_opening(conversation, reason) if parent is None else self._by_shape(conversation, parent)

    def build_long(
        self, conversation: Conversation, parent: ParentTurn | None, *, reason: SegmentReason = SegmentReason.FIRST
    ) -> BuiltPrompt:
        """The same by a full render, and a probe where there is a parent."""
        guarded = self._guard.guard(conversation)
        try:
            full_text = self._template.render(guarded.conversation)
        except TemplateRaised:
            unrendered = None if parent is None else self._continued(parent, guarded, None)
            if not isinstance(unrendered, BuiltPrompt):
                raise
            return unrendered
        if parent is None:
            return self._whole(full_text, guarded, reason)
        continued = self._continued(parent, guarded, full_text)
        if isinstance(continued, SegmentReason):
            return self._whole(full_text, guarded, self._reason_of(parent, continued))
        return continued

    def prepare(self, prove: Callable[[ToProve], Proven] = prove) -> None:
        """Certify the shapes of ordinary agents, prove a faster tokenizer library; a second or two, for a thread."""
        proven = prove(
            ToProve(
                self._template.texts,
                self._template.special_tokens,
                self.turn_tokens,
                self._parsing.reasoning,
                self._tokenizer.json,
                self._backend,
            )
        )
        self._short_path.trust(proven.certificates)
        self._tokenizer.use_backend(proven.backend)

    def certificate(self, shape: Shape, arguments: Mapping[str, JsonValue]) -> ShapeCertificate:
        """Try a shape of turns under template arguments, for people to look at; some 10 ms."""
        return self._short_path.certificate(shape, arguments)

    @cached_property
    def turn_tokens(self) -> TurnTokens:
        """The tokens that end and build turns, as far as model and vocabulary tell."""
        stops = tuple(self._tokenizer.token_text(token_id) for token_id in self._stop_token_ids)
        return TurnTokens(stops, self._special, None)

    @property
    def upkeep_due(self) -> bool:
        """Whether `upkeep` has something to do, and what it did last has been paid for."""
        if self._short_path.book.has_pending or self._openings.has_pending:
            return True
        return bool(self._audits or self._tokenizer.checks_due) and time.monotonic() >= self._audits_due_at

    def upkeep(self) -> None:
        """Certify shapes and learn openings that turns asked for, audit turns that took a short way; not for the event
        loop."""
        with self._upkeep_lock:
            while self._short_path.certify_next() or self._openings.learn_next():
                pass
            began = time.thread_time()
            while time.thread_time() - began < _AUDIT_SECONDS and self._audit_next():
                pass
            self._audits_due_at = time.monotonic() + (time.thread_time() - began) / _AUDIT_SHARE

    def _audit_next(self) -> bool:
        """Look at one turn, or one text, again; whether there was one."""
        if self._audits:
            self._audit(self._audits.popleft())
            return True
        return self._tokenizer.check_backend()

    @property
    def audits(self) -> AuditCounts:
        """How many turns of a short way were audited, and how many of them were wrong."""
        return self._audit_counts

    def _by_shape(self, conversation: Conversation, parent: ParentTurn) -> BuiltPrompt | None:
        """The short path; None where no certificate vouches for it."""
        certified = self._short_path.suffix(conversation, parent.num_messages)
        if certified is None or (certified.keeps_reasoning and self._history_policy is HistoryPolicy.TEMPLATE):
            return None
        stop_id = self._tokenizer.ids_of_added.get(certified.stop)
        if stop_id is None or parent.last_token_id != stop_id:
            return None
        ids = _behind_stop(self._guard.encode(certified.stop + certified.suffix, certified.brackets), stop_id)
        if ids is None:
            return None
        built = BuiltPrompt(ids, None, SHAPE_KEPT_HISTORY if certified.keeps_reasoning else SHAPE)
        key, book = certified.key, self._short_path.book
        if book.use(key):
            claim = f"the certificate of shape {str(key.shape)!r}"
            self._audits.append(_Audit(conversation, parent, built, claim, partial(book.withdraw, key)))
        return built

    def _by_opening(self, conversation: Conversation, reason: SegmentReason) -> BuiltPrompt | None:
        """A whole prompt that begins as many did; None where no opening speaks for it."""
        opened = self._openings.find(conversation)
        if opened is None:
            return None
        ids = np.concatenate([opened.head_ids, self._tokenizer.encode(opened.rest)])
        built = self._remembered(ids, opened.text, BuiltPrompt(ids, reason, OPENING))
        if opened.is_audited:
            claim = f"the opening of {len(opened.head_ids)} tokens"
            withdraw = partial(self._openings.withdraw, opened.key)
            self._audits.append(_Audit(conversation, None, built, claim, withdraw))
        return built

    def _audit(self, audit: _Audit) -> None:
        alarms, built = self._audit_counts.num_alarms, audit.built
        try:
            reason = built.segment_reason or SegmentReason.UNCERTIFIED
            expected = self.build_long(audit.conversation, audit.parent, reason=reason)
        except TemplateRaised:
            # A certified suffix serves where the template would refuse what lies further back.
            same = audit.parent is not None
        else:
            same = (expected.segment_reason, expected.hidden_messages) == (built.segment_reason, built.hidden_messages)
            same = same and np.array_equal(expected.token_ids, built.token_ids)
        if not same:
            alarms += 1
            audit.withdraw()
            _log.error(
                "%s is wrong for this template and is withdrawn: the template makes something else of a conversation; "
                "others like it are built one by one from now on",
                audit.claim,
            )
        self._audit_counts = AuditCounts(self._audit_counts.num_audits + 1, alarms)

    def _continued(
        self, parent: ParentTurn, guarded: GuardedConversation, full_text: str | None
    ) -> BuiltPrompt | SegmentReason:
        """The parent's ids go on with the junction's, unless history or the sampled stop token forbid it."""
        junction = learn_junction(
            self._template,
            guarded.conversation,
            num_messages=parent.num_messages,
            full_text=full_text,
            tokens=TurnTokens(self._stop_texts(parent), self._special, guarded.brackets),
            was_cut=self._was_cut(parent),
        )
        if isinstance(junction, SegmentReason):
            return junction
        stop_id = self._tokenizer.token_id(junction.stop)
        if stop_id is None:
            return SegmentReason.UNCERTIFIED
        history = History.KEPT
        if full_text is not None:
            history = self._history(parent, junction, guarded.conversation, full_text)
        if history is History.REWRITTEN:
            return SegmentReason.REWRITE_OTHER
        if history is History.REASONING_DROPPED and self._history_policy is HistoryPolicy.TEMPLATE:
            return SegmentReason.REWRITE_REASONING
        suffix_ids = _behind_stop(self._guard.encode(junction.stop + junction.suffix, guarded.brackets), stop_id)
        if suffix_ids is None:
            return SegmentReason.UNCERTIFIED
        last_id = parent.last_token_id
        if last_id == stop_id:
            certified_by = PROBE_UNRENDERED if full_text is None else _PROBED[history]
            return self._appended(parent, suffix_ids, full_text, certified_by)
        stop_then_suffix = np.concatenate([np.array([stop_id], dtype=np.int32), suffix_ids])
        if last_id in self._stops_of(parent):
            # Never two stops in a row: history has another one here. The sampled one stays in the parent's record.
            ids = np.concatenate([parent.token_ids[:-1], stop_then_suffix])
            return self._remembered(ids, full_text, BuiltPrompt(ids, SegmentReason.STOP_MISMATCH, PROBE))
        return self._appended(
            parent, np.concatenate([self._closing_ids(parent, junction.stop), stop_then_suffix]), full_text, CLOSE
        )

    def _closing_ids(self, parent: ParentTurn, stop: str) -> TokenIds:
        """What ends the text of a turn that was cut, up to its stop token: an open call or reasoning is closed."""
        num_prompt = parent.num_tokens - parent.num_output_tokens
        # What the model opened must be closed, whether or not the request offered tools: any definition will do.
        parser = self._parsing.start(prompt_ids=parent.token_ids[:num_prompt], tools=({},))
        parser.feed(parent.token_ids[num_prompt:].tolist())
        markup, reasoning = parser.open_markup, self._parsing.reasoning
        text = call_close(self._template, markup.closing_text) + self.text_close
        # Where one token ends reasoning and turns (channels), the stop token that follows does it.
        if markup.in_reasoning and reasoning is not None and reasoning.closer.text != stop:
            text = self.reasoning_close + text
        return self._tokenizer.encode_after(text) if text else np.zeros(0, dtype=np.int32)

    @cached_property
    def text_close(self) -> str:
        """What the template writes between a reply's text and its stop token."""
        return text_turn_close(self._template, self.turn_tokens.stops)

    @cached_property
    def reasoning_close(self) -> str:
        """What the template writes between a reply's reasoning and its text."""
        markers = self._parsing.reasoning
        return reasoning_close(self._template, closer=markers.closer.text) if markers is not None else ""

    def _history(self, parent: ParentTurn, junction: Junction, conversation: Conversation, full_text: str) -> History:
        num_prompt = parent.num_tokens - parent.num_output_tokens
        return compare_history(
            self._template,
            conversation,
            num_messages=parent.num_messages,
            full_text=full_text,
            end=junction.stop + junction.suffix,
            reasoning=self._parsing.reasoning,
            past_length=self._rendered.length_in(parent.token_ids[:num_prompt], full_text),
        )

    def _reason_of(self, parent: ParentTurn, reason: SegmentReason) -> SegmentReason:
        """A turn that was cut and cannot be closed says so."""
        is_uncertified = reason is SegmentReason.UNCERTIFIED
        return SegmentReason.TRUNCATED if is_uncertified and self._was_cut(parent) else reason

    def _was_cut(self, parent: ParentTurn) -> bool:
        return parent.last_token_id not in self._stops_of(parent)

    def _stops_of(self, parent: ParentTurn) -> tuple[int, ...]:
        """Ids that end a turn: of the files, and the added token that the engine says it stopped at.

        An ordinary token that an agent asked to stop at ends the sampling, not the turn."""
        matched = parent.finish.matched
        if isinstance(matched, int) and matched in self._tokenizer.added_tokens:
            return (*self._stop_token_ids, matched)
        return self._stop_token_ids

    def _stop_texts(self, parent: ParentTurn) -> tuple[str, ...]:
        return tuple(self._tokenizer.token_text(token_id) for token_id in self._stops_of(parent))

    def _whole(self, full_text: str, guarded: GuardedConversation, reason: SegmentReason) -> BuiltPrompt:
        ids = self._guard.encode(full_text, guarded.brackets)
        hidden = unseen_messages(self._template, guarded.conversation, full_text)
        return self._remembered(ids, full_text, BuiltPrompt(ids, reason, FULL_RENDER, hidden))

    def _appended(self, parent: ParentTurn, added: TokenIds, full_text: str | None, certified_by: str) -> BuiltPrompt:
        prompt = np.concatenate([parent.token_ids, added])
        return self._remembered(prompt, full_text, BuiltPrompt(added, None, certified_by))

    def _remembered(self, prompt_ids: TokenIds, full_text: str | None, built: BuiltPrompt) -> BuiltPrompt:
        if full_text is not None:
            self._rendered.remember(prompt_ids, full_text)
        return built


def _behind_stop(ids: TokenIds, stop_id: int) -> TokenIds | None:
    """Ids of a suffix as they are behind the stop token: that token may eat the space that follows it, and some
    tokenizers put a space before a text's first piece. None where the stop is not one token of its own."""
    # A copy: it is kept with the turn, and a view would keep the whole.
    return ids[1:].copy() if len(ids) and ids[0] == stop_id else None
