"""A few supervised steps on a fresh checkpoint, so that a policy exists that reinforcement can improve.

conversations → chat template → token ids, loss on what assistants wrote (their end token too) → AdamW → the same folder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gateway.contracts.generation import JsonValue
from trainer.recipes.checkpoint import save_model

_ASSISTANT = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class WarmupSettings:
    """`learning_rate` is reached after `ramp_steps` and then held."""

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    ramp_steps: int = 10


def warm_up(
    folder: Path,
    conversations: Sequence[Sequence[JsonValue]],
    *,
    tools: Sequence[JsonValue],
    seed: int,
    settings: WarmupSettings,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the checkpoint in `folder` in place; `on_step(steps done, loss)` follows it.

    `conversations` holds at least steps * batch_size of them; each is used once, in order. Deterministic under `seed`
    on one thread.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step, batch in enumerate(_batches(tokenizer, conversations, tools, settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.ramp_steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())
    save_model(model, folder)


def rendered(
    tokenizer: Any, conversation: Sequence[JsonValue], tools: Sequence[JsonValue]
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and its labels: equal lengths, -100 outside what assistants wrote."""
    text = tokenizer.apply_chat_template(list(conversation), tools=list(tools), tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = [match.span(1) for match in _ASSISTANT.finditer(text)]
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(start <= begin and end <= stop for start, stop in spans) else _IGNORED
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _batches(
    tokenizer: Any,
    conversations: Sequence[Sequence[JsonValue]],
    tools: Sequence[JsonValue],
    settings: WarmupSettings,
) -> Iterator[dict[str, torch.Tensor]]:
    """input_ids, attention_mask and labels, int64[B, longest], padded on the right."""
    for step in range(settings.steps):
        at = step * settings.batch_size
        rows = [rendered(tokenizer, c, tools) for c in conversations[at : at + settings.batch_size]]
        longest = max(len(ids) for ids, _ in rows)
        padding = [longest - len(ids) for ids, _ in rows]
        yield {
            "input_ids": torch.tensor(
                [ids + [tokenizer.pad_token_id] * pad for (ids, _), pad in zip(rows, padding, strict=True)]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * pad for (ids, _), pad in zip(rows, padding, strict=True)]
            ),
            "labels": torch.tensor([labels + [_IGNORED] * pad for (_, labels), pad in zip(rows, padding, strict=True)]),
        }
