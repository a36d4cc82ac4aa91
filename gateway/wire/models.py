"""`/v1/models`: what is served, as OpenAI lists it, or as Anthropic does.

One model is served, under every name that agents ask for; the list has the one that it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.contracts.generation import JsonValue


@dataclass(frozen=True, slots=True)
class ModelCard:
    """served_name: the model's own; created_at: seconds since 1970; context_length: in tokens, 0 for unknown."""

    served_name: str
    created_at: float
    context_length: int

    def openai(self, name: str | None = None) -> dict[str, JsonValue]:
        """One entry, under a name of the agent's choice; `root` is whose replies it gets."""
        return {
            "id": name or self.served_name,
            "object": "model",
            "created": int(self.created_at),
            "owned_by": "verbatim",
            "root": self.served_name,
            "max_model_len": self.context_length or None,
        }

    def anthropic(self, name: str | None = None) -> dict[str, JsonValue]:
        """The same as Anthropic has it."""
        return {
            "type": "model",
            "id": name or self.served_name,
            "display_name": self.served_name,
            "created_at": datetime.fromtimestamp(int(self.created_at), UTC).isoformat().replace("+00:00", "Z"),
        }


def openai_list(card: ModelCard) -> JsonValue:
    """All that there are."""
    return {"object": "list", "data": [card.openai()]}


def anthropic_list(card: ModelCard) -> JsonValue:
    """All that there are, on one page."""
    return {
        "data": [card.anthropic()],
        "has_more": False,
        "first_id": card.served_name,
        "last_id": card.served_name,
    }
