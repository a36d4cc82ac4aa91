"""Texts that tell tokenizers apart, and the comparison of two spellings of them.

For engines that have no fingerprint to compare: what spells all of these texts in the same ids is taken for the same
tokenizer. The set holds what tokenizers do differently (spaces, digits, scripts, emoji, code, markup), every added
token, and words from everywhere in the vocabulary; so a tokenizer that differs in one rare merge may pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gateway.contracts.errors import EngineProtocolError, IdentityMismatch
from gateway.contracts.ports import Engine
from gateway.tito.spellings import TEXTS
from gateway.tito.tokenizer import ChatTokenizer

_NUM_WORDS = 4096
_GROUP = 64
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class ProbeText:
    """One text; `parts` are texts that can be asked alone to find out which one differs."""

    text: str
    parts: tuple[str, ...] = ()


async def probe_engine(engine: Engine, tokenizer: ChatTokenizer, *, named: str) -> bool:
    """Whether an engine could be asked to spell the probe set; raises IdentityMismatch for the first other spelling.

    Also raises EngineError, and EngineProtocolError for an answer that is no spelling.
    """
    probes = probe_texts(tokenizer)
    spelled = await engine.tokenize([probe.text for probe in probes])
    if spelled is None:
        return False
    if len(spelled) != len(probes):
        raise EngineProtocolError(f"{named} spelled {len(spelled)} of {len(probes)} texts")
    for probe, ids in zip(probes, spelled, strict=True):
        if _differs(tokenizer, probe.text, ids):
            raise await _mismatch(engine, tokenizer, probe, ids, named)
    return True


def probe_texts(tokenizer: ChatTokenizer) -> tuple[ProbeText, ...]:
    """The probe set of one tokenizer: fixed texts, every added token's text, words from all of the vocabulary."""
    added = [token.text for token in tokenizer.added_tokens.values() if token.text]
    groups = [*_groups(added, "x"), *_groups(list(_words(tokenizer)), "\n")]
    return (*map(ProbeText, TEXTS), *groups)


def _groups(texts: Sequence[str], between: str) -> Iterator[ProbeText]:
    for start in range(0, len(texts), _GROUP):
        group = tuple(texts[start : start + _GROUP])
        yield ProbeText(between.join(group), group)


def _words(tokenizer: ChatTokenizer) -> Iterator[str]:
    """Texts of tokens at even distances; halves of characters are left out."""
    for token_id in np.unique(np.linspace(0, tokenizer.vocab_size - 1, _NUM_WORDS).astype(int)).tolist():
        if token_id not in tokenizer.added_tokens:
            text = tokenizer.decode([token_id])
            if text and "\ufffd" not in text:
                yield text


def _differs(tokenizer: ChatTokenizer, text: str, ids: Sequence[int]) -> bool:
    return list(ids) not in _spellings(tokenizer, text)


def _spellings(tokenizer: ChatTokenizer, text: str) -> tuple[list[int], ...]:
    """Ours; and, for engines that cannot be asked without it, with the tokens that open a string before it."""
    ids: list[int] = tokenizer.encode(text).tolist()
    return ids, tokenizer.encode(tokenizer.opening).tolist() + ids


async def _mismatch(
    engine: Engine, tokenizer: ChatTokenizer, probe: ProbeText, ids: Sequence[int], named: str
) -> IdentityMismatch:
    text = probe.text
    alone = await engine.tokenize(probe.parts) if probe.parts else None
    for part, part_ids in zip(probe.parts, alone or (), strict=False):
        if _differs(tokenizer, part, part_ids):
            text, ids = part, part_ids
            break
    ours = _spellings(tokenizer, text)[0]
    same = next((i for i, pair in enumerate(zip(ours, ids, strict=False)) if pair[0] != pair[1]), 0)
    shown = text if len(text) <= 60 else text[:57] + "…"
    return IdentityMismatch(
        f"{named} has another tokenizer: it spells {shown!r} as {_cut(ids, same)}, ours as {_cut(ours, same)}: "
        "point --model at the engine's own model"
    )


def _cut(ids: Sequence[int], at: int) -> str:
    """Ids around the first one that differs."""
    start = max(0, at - 2)
    window = [str(token_id) for token_id in ids[start : start + _SHOWN]]
    before, after = ["…"] * (start > 0), ["…"] * (start + _SHOWN < len(ids))
    return f"[{', '.join(before + window + after)}]"
