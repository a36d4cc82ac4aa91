"""What a family of tool-call syntax must know; each family is one module beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gateway.tito.parsing.markers import Marker


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as the model wrote it; `arguments` is JSON text of an object."""

    name: str
    arguments: str


class CallSyntax(Protocol):
    """Calls that stand between two markers."""

    @property
    def opener(self) -> Marker: ...

    @property
    def closer(self) -> Marker: ...

    def read(self, body: str) -> WrittenCall | None:
        """The call between the markers, None if it is malformed; never raises."""
        ...
