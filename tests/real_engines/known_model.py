"""What both real engines are asked to prove: that they serve a folder's model, and not a changed one."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS
from gateway.contracts.errors import IdentityMismatch
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Proof
from gateway.sessions.admission import Admission
from gateway.sessions.model import ServedModel
from gateway.tito.conversation import HistoryPolicy

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")


async def check_is_known(engine: Engine, folder: Path, changed: Path) -> None:
    """By its spelling alone, as if its files were on another machine. `changed`: a folder to make."""
    identity = replace(await engine.identity(), fingerprints={}, told=(), dimensions=UNKNOWN_DIMENSIONS, vocab_size=0)
    admission = Admission(ServedModel.load(folder, history_policy=HistoryPolicy.KEEP))
    started = time.monotonic()
    assert (await admission.check(engine, identity)).tokenizer is Proof.PROBE
    assert time.monotonic() - started < 4
    other = Admission(ServedModel.load(_with_swapped_words(folder, changed), history_policy=HistoryPolicy.KEEP))
    with pytest.raises(IdentityMismatch, match=r"another tokenizer: it spells '.*' as \[.*\], ours as \["):
        await other.check(engine, identity)


def _with_swapped_words(folder: Path, changed: Path) -> Path:
    """The same model, but for two words of the vocabulary that have each other's id."""
    changed.mkdir()
    for name in _FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, changed / name)
    content = json.loads((changed / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    last, before = (max(vocab, key=vocab.__getitem__), sorted(vocab, key=vocab.__getitem__)[-2])
    vocab[last], vocab[before] = vocab[before], vocab[last]
    (changed / "tokenizer.json").write_text(json.dumps(content))
    return changed
