"""Text of a message that comes in pieces and in blocks, as markup leaves them."""

from __future__ import annotations

from msgspec import Struct

from gateway.contracts.replies import ContentDelta, ReasoningDelta, ReplyDelta


class JoinedText(Struct, eq=False):
    """Text that comes in pieces and in blocks (before and after markup); knows which space is only layout.

    A block after markup loses its leading newlines and is joined to earlier text by one. Trailing space waits, where
    `holds_space`, until it is known whether text or markup follows; markup that is accepted drops it. The cost of a
    piece does not depend on how much came before. What can be shown goes to `deltas`, as `kind`, and to `pieces`.
    """

    deltas: list[ReplyDelta]
    kind: type[ContentDelta | ReasoningDelta]
    holds_space: bool
    at_block_start: bool = False
    waiting: list[str] = []
    pieces: list[str] = []
    is_blank: bool = True

    def begin_block(self) -> None:
        """Markup was accepted here."""
        self.waiting = []
        self.at_block_start = True

    def add(self, text: str) -> None:
        """Take more text, and show what can be shown now."""
        if self.at_block_start and not self.waiting:
            text = text.lstrip("\n")
        shown = text.rstrip() if self.holds_space else text
        if not shown:
            if text:
                self.waiting.append(text)
            return
        space = text[len(shown) :] if shown != text else ""
        if self.waiting:
            shown = "".join(self.waiting) + shown
            self.waiting = []
        if space:
            self.waiting.append(space)
        if self.at_block_start:
            self.at_block_start = False
            if self.pieces:
                shown = "\n" + shown
        if self.is_blank:
            self.is_blank = shown.isspace()
        self.pieces.append(shown)
        self.deltas.append(self.kind(shown))

    def end(self) -> None:
        """No more text: the space that waited is shown if it follows text."""
        if self.waiting and not self.at_block_start:
            shown = "".join(self.waiting)
            self.pieces.append(shown)
            self.deltas.append(self.kind(shown))
        self.waiting = []
