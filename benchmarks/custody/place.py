"""Where a chaos run lives: its folder with the model, the script of the oracle, the ledger and everybody's journal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.custody.oracle import NUM_EXPERTS, NUM_LAYERS, TOP_K, Script
from benchmarks.models.families import FAMILIES, write_model

_FAMILY = FAMILIES["own"]
_OPENING = "<|im_start|>assistant\n"
_STOP = "<|im_end|>"
_NUM_WORDS = 200
TOOL = "calculator"
_CALLS = tuple(
    f'\n<tool_call>\n{{"name": "{TOOL}", "arguments": {{"expression": "{text}"}}}}\n</tool_call>'
    for text in ("48/2", "12*7", "48+24", "7-3", "(2+2)*2", "96/3/4")
)


@dataclass(frozen=True, slots=True)
class Place:
    """Files of one run, under `folder`."""

    folder: Path

    @property
    def model(self) -> Path:
        """Tokenizer, template, configuration; no weights."""
        return self.folder / "model"

    @property
    def script(self) -> Path:
        """The oracle's vocabulary."""
        return self.folder / "script.json"

    @property
    def data(self) -> Path:
        """The ledger."""
        return self.folder / "data"

    @property
    def trained(self) -> Path:
        """The trainer's journal."""
        return self.folder / "trained.jsonl"

    @property
    def seen(self) -> Path:
        """What agents got."""
        return self.folder / "seen.jsonl"

    @property
    def deeds(self) -> Path:
        """What was done to whom, when."""
        return self.folder / "deeds.jsonl"

    def sampled(self, engine: int) -> Path:
        """The journal of one engine."""
        return self.folder / f"sampled-{engine}.jsonl"

    def log(self, name: str) -> Path:
        """The standard error of one process."""
        return self.folder / f"{name}.log"


def prepare(folder: Path) -> Place:
    """Make the model folder and the script."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder)
    write_model(place.model, family=_FAMILY, vocabulary="byte_level")
    config_file = place.model / "config.json"
    config = json.loads(config_file.read_text()) | {
        "num_hidden_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 65_536,
    }
    config_file.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(str(place.model / "tokenizer.json"))
    Script(
        words=_words(tokenizer),
        calls=[_ids(tokenizer, text) for text in _CALLS],
        opening=_ids(tokenizer, _OPENING),
        stop=tokenizer.token_to_id(_STOP),
    ).save(place.script)
    return place


class Spelling:
    """What the template adds behind a reply, as ids: told independently of the gateway."""

    def __init__(self, place: Place) -> None:
        self._tokenizer = Tokenizer.from_file(str(place.model / "tokenizer.json"))

    def appended(self, role: str, text: str) -> list[int]:
        """Behind a reply's stop token: a message of `role`, and the opening of the next reply."""
        return _ids(self._tokenizer, f"\n<|im_start|>{role}\n{text}{_STOP}\n{_OPENING}")


def _words(tokenizer: Tokenizer) -> list[int]:
    """Ids of plain words with a space before them, which stay apart in whatever order they come."""
    found = [i for token, i in sorted(tokenizer.get_vocab().items()) if token[:1] == "Ġ" and token[1:].isalpha()]
    return [i for i in found if tokenizer.decode([i]).strip().isascii()][:_NUM_WORDS]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
