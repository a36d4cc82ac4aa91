"""The prompt of a turn: the recorded ids of the turn before it, plus the ids of what the template adds.

I1: recorded ids are never made again from text. What is added comes from the junction probe (`junction`) and is
certified against a full render of the agent's own conversation; whatever cannot be certified is a full render and a
new segment with its reason (I6), never an error of ours. Only what is added is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gateway.contracts.generation import TokenIds
from gateway.contracts.records import SegmentReason
from gateway.tito.conversation import BuiltPrompt, Conversation, HistoryPolicy, ParentTurn, check_parent
from gateway.tito.history import History, RenderedPrompts, compare_history
from gateway.tito.junction import Junction, TurnTokens, learn_junction, reasoning_close, text_turn_close
from gateway.tito.lookalikes import Brackets, GuardedConversation, LookalikeGuard
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

FULL_RENDER = "full_render"
PROBE = "probe"
PROBE_KEPT_HISTORY = "probe_kept_history"
CLOSE = "close"


class PromptBuilder:
    """Builds prompts for one model; safe to share between sessions and threads.

    stop_token_ids: ids at which the engine ends a turn on top of the tokenizer's own end tokens. parsing: how the
    model's replies are read; chosen from template and vocabulary where it is not given.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: ChatTemplate,
        *,
        parsing: ReplyParsing | None = None,
        stop_token_ids: Sequence[int] = (),
        history_policy: HistoryPolicy = HistoryPolicy.KEEP,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._history_policy = history_policy
        self._parsing = parsing if parsing is not None else choose_parsing(template, tokenizer)
        self._guard = LookalikeGuard(tokenizer, template, markup=[marker.text for marker in self._parsing.markers])
        self._stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *tokenizer.eos_token_ids)))
        self._special = tuple(token.text for token in tokenizer.added_tokens.values() if token.special)
        self._rendered = RenderedPrompts()

    def build(
        self, conversation: Conversation, parent: ParentTurn | None, *, reason: SegmentReason = SegmentReason.FIRST
    ) -> BuiltPrompt:
        """Tokens for the turn that answers `conversation`.

        Without a parent they are the whole prompt, and `reason` is passed on. With one they continue it where that is
        certified. `certified_by` is "full_render", "probe" (append-only), "probe_kept_history" (the template would
        have dropped old reasoning; policy `keep`) or "close" (the parent was cut; masked tokens end its turn).
        Raises TemplateRaised if the template refuses the conversation, LengthMismatch for a parent that does not fit.
        """
        guarded = self._guard.guard(conversation)
        full_text = self._template.render(guarded.conversation)
        if parent is None:
            return self._whole(full_text, guarded, reason)
        check_parent(parent, conversation)
        junction = learn_junction(
            self._template,
            guarded.conversation,
            num_messages=parent.num_messages,
            full_text=full_text,
            tokens=TurnTokens(self._stop_texts(parent), self._special, guarded.brackets),
        )
        if isinstance(junction, SegmentReason):
            return self._whole(full_text, guarded, self._reason_of(parent, junction))
        return self._continued(parent, junction, guarded, full_text)

    def _continued(
        self, parent: ParentTurn, junction: Junction, guarded: GuardedConversation, full_text: str
    ) -> BuiltPrompt:
        """The parent's ids go on with the junction's, unless history or the sampled stop token forbid it."""
        stop_id = self._tokenizer.token_id(junction.stop)
        if stop_id is None:
            return self._whole(full_text, guarded, SegmentReason.UNCERTIFIED)
        history = self._history(parent, guarded.conversation, full_text)
        if history is History.REWRITTEN:
            return self._whole(full_text, guarded, SegmentReason.REWRITE_OTHER)
        if history is History.REASONING_DROPPED and self._history_policy is HistoryPolicy.TEMPLATE:
            return self._whole(full_text, guarded, SegmentReason.REWRITE_REASONING)
        suffix_ids = self._suffix_ids(junction, stop_id, guarded.brackets)
        if suffix_ids is None:
            return self._whole(full_text, guarded, SegmentReason.UNCERTIFIED)
        last_id = int(parent.token_ids[-1])
        if last_id == stop_id:
            certified_by = PROBE if history is History.KEPT else PROBE_KEPT_HISTORY
            return self._appended(parent, suffix_ids, full_text, certified_by)
        stop_then_suffix = np.concatenate([np.array([stop_id], dtype=np.int32), suffix_ids])
        if last_id in self._stops_of(parent):
            # Never two stops in a row: history has another one here. The sampled one stays in the parent's record.
            ids = np.concatenate([parent.token_ids[:-1], stop_then_suffix])
            return self._remembered(ids, full_text, BuiltPrompt(ids, SegmentReason.STOP_MISMATCH, PROBE))
        return self._appended(parent, np.concatenate([self._closing_ids(parent), stop_then_suffix]), full_text, CLOSE)

    def _suffix_ids(self, junction: Junction, stop_id: int, brackets: Brackets | None) -> TokenIds | None:
        """Ids of the suffix as they are behind the stop token: that token may eat the space that follows it, and
        some tokenizers put a space before a text's first piece. None where the stop is not one token of its own."""
        ids = self._guard.encode(junction.stop + junction.suffix, brackets)
        return ids[1:] if len(ids) and int(ids[0]) == stop_id else None

    def _closing_ids(self, parent: ParentTurn) -> TokenIds:
        """What ends the text of a turn that was cut, up to its stop token: an open call or reasoning is closed."""
        num_prompt = len(parent.token_ids) - parent.num_output_tokens
        # What the model opened must be closed, whether or not the request offered tools: any definition will do.
        parser = self._parsing.start(prompt_ids=parent.token_ids[:num_prompt], tools=({},))
        parser.feed(parent.token_ids[num_prompt:].tolist())
        markup = parser.open_markup
        text = self._text_close
        if markup.closing_text:
            text = f"\n{markup.closing_text}" + text
        if markup.in_reasoning:
            text = self._reasoning_close + text
        return self._tokenizer.encode_after(text) if text else np.zeros(0, dtype=np.int32)

    @cached_property
    def _text_close(self) -> str:
        stops = [self._tokenizer.token_text(token_id) for token_id in self._stop_token_ids]
        return text_turn_close(self._template, stops)

    @cached_property
    def _reasoning_close(self) -> str:
        markers = self._parsing.reasoning
        return reasoning_close(self._template, closer=markers.closer.text) if markers is not None else ""

    def _history(self, parent: ParentTurn, conversation: Conversation, full_text: str) -> History:
        num_prompt = len(parent.token_ids) - parent.num_output_tokens
        if self._rendered.starts(parent.token_ids[:num_prompt], full_text):
            return History.KEPT
        return compare_history(
            self._template,
            conversation,
            num_messages=parent.num_messages,
            full_text=full_text,
            reasoning=self._parsing.reasoning,
        )

    def _reason_of(self, parent: ParentTurn, reason: SegmentReason) -> SegmentReason:
        """A turn that was cut and cannot be closed says so."""
        was_cut = int(parent.token_ids[-1]) not in self._stops_of(parent)
        return SegmentReason.TRUNCATED if was_cut and reason is SegmentReason.UNCERTIFIED else reason

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
        return self._remembered(ids, full_text, BuiltPrompt(ids, reason, FULL_RENDER))

    def _appended(self, parent: ParentTurn, added: TokenIds, full_text: str, certified_by: str) -> BuiltPrompt:
        prompt = np.concatenate([parent.token_ids, added])
        return self._remembered(prompt, full_text, BuiltPrompt(added, None, certified_by))

    def _remembered(self, prompt_ids: TokenIds, full_text: str, built: BuiltPrompt) -> BuiltPrompt:
        self._rendered.remember(prompt_ids, full_text)
        return built
