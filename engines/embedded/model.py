"""Load an unmodified transformers model for the engine, and new weights into it while it serves."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engines.embedded.cache import ATTENTION_NAME
from engines.embedded.experts import routing_shape
from engines.identity import UNKNOWN_FOLDER, FolderIdentity, read_folder
from gateway.contracts.errors import ConfigurationError, IdentityMismatch, TransportError
from gateway.contracts.experts import RoutingShape
from gateway.contracts.fingerprints import in_order_of_ids

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

EXPERTS_IMPLEMENTATION = "grouped_mm"
"""Measured on one thread, 32 tokens, 4 layers of 8 experts: grouped_mm 2.4 ms, eager 2.9, batched_mm 15.4 (float32)."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve. `end_token_ids` end a sequence unless `ignore_eos`; `tokenizer` None: ids only.

    `folder`: what its files said when it was loaded.
    """

    network: PreTrainedModel
    dtype: torch.dtype
    routing: RoutingShape | None
    vocab_size: int
    end_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    folder: FolderIdentity = UNKNOWN_FOLDER


def load_model(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """Read a Hugging Face checkpoint folder; raises ConfigurationError with what is missing."""
    transformers.utils.logging.disable_progress_bar()
    try:
        network = _read_network(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"{folder}: cannot be loaded as a model: {_first_line(error)}") from error
    try:
        identity = read_folder(folder)
    except (OSError, ValueError, IdentityMismatch) as error:
        raise ConfigurationError(f"{folder}: cannot be read as a model: {_first_line(error)}") from error
    return LoadedModel(
        network=network,
        dtype=dtype,
        routing=routing_shape(network.config),
        vocab_size=network.config.vocab_size,
        end_token_ids=_end_token_ids(network),
        tokenizer=_read_tokenizer(folder / "tokenizer.json"),
        folder=identity,
    )


def load_weights(model: LoadedModel, folder: Path) -> None:
    """Copy a checkpoint's weights into a serving model; on TransportError nothing has changed."""
    if not (folder / "config.json").is_file():
        raise TransportError(f"no checkpoint at {folder}: no config.json there")
    try:
        fresh = _read_network(folder, model.dtype).state_dict()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TransportError(f"cannot read the checkpoint at {folder}: {_first_line(error)}") from error
    own = model.network.state_dict()
    for name, tensor in own.items():
        if name not in fresh or fresh[name].shape != tensor.shape:
            raise TransportError(f"the checkpoint at {folder} has no {name} of shape {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(fresh[name])


def _read_network(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    options = {"experts_implementation": EXPERTS_IMPLEMENTATION} if routing_shape(config) is not None else {}
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True, **options
    )
    if getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None):
        raise ValueError("sliding-window attention is not supported by the embedded engine")
    return network.eval().requires_grad_(False)


def _read_tokenizer(file: Path) -> Tokenizer | None:
    if not file.is_file():
        return None
    return Tokenizer.from_str(json.dumps(in_order_of_ids(json.loads(file.read_bytes()))))


def _end_token_ids(network: PreTrainedModel) -> frozenset[int]:
    ends: set[int] = set()
    for config in (network.config, network.generation_config):
        eos = getattr(config, "eos_token_id", None)
        ends.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ends)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
