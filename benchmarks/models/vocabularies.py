"""Small tokenizers of the kinds that real models have, trained here on a few lines of text.

They differ in what makes token identity hard: how a text's beginning is treated (prefix space: never, always, first
piece only), how space is spelled, what happens to characters that the vocabulary lacks, and which space added tokens
swallow. About a thousand entries each; made once per process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks.models.words import CORPUS

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_NUM_PIECES = 900


def make_tokenizer(kind: str, *, special: Sequence[str], markup: Sequence[str]) -> Tokenizer:
    """A tokenizer of one of `VOCABULARIES` with control tokens added: `special` ones, and `markup` that is language.

    The kind "space_eaters" swallows the space behind every second special token, and before some markup.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    eats = kind == "space_eaters"
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=eats and i % 2 == 0)
            for i, text in enumerate(dict.fromkeys(special))
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, special=False, normalized=False, lstrip=eats and text.startswith("</"))
            for text in dict.fromkeys(markup)
        ]
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    """GPT-2's bytes behind a splitting pattern, as Qwen, Llama 3, GLM and DeepSeek have it."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace(scheme: str) -> Callable[[], Tokenizer]:
    """SentencePiece BPE as newer conversions have it: no words, ▁ for space, bytes for what is unknown."""

    def make() -> Tokenizer:
        tokenizer = _sentencepiece_bpe()
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        return tokenizer

    return make


def _legacy() -> Tokenizer:
    """The same as Llama 2's files have it: a normalizer puts ▁ before every text and for every space."""
    return _sentencepiece_bpe()


def _unigram() -> Tokenizer:
    """SentencePiece Unigram: pieces by probability, bytes for what is unknown, a prefix space always."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=_NUM_PIECES, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    floor = min(score for _, score in model["vocab"]) - 10
    model["vocab"] = [*model["vocab"], *([text, floor] for text in _BYTES)]
    model["byte_fallback"] = True
    description["decoder"] = json.loads(_sentencepiece_decoder())
    return Tokenizer.from_str(json.dumps(description))


VOCABULARIES: Mapping[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "metaspace_always": _metaspace("always"),
    "metaspace_first": _metaspace("first"),
    "legacy_prefix": _legacy,
    "unigram": _unigram,
    "space_eaters": _legacy,
}
"""kind → how it is made, without control tokens"""


@cache
def _trained(kind: str) -> str:
    return VOCABULARIES[kind]().to_str()


def _sentencepiece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # Trained on words, so that pieces stay short; used on whole texts, as SentencePiece does.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_PIECES + len(_BYTES), special_tokens=["<unk>", *_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] == "<unk>"]
    description["pre_tokenizer"] = None
    description["decoder"] = json.loads(_sentencepiece_decoder())
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _sentencepiece_decoder() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return json.dumps(json.loads(tokenizer.to_str())["decoder"])
