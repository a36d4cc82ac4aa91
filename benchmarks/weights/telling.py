"""Checkpoints whose every sampled token tells which of them it is from, and plain forwards of them to check by.

Version `v` can only say tokens of the `v`-th share of the vocabulary: one dimension of the residual stream is constant
and the output layer reads it with another sign for each share. All else (attention, experts, the choice within the
share) is random, of other numbers in each version, so that a key, a value or a routing row of other weights shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from trainer.recipes.checkpoint import CONTROL_TOKENS, MARKUP_TOKENS, TinyMoeShape, make_checkpoint, save_model

_CORPUS = ("What is the sum of these numbers, and of those that went before? Say it in a few words, then go on. " * 8,)
_SHAPE = TinyMoeShape(hidden_size=64, expert_size=64, vocab_size=400)
_CONSTANT = 4.0
"""What the first dimension of the residual stream holds at every position."""
_SIGN_WEIGHT = 60.0
"""Tokens of other shares lie far below in logits: they are not sampled in the life of a machine."""
TIE_WITHIN = 1e-4
"""Logits of routers, most of which lie within 5: two experts that differ by less may change places where a sum is
taken in another order, which moves them by 1e-5."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class TellingWeights:
    """Checkpoint folders by policy version, and the tokens that each can say."""

    folders: tuple[Path, ...]
    shares: tuple[frozenset[int], ...]

    def version_of(self, token_id: int) -> int:
        """The only version that samples this token; raises ValueError for one that none does."""
        for version, share in enumerate(self.shares):
            if token_id in share:
                return version
        raise ValueError(f"token {token_id} is of no version's share")


def make_telling(folder: Path, *, num_versions: int, seed: int) -> TellingWeights:
    """Write checkpoints `policy-000000`, … into `folder`; the same seed gives the same weights."""
    torch.set_num_threads(1)
    disable_progress_bar()
    base = folder / "base"
    make_checkpoint(base, corpus=_CORPUS, seed=seed, shape=_SHAPE)
    words = _plain_words(base)
    shares = tuple(frozenset(words[version::num_versions]) for version in range(num_versions))
    folders = []
    for version, share in enumerate(shares):
        own = folder / f"policy-{version:06d}"
        save_model(_telling(base, share, seed=seed * 1000 + version), own)
        for name in _TOKENIZER_FILES:
            shutil.copy(base / name, own / name)
        folders.append(own)
    return TellingWeights(tuple(folders), shares)


def _plain_words(folder: Path) -> list[int]:
    """Tokens that stand for printable ASCII and begin no markup."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab = {
        token_id: tokenizer.decode([token_id])
        for token, token_id in tokenizer.get_vocab().items()
        if token not in (*CONTROL_TOKENS, *MARKUP_TOKENS)
    }
    return sorted(i for i, text in vocab.items() if text.isascii() and text.isprintable() and "<" not in text)


def _telling(base: Path, share: frozenset[int], *, seed: int) -> PreTrainedModel:
    model = Qwen3MoeForCausalLM.from_pretrained(base, dtype=torch.float32)
    randomness = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.3 if "embed" in name or "lm_head" in name else 0.15, generator=randomness)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                _silence_first_output(weight)
            if name.endswith("layernorm.weight"):
                weight.fill_(2.0)
                weight[0] = 0.0  # the layers do not see the constant
            if name.endswith("experts.down_proj"):
                _silence_first_output(weight)
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        model.lm_head.weight[:, 0] = -_SIGN_WEIGHT
        model.lm_head.weight[sorted(share), 0] = _SIGN_WEIGHT
    return model


def _silence_first_output(weight: torch.Tensor) -> None:
    """[…, out, in]: nothing is added to the constant."""
    weight[..., 0, :] = 0.0


class Tie(NamedTuple):
    """A place where the last expert that was chosen and the best that was not are all but equal."""

    layer: int
    position: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Of T tokens. logprobs: float32[T-1] of tokens 1 … T-1; experts: int64[T-1, layers, top_k] of tokens 0 … T-2,
    sorted; ties: in order of position."""

    logprobs: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int64]
    ties: tuple[Tie, ...]


class Forward:
    """Plain transformers forwards of all versions, float32: what each of them computes on a sequence, alone."""

    def __init__(self, weights: TellingWeights) -> None:
        self._models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in weights.folders]
        self._flipped: frozenset[Tie] = frozenset()
        self._chosen: list[torch.Tensor] = []
        self._ties: list[Tie] = []
        for model in self._models:
            for number, layer in enumerate(model.model.layers):
                layer.mlp.gate.register_forward_hook(partial(self._route, number))

    def score(self, version: int, token_ids: Sequence[int], flipped: frozenset[Tie] = frozenset()) -> Scored:
        """What a version computes; flipped: where the other expert is taken."""
        model = self._models[version]
        ids = torch.tensor([list(token_ids)])
        self._flipped, self._chosen, self._ties = flipped, [], []
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            told = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        experts = np.sort(torch.stack(self._chosen, dim=1)[:-1].numpy(), axis=-1)
        ties = tuple(sorted(self._ties, key=lambda tie: tie.position))
        return Scored(told.float().numpy(), experts, ties)

    def _route(self, layer: int, router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, chosen = output
        best = logits.topk(router.top_k + 1)
        near = best.values[:, -2] - best.values[:, -1] < TIE_WITHIN
        self._ties += [Tie(layer, position) for position in near.nonzero()[:, 0].tolist()]
        for position in [tie.position for tie in self._flipped if tie.layer == layer]:
            chosen[position] = torch.cat([best.indices[position, :-2], best.indices[position, -1:]])
            probabilities = logits[position].softmax(dim=-1)[chosen[position]]
            scores[position] = probabilities / probabilities.sum() if router.norm_topk_prob else probabilities
        self._chosen.append(chosen)
        return logits, scores, chosen


@lru_cache(maxsize=2)
def forward_of(weights: TellingWeights) -> Forward:
    """Loaded once for as many judgements as there are."""
    return Forward(weights)
