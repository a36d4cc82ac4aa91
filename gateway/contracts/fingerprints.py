"""Fingerprints that every copy of the same thing has, however its file is spelled: of a tokenizer, of a chat template.

The tokenizer's definition, for others who want to say `tokenizer_sha256` of theirs. It is the SHA-256, in lower-case
hex, of ASCII JSON with sorted keys and without spaces (`json.dumps(content, sort_keys=True, separators=(",", ":"))`),
where `content` is the parsed tokenizer.json after these steps:

1. Of the top level only `added_tokens`, `normalizer`, `pre_tokenizer`, `post_processor`, `decoder` and `model` stay
   (`version`, `truncation` and `padding` say nothing about how a text is spelled in ids).
2. Numbers that are whole are integers (`-3.0` is `-3`).
3. `added_tokens` are sorted by `id`; each has `id`, `content`, and those of `single_word`, `lstrip`, `rstrip`,
   `normalized` and `special` that are true.
4. A `vocab` of texts with ids is the list of pairs `[id, text]` in order. One of texts with scores (Unigram; the ids
   are their places) keeps its order; each score is rounded to nine significant digits (`%.9g`), because libraries
   differ in the last bits when they read and write it.
5. `merges` written as one text (`"a b"`) are pairs (`["a", "b"]`). Their order stays: it is their rank.
6. A model without `type` gets the one that its fields imply. Fields of the model that are null or false are left out,
   and so are a `dropout` of 0, and a `continuing_subword_prefix` or `end_of_word_suffix` of "".
7. A `Sequence` of normalizers, pre-tokenizers, post-processors or decoders is the list of its parts, a sequence inside
   one is taken apart, and a single part is a list of one; none at all (null) is the empty list.
8. What a part says by default is said: `Metaspace` has `prepend_scheme` ("never" where an older file has
   `add_prefix_space` false, else "always") and `split` (true), and neither `add_prefix_space` nor `str_rep`; a
   `ByteLevel` pre-tokenizer has `use_regex` (true); `Digits` has `individual_digits` (false); `Punctuation` has
   `behavior` ("Isolated").
9. `trim_offsets` is left out everywhere. A `ByteLevel` decoder is its `type` alone, and a `ByteLevel` post-processor
   is left out: neither's settings change an id or a character.

Files of one tokenizer saved by different versions of its library come out equal; a difference in any id, merge, flag
or pattern that remains comes out different.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from gateway.contracts.errors import IdentityMismatch

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PARTS_OF_SEQUENCE = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""Stage → what its `Sequence` calls the list of parts."""

_EMPTY_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_sha256(description: Mapping[str, Any]) -> str:
    """The fingerprint of a parsed tokenizer.json, as this module defines it; raises IdentityMismatch if it is none."""
    canonical = canonical_tokenizer(description)
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def template_sha256(text: str) -> str:
    """The fingerprint of a chat template: SHA-256 of its text in UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def canonical_tokenizer(description: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a parsed tokenizer.json in its one spelling; raises IdentityMismatch for what is no tokenizer."""
    try:
        stages = {stage: _stage(stage, description.get(stage)) for stage in _PARTS_OF_SEQUENCE}
        added = [_added_token(token) for token in description.get("added_tokens") or []]
        model = _model(description["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IdentityMismatch(f"not a tokenizer description ({type(error).__name__}: {error})") from error
    return {"added_tokens": sorted(added, key=lambda token: token["id"]), "model": model, **stages}


def in_order_of_ids(description: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed tokenizer.json whose added tokens stand in the order of their ids.

    The `tokenizers` library numbers added tokens by their place in the file, whatever ids stand there.
    """
    added = description.get("added_tokens") or []
    return {**description, "added_tokens": sorted(added, key=lambda token: token["id"])}


def _added_token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": int(token["id"]), "content": token["content"], **{flag: True for flag in _FLAGS if token.get(flag)}}


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in model.items() if value is not None and value is not False}
    kept = {name: value for name, value in kept.items() if not (name in _EMPTY_AFFIXES and value == "")}
    if not kept.get("dropout"):
        kept.pop("dropout", None)
    kept.setdefault("type", _implied_type(model))
    kept["vocab"] = _vocabulary(model["vocab"])
    if "merges" in kept:
        kept["merges"] = [_pair(merge) for merge in kept["merges"]]
    large = ("vocab", "merges")
    return {name: value if name in large else _whole_inside(value) for name, value in kept.items()}


def _vocabulary(vocab: Mapping[str, int] | list[tuple[str, float]]) -> list[list[Any]]:
    if isinstance(vocab, list):
        return [[piece, _whole(float(f"{score:.9g}"))] for piece, score in vocab]
    # By id and not by text: files are in that order already, and there are hundreds of thousands.
    return [[token_id, text] for text, token_id in sorted(vocab.items(), key=itemgetter(1, 0))]


def _implied_type(model: Mapping[str, Any]) -> str:
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _pair(merge: str | list[str]) -> list[str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return [left, right]


def _stage(stage: str, part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A stage's parts in their order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for entry in part[_PARTS_OF_SEQUENCE[stage]] for inner in _stage(stage, entry)]
    kind = part["type"]
    if kind == "ByteLevel" and stage == "post_processor":
        return []
    if kind == "ByteLevel" and stage == "decoder":
        return [{"type": kind}]
    settings = {name: _whole_inside(value) for name, value in part.items() if name != "trim_offsets"}
    return [_with_defaults(stage, kind, settings)]


def _with_defaults(stage: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    if kind == "Metaspace":
        adds_prefix = settings.pop("add_prefix_space", True)
        settings.pop("str_rep", None)
        scheme = settings.get("prepend_scheme", "always") if adds_prefix is not False else "never"
        return {"split": True, **settings, "prepend_scheme": scheme}
    if kind == "ByteLevel":
        return {"use_regex": True, **settings}
    if kind == "Digits":
        return {"individual_digits": False, **settings}
    if kind == "Punctuation":
        return {"behavior": "Isolated", **settings}
    return settings


def _whole_inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole_inside(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_whole_inside(entry) for entry in value]
    return _whole(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
