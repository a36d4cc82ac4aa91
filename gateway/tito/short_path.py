"""The short path: what a turn of a certified shape adds, however long the conversation is: from a frame of fixed texts
that was learned for the shape (`frames`), else from one short render where the certificate has no numbers.

It speaks only where nothing in the new messages could make a template behave as its certificate has not seen: none of
the strings that the template itself looks for, and no control token in what a model said. What others wrote that looks
like one is bracketed (`lookalikes`), as it is on the long path (`prompt`), which all else takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from msgspec import Struct

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.tito.certificate import (
    CertificateBook,
    ShapeCertificate,
    ShapeKey,
    Verdict,
    certify_shape,
    stand_in_tools,
)
from gateway.tito.conversation import Conversation
from gateway.tito.frames import Frame, counts_of, learn_frame
from gateway.tito.junction import TurnTokens, local_suffix, made_up_history
from gateway.tito.lookalikes import AnyOf, Brackets, LookalikeGuard, SaidTexts
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.shapes import Shape, Sketch, follows_systems, sketch_of, sketched_shape
from gateway.tito.template import ChatTemplate

_MAX_ARGUMENTS_LENGTH = 2_000
_MAX_KEYS = 4_096


class CertifiedSuffix(Struct, frozen=True):
    """`suffix`: what stands behind `stop`. keeps_reasoning: the template may drop old reasoning, which is kept.

    brackets: around what only looks like a control token in it; None if nothing does.
    """

    key: ShapeKey
    stop: str
    suffix: str
    keeps_reasoning: bool
    brackets: Brackets | None


class ShortPath:
    """Certificates of one template and vocabulary (`book`), and the suffixes that they vouch for. Safe between threads.

    untold_of_others: texts of which no certificate speaks as they are, where others than models write them.
    """

    def __init__(
        self,
        template: ChatTemplate,
        guard: LookalikeGuard,
        *,
        tokens: TurnTokens,
        reasoning: ReasoningMarkers | None,
    ) -> None:
        self._template = template
        self._guard = guard
        self._looked_for = AnyOf(template.looked_for)
        self._untold_of_models = AnyOf((*guard.turn.texts, *template.looked_for))
        self.untold_of_others = AnyOf((*guard.control.texts, *template.looked_for))
        self._keys: dict[tuple[Sketch, str], ShapeKey] = {}
        self._tokens = tokens
        self._reasoning = reasoning
        self.book: CertificateBook[Frame] = CertificateBook()

    def trust(self, certificates: Iterable[tuple[ShapeKey, ShapeCertificate]]) -> None:
        """Rely on certificates that were made elsewhere, of the same template and tokens."""
        for key, certificate in certificates:
            self.book.put(key, certificate)

    def certify_next(self) -> bool:
        """Certify one shape that was asked for (some 10 ms), or frame one that is in use; whether there was one."""
        pending = self.book.take_pending()
        if pending is not None:
            self._certify(*pending)
            return True
        unframed = self.book.take_unframed()
        if unframed is not None:
            key, arguments, stop = unframed
            self.book.put_frame(key, learn_frame(self._template, key, arguments, stop))
        return unframed is not None

    def certificate(self, shape: Shape, arguments: Mapping[str, JsonValue]) -> ShapeCertificate:
        """Try a shape under some template arguments, for people to look at."""
        return certify_shape(self._template, shape, arguments, tokens=self._tokens, reasoning=self._reasoning)

    def _certify(self, key: ShapeKey, arguments: Mapping[str, JsonValue]) -> None:
        self.book.put(key, self.certificate(key.shape, arguments))

    def suffix(self, conversation: Conversation, num_messages: int) -> CertifiedSuffix | None:
        """What the template adds behind the stop token of reply `num_messages - 1`, if a certificate vouches for it."""
        sketch = sketch_of(conversation, num_messages, template_source=self._template.source)
        if sketch is None:
            return None
        given = conversation.template_arguments
        arguments = json.dumps(dict(given), sort_keys=True) if given else "{}"
        key = self._keys.get((sketch, arguments)) or self._new_key(sketch, arguments)
        if key is None:
            return None
        found = self.book.find(key, conversation.template_arguments)
        if found is None or (stop := found[0].stop) is None:
            return None
        certificate, frame = found
        if not certificate.holds_behind_systems and follows_systems(conversation.messages[:num_messages]):
            return None
        shown = self._shown(conversation, num_messages)
        if shown is None:
            return None
        messages, brackets = shown
        suffix = None
        if frame is not None and (frame.is_numbered or not certificate.is_numbered):
            counts = counts_of(conversation.messages[: num_messages - 1]) if frame.is_numbered else None
            suffix = frame.fill(messages, counts)
        if suffix is None and not certificate.is_numbered:
            if brackets is not None:
                conversation = replace(conversation, messages=(*conversation.messages[: num_messages - 1], *messages))
            tools = stand_in_tools(conversation)
            suffix = local_suffix(self._template, conversation, num_messages=num_messages, stop=stop, tools=tools)
        if suffix is None:
            return None
        return CertifiedSuffix(key, stop, suffix, certificate.verdict is Verdict.REASONING_DROPPED, brackets)

    def _new_key(self, sketch: Sketch, arguments: str) -> ShapeKey | None:
        """The key that a sketch stands for, kept for the turns after it; None for arguments that are too long."""
        if len(arguments) > _MAX_ARGUMENTS_LENGTH:
            return None
        key = ShapeKey(sketched_shape(sketch), arguments)
        if len(self._keys) < _MAX_KEYS:
            self._keys[sketch, arguments] = key
        return key

    def _shown(
        self, conversation: Conversation, num_messages: int
    ) -> tuple[Sequence[JsonValue], Brackets | None] | None:
        """The reply and what was appended as the template is shown them; None where no certificate speaks for them."""
        messages = conversation.messages[num_messages - 1 :]
        said = SaidTexts.of(messages)
        if self._untold_of_models.are_in(said.by_models):
            return None
        if not self.untold_of_others.are_in(said.by_others):
            return messages, None
        if self._looked_for.are_in(said.by_others):
            return None
        history = made_up_history(conversation)
        made = Conversation((*history, *messages), stand_in_tools(conversation), conversation.template_arguments)
        try:
            guarded = self._guard.guard(made)
        except TemplateRaised:
            return None
        if guarded.brackets is None:
            return None
        return guarded.conversation.messages[len(history) :], guarded.brackets
