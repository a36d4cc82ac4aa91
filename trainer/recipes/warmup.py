"""A few supervised steps on a fresh checkpoint, so that a policy exists that reinforcement can improve.

conversations → chat template → token ids, loss on what assistants wrote (their end token too) → AdamW → the same folder
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gateway.contracts.generation import JsonValue
from trainer.recipes.calculator import CalculatorRecipe, corpus, demonstrations
from trainer.recipes.checkpoint import TinyMoeShape, make_checkpoint, save_model

_ASSISTANT = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
_IGNORED = -100
_GRAD_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class WarmupSettings:
    """`learning_rate` is reached after `ramp_steps`, and lowered linearly over the last `decay_share` of steps."""

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 2e-3
    ramp_steps: int = 10
    decay_share: float = 0.3


class Rendered(NamedTuple):
    """A whole conversation as token ids, and its labels: -100 outside what assistants wrote. Equal lengths."""

    ids: list[int]
    labels: list[int]


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

    `conversations` holds steps * batch_size of them; each is used once, in order. Deterministic under `seed` on
    one thread.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    rows = (rendered(tokenizer, conversation, tools) for conversation in conversations)
    for step, batch in enumerate(_batches(rows, settings.batch_size, pad_token_id=tokenizer.pad_token_id)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())
    save_model(model, folder)


def rendered(tokenizer: Any, conversation: Sequence[JsonValue], tools: Sequence[JsonValue]) -> Rendered:
    """Render with the model's own template; what an assistant wrote ends with its end token."""
    text = tokenizer.apply_chat_template(list(conversation), tools=list(tools), tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = [match.span(1) for match in _ASSISTANT.finditer(text)]
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(start <= begin and end <= stop for start, stop in spans) else _IGNORED
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Rendered(ids, labels)


def _learning_rate(step: int, settings: WarmupSettings) -> float:
    ramp = (step + 1) / settings.ramp_steps
    decay = (settings.steps - step) / (settings.steps * settings.decay_share)
    return settings.learning_rate * min(1.0, ramp, decay)


def _batches(rows: Iterable[Rendered], batch_size: int, *, pad_token_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """In order: sorting by length would save padding, but batches of one kind unlearn the other."""
    remaining = iter(rows)
    while batch := list(islice(remaining, batch_size)):
        yield _padded(batch, pad_token_id)


def _padded(rows: Sequence[Rendered], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, int64[B, longest], padded on the right."""

    def stacked(values: Iterable[list[int]], filler: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)

    return {
        "input_ids": stacked((row.ids for row in rows), pad_token_id),
        "attention_mask": stacked(([1] * len(row.ids) for row in rows), 0),
        "labels": stacked((row.labels for row in rows), _IGNORED),
    }


def main(arguments: Sequence[str]) -> int:
    """`python -m trainer.recipes.warmup FOLDER SEED STEPS`: a new checkpoint, warmed up on the calculator's
    demonstrations; prints `step loss` lines."""
    folder, seed, steps = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    settings = WarmupSettings(steps=steps)
    make_checkpoint(folder, corpus=corpus(), seed=seed, shape=TinyMoeShape())
    warm_up(
        folder,
        demonstrations(seed, settings.steps * settings.batch_size),
        tools=CalculatorRecipe.tools,
        seed=seed,
        settings=settings,
        on_step=lambda step, loss: print(step, f"{loss:.3f}", flush=True),  # noqa: T201  # its output is its interface
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
