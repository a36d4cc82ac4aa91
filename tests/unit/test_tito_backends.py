"""Faster tokenizer libraries serve only where they are proven equal to `tokenizers`, and only as long as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models.vocabularies import VOCABULARIES, make_tokenizer
from gateway.contracts.generation import TokenIds
from gateway.tito import backends
from gateway.tito.backends import BackendChoice, BackendUnfit, candidates, first_difference, open_backend
from gateway.tito.spellings import spelling_texts
from gateway.tito.tokenizer import ChatTokenizer, FoundBackend

LIBRARIES = [choice for choice in BackendChoice if choice not in (BackendChoice.AUTO, BackendChoice.TOKENIZERS)]
SPECIAL, MARKUP = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def vocabulary(kind: str) -> bytes:
    return make_tokenizer(kind, special=SPECIAL, markup=MARKUP).to_str().encode()


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("choice", [*LIBRARIES, BackendChoice.AUTO])
def test_what_a_proven_library_spells_is_what_tokenizers_spells(kind: str, choice: BackendChoice) -> None:
    """A library that passes the probe set spells texts that are not in it alike too; one that does not is not used."""
    reference, tokenizer = ChatTokenizer(vocabulary(kind)), ChatTokenizer(vocabulary(kind))
    tokenizer.prove_backend(choice)
    if tokenizer.backend.name == "tokenizers":
        assert set(tokenizer.backend.reasons) == {candidate.value for candidate in candidates(choice)}
        return
    texts = st.lists(st.sampled_from([*SPECIAL, *MARKUP, " ", "\n", "the", "0", "é", "<|im_", "end|>"]) | st.text())

    @settings(max_examples=60, derandomize=True)
    @given(texts.map("".join))
    def check(text: str) -> None:
        assert tokenizer.encode(text).tolist() == reference.encode(text).tolist()

    check()
    while tokenizer.check_backend():
        pass
    assert tokenizer.backend.num_checked
    assert not tokenizer.backend.num_alarms


def test_an_ordinary_vocabulary_is_spelled_by_a_faster_library() -> None:
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    tokenizer.prove_backend(BackendChoice.AUTO)
    assert tokenizer.backend.name == BackendChoice.FASTOKENS.value


def test_texts_with_a_character_that_a_library_takes_for_another_kind_are_left_to_tokenizers() -> None:
    """U+180E was a space in older versions of Unicode, and is one to fastokens' patterns."""
    reference, tokenizer = ChatTokenizer(vocabulary("byte_level")), ChatTokenizer(vocabulary("byte_level"))
    tokenizer.prove_backend(BackendChoice.FASTOKENS)
    text = "\u180e[str and \u180e.py"
    fast = open_backend(BackendChoice.FASTOKENS, vocabulary("byte_level"))
    assert fast(text).tolist() != reference.encode(text).tolist()
    assert tokenizer.encode(text).tolist() == reference.encode(text).tolist()
    assert (tokenizer.backend.name, tokenizer.backend.num_odd_characters) == ("fastokens", 1)


def test_tokenizers_serves_where_it_is_chosen() -> None:
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    tokenizer.prove_backend(BackendChoice.TOKENIZERS)
    assert (tokenizer.backend.name, tokenizer.backend.reasons) == ("tokenizers", {})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: d["model"]["merges"].pop(200), id="one merge is missing"),
        pytest.param(lambda d: d.update(normalizer={"type": "NFC"}), id="it composes characters"),
        pytest.param(lambda d: d["added_tokens"].pop(), id="an added token is missing"),
        pytest.param(lambda d: d["added_tokens"][0].update(rstrip=True), id="an added token eats space"),
        pytest.param(
            lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                Regex=d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].replace("{1,3}", "{1,4}")
            ),
            id="digits are grouped otherwise",
        ),
    ],
)
def test_a_library_that_differs_in_one_thing_is_told(change: object) -> None:
    """The probe set can fail: it finds each of the small differences that two implementations may have."""
    description = json.loads(vocabulary("byte_level"))
    changed = json.loads(json.dumps(description))
    assert callable(change)
    change(changed)
    ours, theirs = ChatTokenizer(json.dumps(description).encode()), ChatTokenizer(json.dumps(changed).encode())
    words = [ours.decode([i]) for i in range(ours.vocab_size) if i not in ours.added_tokens]
    texts = spelling_texts([word for word in words if "\ufffd" not in word], [*SPECIAL, *MARKUP])
    assert first_difference(theirs.encode, ours.encode, texts) is not None


def test_a_difference_in_operation_ends_the_use_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are spelled again; the first one that differs is an alarm, and `tokenizers` serves from then on."""
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    fast = open_backend(BackendChoice.FASTOKENS, vocabulary("byte_level"))

    def wrong_about_plums(text: str) -> TokenIds:
        return fast(text)[1:] if "plums" in text else fast(text)

    monkeypatch.setitem(backends.OPENERS, BackendChoice.FASTOKENS, lambda _: wrong_about_plums)
    tokenizer.prove_backend(BackendChoice.FASTOKENS)
    assert tokenizer.backend.name == "fastokens"
    tokenizer.encode("Four plums.")
    assert tokenizer.checks_due
    tokenizer.check_backend()
    assert (tokenizer.backend.name, tokenizer.backend.num_alarms) == ("tokenizers", 1)
    assert "plums" in tokenizer.backend.reasons["fastokens"]
    assert tokenizer.decode(tokenizer.encode("Four plums.")) == "Four plums."


def test_a_text_that_a_library_refuses_is_spelled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    fast = open_backend(BackendChoice.FASTOKENS, vocabulary("byte_level"))

    def afraid_of_plums(text: str) -> TokenIds:
        if "plums" in text:
            raise RuntimeError("plums")
        return fast(text)

    monkeypatch.setitem(backends.OPENERS, BackendChoice.FASTOKENS, lambda _: afraid_of_plums)
    tokenizer.prove_backend(BackendChoice.FASTOKENS)
    assert tokenizer.decode(tokenizer.encode("Four plums.")) == "Four plums."
    assert (tokenizer.backend.name, tokenizer.backend.num_alarms) == ("tokenizers", 1)


def test_a_lone_surrogate_is_no_fault_of_the_library() -> None:
    """What is no text is refused as before, and the library goes on."""
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    tokenizer.prove_backend(BackendChoice.FASTOKENS)
    with pytest.raises(TypeError):
        tokenizer.encode("a\ud800")
    assert tokenizer.backend.name == "fastokens"


def test_a_library_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.OPENERS, BackendChoice.KITOKEN, _not_installed)
    with pytest.raises(BackendUnfit, match="not installed"):
        open_backend(BackendChoice.KITOKEN, b"{}")


def _not_installed(tokenizer_json: bytes) -> backends.Spell:
    raise ModuleNotFoundError(f"no library for {len(tokenizer_json)} bytes")


def test_a_library_that_remembers_all_words_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: gigatoken's grows with every new word."""
    monkeypatch.setitem(backends.MAX_CHARACTERS, BackendChoice.GIGATOKEN, 1_000)
    tokenizer = ChatTokenizer(vocabulary("metaspace_always"))
    tokenizer.prove_backend(BackendChoice.GIGATOKEN)
    before = tokenizer._spell
    expected = tokenizer.encode("Four plums. " * 200)
    assert tokenizer.checks_due
    while tokenizer.check_backend():
        pass
    assert tokenizer._spell is not before
    assert not tokenizer.checks_due
    np.testing.assert_array_equal(tokenizer.encode("Four plums. " * 200), expected)


def test_the_probe_set_is_the_same_each_time(tiny_model: Path) -> None:
    words, added = ["a", "b", " c"], ["<|x|>"]
    assert list(spelling_texts(words, added)) == list(spelling_texts(words, added))


def test_a_library_that_was_proven_elsewhere_is_opened_once_a_text_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes memory that a gateway without turns need not have; what is spelled meanwhile is the same."""
    reference, tokenizer = ChatTokenizer(vocabulary("byte_level")), ChatTokenizer(vocabulary("byte_level"))
    opened: list[bytes] = []

    def opener(tokenizer_json: bytes) -> backends.Spell:
        opened.append(tokenizer_json)
        return reference.encode

    monkeypatch.setitem(backends.OPENERS, BackendChoice.FASTOKENS, opener)
    tokenizer.use_backend(FoundBackend("fastokens"))
    assert tokenizer.backend.name == "fastokens"
    assert not tokenizer.checks_due
    assert tokenizer.encode("Four plums.").tolist() == reference.encode("Four plums.").tolist()
    assert tokenizer.checks_due
    assert opened == []
    tokenizer.check_backend()
    tokenizer.encode("Four plums.")
    assert len(opened) == 1
    assert tokenizer.backend.name == "fastokens"


def test_a_proven_library_that_cannot_be_opened_leaves_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(tokenizer_json: bytes) -> backends.Spell:
        raise ImportError

    monkeypatch.setitem(backends.OPENERS, BackendChoice.FASTOKENS, opener)
    tokenizer = ChatTokenizer(vocabulary("byte_level"))
    tokenizer.use_backend(FoundBackend("fastokens"))
    tokenizer.encode("Four plums.")
    tokenizer.check_backend()
    assert (tokenizer.backend.name, tokenizer.backend.reasons) == ("tokenizers", {"fastokens": "not installed"})
    assert not tokenizer.checks_due
