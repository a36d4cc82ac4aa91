"""Make a small mixture-of-experts checkpoint in Hugging Face format from nothing: random weights, own tokenizer, own
chat template. What it makes loads in transformers, SGLang and vLLM; it knows nothing until it is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CHAT_TEMPLATE_FILE = Path(__file__).parent / "data" / "chat_template.jinja"

END_OF_TEXT = "<|endoftext|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", TURN_END)
"""Special: never in ordinary text."""
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""One token each, but part of what a model writes."""

_WORDS_AND_SINGLE_DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@dataclass(frozen=True, slots=True)
class TinyMoeShape:
    """Of the model: the defaults make about 2 million parameters."""

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    num_experts: int = 8
    top_k: int = 2
    expert_size: int = 128
    vocab_size: int = 512
    context_length: int = 2048


def make_checkpoint(folder: Path, *, corpus: Iterable[str], seed: int, shape: TinyMoeShape) -> None:
    """Write config, random float32 weights, tokenizer, chat template and generation config into `folder`.

    The tokenizer is a byte-level BPE trained on `corpus`; digits stay single tokens. The same corpus, seed and shape
    give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, vocab_size=shape.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE_FILE.read_text()
    tokenizer.save_pretrained(folder)
    end_of_text, turn_end = (tokenizer.vocab[token] for token in (END_OF_TEXT, TURN_END))
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 2,
        moe_intermediate_size=shape.expert_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,  # type: ignore[call-arg]  # a field that its annotations lack
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=shape.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        # Three times the usual 0.02: so small a model learns to copy in a third of the steps.
        initializer_range=0.06,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=False,  # SGLang 0.5.23 reads this architecture as untied whatever the config says
        bos_token_id=None,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[turn_end, end_of_text],
        pad_token_id=end_of_text,
    )
    save_model(model, folder)


def train_tokenizer(corpus: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, control and markup tokens included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS_AND_SINGLE_DIGITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configuration in the form of published Qwen3-MoE checkpoints.

    Those call the number of experts `num_experts`, which other programs read; transformers 5 reads that name too but
    writes another.
    """
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_experts": config["num_local_experts"]}, indent=2, sort_keys=True) + "\n")
