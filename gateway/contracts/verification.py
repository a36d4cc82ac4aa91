"""How it was made sure that an engine serves the gateway's model, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Proof(StrEnum):
    """SHA256: the engine's own word, compared. PROBE: it spelled a set of texts in the same ids. TOLD: it said the
    same numbers. FOLDER: the files at the engine's own path, as this machine has them (another machine may have others
    there). UNVERIFIED: nothing could be compared."""

    SHA256 = "sha256"
    PROBE = "probe"
    TOLD = "told"
    FOLDER = "folder"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class Verification:
    """Of one engine: where two proofs hold, the stronger one is named."""

    tokenizer: Proof = Proof.UNVERIFIED
    template: Proof = Proof.UNVERIFIED
    dimensions: Proof = Proof.UNVERIFIED
