"""What of a gateway lives only in its memory and has to travel when another process takes over.

travels                     engines that operators added or removed; the pause in force
is in the ledger            sessions, turns, deliveries, finishes, leases, what labels of weights mean
is made anew                certificates of template shapes, health of engines, metrics, rate and body accounts
stays until it has ended    replies that run, and everything that belongs to them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gateway.contracts.errors import HandoverFailed
from gateway.contracts.generation import JsonValue
from gateway.replicas.pause import Pause
from gateway.replicas.sources import EngineSource


@dataclass(frozen=True, slots=True)
class LiveState:
    """configured: the engines of the process's own settings. engines: those that it uses, also where one of them does
    not answer now. paused: the pause that was ordered and holds generation."""

    configured: tuple[EngineSource, ...]
    engines: tuple[EngineSource, ...]
    paused: Pause | None

    def to_json(self) -> dict[str, JsonValue]:
        """As it travels."""
        return {
            "configured": [asdict(source) for source in self.configured],
            "engines": [asdict(source) for source in self.engines],
            "paused": None if self.paused is None else self.paused.to_json(),
        }

    @classmethod
    def from_json(cls, value: JsonValue) -> LiveState:
        """As it was sent; raises HandoverFailed for what is none."""
        try:
            assert isinstance(value, dict)
            return cls(
                configured=tuple(EngineSource(**source) for source in value["configured"]),
                engines=tuple(EngineSource(**source) for source in value["engines"]),
                paused=None if value["paused"] is None else Pause.from_json(value["paused"]),
            )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise HandoverFailed(f"the other gateway's state cannot be read: {error}") from error

    def engines_for(self, configured: Sequence[EngineSource]) -> tuple[EngineSource, ...]:
        """What a successor with these settings uses: its own engines without those that operators removed, and those
        that operators added.

        >>> a, b, c = (EngineSource(name, "sglang", f"http://{name}") for name in "abc")
        >>> old = LiveState(configured=(a, b), engines=(b, c), paused=None)  # a was removed, c was added
        >>> [source.engine_id for source in old.engines_for([a, b])]
        ['b', 'c']
        """
        before = {source.engine_id for source in self.configured}
        now = {source.engine_id for source in self.engines}
        own = [source for source in configured if source.engine_id in now or source.engine_id not in before]
        known = {source.engine_id for source in configured} | before
        return (*own, *(source for source in self.engines if source.engine_id not in known))


NO_STATE = LiveState((), (), None)
"""Of a gateway that begins: whatever its settings say is new."""
