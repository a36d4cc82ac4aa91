"""Which engines may sample for this gateway: those of its model that can do what was required."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.contracts.errors import CapabilityMissing
from gateway.contracts.generation import Capability, EngineIdentity
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Verification
from gateway.sessions.model import ServedModel


@dataclass(frozen=True, slots=True)
class Admission:
    """`check` is the pool's `IdentityCheck`. required: what every engine must be able to do."""

    model: ServedModel
    required: tuple[Capability, ...] = ()

    async def check(self, engine: Engine, identity: EngineIdentity, proven: Verification | None = None) -> Verification:
        """How the engine was verified; raises CapabilityMissing, IdentityMismatch or EngineError."""
        check_capabilities(identity, self.required)
        return await self.model.check_engine(engine, identity, proven)


def check_capabilities(identity: EngineIdentity, required: Iterable[Capability]) -> None:
    """Raise CapabilityMissing naming each capability that an engine lacks, and what turns it on."""
    missing = [capability for capability in dict.fromkeys(required) if not identity.can(capability)]
    if missing:
        advice = "; ".join(f"{each.value}: {_how_to_enable(each, identity)}" for each in missing)
        raise CapabilityMissing(
            f"engine {identity.engine_id} ({identity.url}, {identity.kind}) lacks {', '.join(missing)}, which this "
            f"gateway requires ({advice})"
        )


def _how_to_enable(capability: Capability, identity: EngineIdentity) -> str:
    return identity.enabling.get(capability, f"no setting of this engine ({identity.kind}) turns it on")
