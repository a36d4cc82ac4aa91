"""The short path: what a turn of a certified shape adds, however long the conversation is: from a frame of fixed texts
that was learned for the shape (`frames`), else from one short render.

It speaks only where nothing in the new messages could make a template behave as its certificate has not seen: no text
that looks like a control token, none of the strings that the template itself looks for. All else is None, and takes the
long path (`prompt`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from gateway.contracts.frozen import frozen_dataclass
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
from gateway.tito.frames import Frame, learn_frame
from gateway.tito.junction import TurnTokens, local_suffix
from gateway.tito.lookalikes import AnyOf, LookalikeGuard, SaidTexts
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.shapes import Shape, shape_of
from gateway.tito.template import ChatTemplate

_MAX_ARGUMENTS_LENGTH = 2_000


@frozen_dataclass(frozen=True, slots=True)
class CertifiedSuffix:
    """`suffix`: what stands behind `stop`. keeps_reasoning: the template may drop old reasoning, which is kept."""

    key: ShapeKey
    stop: str
    suffix: str
    keeps_reasoning: bool


class ShortPath:
    """Certificates of one template and vocabulary, and the suffixes that they vouch for. Safe between threads."""

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
        self._tokens = tokens
        self._reasoning = reasoning
        self._book: CertificateBook[Frame] = CertificateBook()

    @property
    def has_pending(self) -> bool:
        """Whether shapes wait to be certified."""
        return self._book.has_pending

    def trust(self, certificates: Iterable[tuple[ShapeKey, ShapeCertificate]]) -> None:
        """Rely on certificates that were made elsewhere, of the same template and tokens."""
        for key, certificate in certificates:
            self._book.put(key, certificate)

    def certify_next(self) -> bool:
        """Certify one shape that was asked for (some 10 ms), or frame one that is in use; whether there was one."""
        pending = self._book.take_pending()
        if pending is not None:
            self._certify(*pending)
            return True
        unframed = self._book.take_unframed()
        if unframed is not None:
            key, arguments, stop = unframed
            self._book.put_frame(key, learn_frame(self._template, key, arguments, stop))
        return unframed is not None

    def certificate(self, shape: Shape, arguments: Mapping[str, JsonValue]) -> ShapeCertificate:
        """Try a shape under some template arguments, for people to look at."""
        return certify_shape(self._template, shape, arguments, tokens=self._tokens, reasoning=self._reasoning)

    def _certify(self, key: ShapeKey, arguments: Mapping[str, JsonValue]) -> None:
        self._book.put(key, self.certificate(key.shape, arguments))

    def suffix(self, conversation: Conversation, num_messages: int) -> CertifiedSuffix | None:
        """What the template adds behind the stop token of reply `num_messages - 1`, if a certificate vouches for it."""
        key = self._key(conversation, num_messages)
        if key is None:
            return None
        found = self._book.find(key, conversation.template_arguments)
        if found is None or (stop := found[0].stop) is None:
            return None
        certificate, frame = found
        messages = conversation.messages[num_messages - 1 :]
        if not self._is_plain(messages):
            return None
        suffix = frame.fill(messages) if frame is not None else None
        if suffix is None:
            tools = stand_in_tools(conversation)
            suffix = local_suffix(self._template, conversation, num_messages=num_messages, stop=stop, tools=tools)
        if suffix is None:
            return None
        return CertifiedSuffix(key, stop, suffix, certificate.verdict is Verdict.REASONING_DROPPED)

    def use(self, certified: CertifiedSuffix) -> bool:
        """Count a turn that relies on this; whether it should be audited."""
        return self._book.use(certified.key)

    def withdraw(self, certified: CertifiedSuffix) -> None:
        """A real turn has shown that the certificate does not hold."""
        self._book.withdraw(certified.key)

    def _key(self, conversation: Conversation, num_messages: int) -> ShapeKey | None:
        shape = shape_of(conversation, num_messages, template_source=self._template.source)
        if shape is None:
            return None
        given = conversation.template_arguments
        arguments = json.dumps(dict(given), sort_keys=True) if given else "{}"
        return ShapeKey(shape, arguments) if len(arguments) <= _MAX_ARGUMENTS_LENGTH else None

    def _is_plain(self, messages: Sequence[JsonValue]) -> bool:
        said = SaidTexts.of(messages)
        return not (
            self._guard.has_lookalikes(said)
            or self._looked_for.are_in(said.by_models)
            or self._looked_for.are_in(said.by_others)
        )
