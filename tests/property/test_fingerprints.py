"""A tokenizer's fingerprint: equal for every spelling of its file, different for every change of what it does."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from engines.identity import read_folder
from gateway.contracts.errors import IdentityMismatch
from gateway.contracts.fingerprints import tokenizer_sha256
from gateway.tito.tokenizer import ChatTokenizer

Description = dict[str, Any]


def unigram() -> Description:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -7.2344512939453125)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Fuse()])
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def description(tiny_model: Path) -> Description:
    return json.loads((tiny_model / "tokenizer.json").read_text())  # type: ignore[no-any-return]


def shuffled(value: Any, seed: random.Random) -> Any:
    """Every object's keys in another order; lists as they are."""
    if isinstance(value, dict):
        items = [(key, shuffled(entry, seed)) for key, entry in value.items()]
        seed.shuffle(items)
        return dict(items)
    return [shuffled(entry, seed) for entry in value] if isinstance(value, list) else value


def reversed_added_tokens(described: Description) -> None:
    described["added_tokens"].reverse()


def merges_as_texts(described: Description) -> None:
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]


def without_the_models_defaults(described: Description) -> None:
    described["model"] = {name: value for name, value in described["model"].items() if value not in (None, False)}


def without_the_models_type(described: Description) -> None:
    del described["model"]["type"]


def with_truncation(described: Description) -> None:
    described["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}


def nested_stage(described: Description) -> None:
    stage = described["pre_tokenizer"]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [stage]}]}


def empty_normalizer(described: Description) -> None:
    described["normalizer"] = {"type": "Sequence", "normalizers": []}


def other_offsets(described: Description) -> None:
    described["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    described["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False


def resaved(described: Description) -> None:
    again = json.loads(Tokenizer.from_str(json.dumps(described)).to_str())
    described.clear()
    described.update(again)


SPELLINGS: list[Callable[[Description], None]] = [
    merges_as_texts,
    without_the_models_defaults,
    without_the_models_type,
    with_truncation,
    other_offsets,
    nested_stage,
    empty_normalizer,
    reversed_added_tokens,
]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.randoms(use_true_random=False),
    chosen=st.sets(st.sampled_from(range(len(SPELLINGS)))),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
def test_every_spelling_of_one_tokenizer_has_one_fingerprint(
    description: Description, seed: random.Random, chosen: set[int], indent: int | None, ascii_only: bool
) -> None:
    spelled = copy.deepcopy(description)
    for index in sorted(chosen):
        SPELLINGS[index](spelled)
    text = json.dumps(shuffled(spelled, seed), indent=indent, ensure_ascii=ascii_only)
    assert tokenizer_sha256(json.loads(text)) == tokenizer_sha256(description)
    assert ChatTokenizer(text.encode()).fingerprint == tokenizer_sha256(description)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_file_saved_again_by_the_library_has_the_same_fingerprint(kind: str, description: Description) -> None:
    described = copy.deepcopy(description if kind == "bpe" else unigram())
    before = tokenizer_sha256(described)
    resaved(described)
    assert tokenizer_sha256(described) == before


def test_the_last_bits_of_a_score_and_older_words_for_the_same_prefix_change_nothing() -> None:
    described = unigram()
    before = tokenizer_sha256(described)
    described["model"]["vocab"][2][1] = -7.234451293945312
    described["model"]["vocab"][1][1] = -1
    described["normalizer"] = described["normalizer"]["normalizers"][0]
    described["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
    assert tokenizer_sha256(described) == before
    described["pre_tokenizer"]["add_prefix_space"] = False
    assert tokenizer_sha256(described) != before


def swapped_ids(described: Description) -> None:
    vocab = described["model"]["vocab"]
    first, second = list(vocab)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def swapped_merges(described: Description) -> None:
    merges = described["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def fewer_merges(described: Description) -> None:
    described["model"]["merges"].pop()


def flag(name: str) -> Callable[[Description], None]:
    def flip(described: Description) -> None:
        described["added_tokens"][2][name] = not described["added_tokens"][2][name]

    return flip


def setting(path: str, value: Any) -> Callable[[Description], None]:
    def change(described: Description) -> None:
        *parents, leaf = path.split(".")
        place: Any = described
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        place[leaf] = value

    return change


CHANGES = {
    "swapped ids": swapped_ids,
    "swapped merges": swapped_merges,
    "fewer merges": fewer_merges,
    **{name: flag(name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")},
    "added token's text": setting("added_tokens.2.content", "<|other|>"),
    "added token's id": setting("added_tokens.6.id", 400),
    "normalizer": setting("normalizer", {"type": "NFC"}),
    "pattern": setting("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "."}),
    "prefix space": setting("pre_tokenizer.pretokenizers.1.add_prefix_space", True),
    "byte-level regex": setting("pre_tokenizer.pretokenizers.1.use_regex", True),
    "opening": setting("post_processor.single", [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]),
    "decoder": setting("decoder", {"type": "Fuse"}),
    "byte fallback": setting("model.byte_fallback", True),
    "ignored merges": setting("model.ignore_merges", True),
    "unknown token": setting("model.unk_token", "<|im_end|>"),
    "dropout": setting("model.dropout", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_what_a_tokenizer_does_has_another_fingerprint(change: str, description: Description) -> None:
    """I1: an engine whose ids mean something else must not pass for ours."""
    changed = copy.deepcopy(description)
    CHANGES[change](changed)
    assert changed != description
    assert tokenizer_sha256(changed) != tokenizer_sha256(description)


def test_both_sides_say_the_same_fingerprints_of_one_folder(tiny_model: Path, description: Description) -> None:
    prints = read_folder(tiny_model).fingerprints
    assert prints["tokenizer"] == ChatTokenizer.load(tiny_model).fingerprint == tokenizer_sha256(description)


def test_a_tokenizer_whose_added_tokens_stand_in_any_order_spells_alike(description: Description) -> None:
    """I1: the library would number them by their places."""
    turned = copy.deepcopy(description)
    reversed_added_tokens(turned)
    text = "<|im_start|>a<think>b</tool_call><|im_end|>"
    ids = [ChatTokenizer(json.dumps(each).encode()).encode(text).tolist() for each in (description, turned)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("broken", [{}, {"model": {}}, {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}])
def test_what_is_no_tokenizer_has_no_fingerprint(broken: Description) -> None:
    with pytest.raises(IdentityMismatch, match="not a tokenizer description"):
        tokenizer_sha256(broken)
