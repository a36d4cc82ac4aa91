"""Text of a message that comes in pieces and in blocks, as markup leaves them."""

from __future__ import annotations


class JoinedText:
    """Text that comes in pieces and in blocks (before and after markup); knows which space is only layout.

    A block after markup loses its leading newlines and is joined to earlier text by one. Trailing space waits, where
    `holds_space`, until it is known whether text or markup follows; markup that is accepted drops it. The cost of a
    piece does not depend on how much came before.
    """

    __slots__ = ("_at_block_start", "_holds_space", "_pieces", "_waiting", "is_blank")

    def __init__(self, *, holds_space: bool) -> None:
        self._holds_space = holds_space
        self._pieces: list[str] = []
        self._waiting: list[str] = []
        self._at_block_start = False
        self.is_blank: bool = True

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._pieces)

    def begin_block(self) -> None:
        """Markup was accepted here."""
        self._waiting.clear()
        self._at_block_start = True

    def add(self, text: str) -> str:
        """Take more text; returns what can be shown now."""
        if self._at_block_start and not self._waiting:
            text = text.lstrip("\n")
        visible = text.rstrip() if self._holds_space else text
        if not visible:
            if text:
                self._waiting.append(text)
            return ""
        shown = "".join(self._waiting) + visible
        self._waiting = [text[len(visible) :]] if len(visible) < len(text) else []
        if self._at_block_start:
            shown = "\n" + shown if self._pieces else shown
            self._at_block_start = False
        return self._show(shown)

    def end(self) -> str:
        """No more text; returns the space that waited, if it follows text."""
        waiting = "" if self._at_block_start else "".join(self._waiting)
        self._waiting.clear()
        return self._show(waiting)

    def _show(self, text: str) -> str:
        if text:
            self._pieces.append(text)
            self.is_blank = self.is_blank and text.isspace()
        return text
