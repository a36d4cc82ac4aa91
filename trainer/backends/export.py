"""A policy as a Hugging Face folder that looks like the one it came from: the same names, dtypes, config and tokenizer.

Files other than weights are copied byte for byte: transformers would write config.json with names of its own
(`num_local_experts`), which other programs do not read, and the tokenizer never changes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

_CARRIED_OVER = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_WEIGHT_INDEX = ".index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class SourceFolder:
    """The checkpoint that training started from, as far as an export must resemble it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dtype_of = _stored_dtypes(path)
        config = json.loads((path / "config.json").read_text())
        named = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
        self._dtype = getattr(torch, str(named), torch.float32) if named else torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a tensor of that name is stored there; the config's own for a name that is not."""
        return self._dtype_of.get(name, self._dtype)

    @property
    def is_exact(self) -> bool:
        """Whether bfloat16 holds all that it stores."""
        stored = set(self._dtype_of.values()) or {self._dtype}
        return stored <= {torch.bfloat16}


@torch.no_grad()
def write_policy(folder: Path, model: Any, state: Mapping[str, Tensor], source: SourceFolder) -> None:
    """Write `state` (of the transformers model `model`, by its names) under the names and in the dtypes of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    ignored = set(model._keys_to_ignore_on_save or ())
    tensors = {name: tensor for name, tensor in state.items() if name not in ignored}
    tensors = revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))
    stored = {name: _on_host(tensor, source.dtype_of(name)) for name, tensor in tensors.items()}
    huggingface_hub.save_torch_state_dict(stored, folder, metadata={"format": "pt"})
    for file in source.path.iterdir():
        if file.is_file() and file.suffix in _CARRIED_OVER and not file.name.endswith(_WEIGHT_INDEX):
            shutil.copy2(file, folder / file.name)
        elif file.is_dir() and "chat_template" in file.name:
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with memory of its own: experts are views of one array, which safetensors refuses."""
    tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """By tensor name, from the headers of a folder's safetensors files (8 bytes of length, then JSON)."""
    dtypes: dict[str, torch.dtype] = {}
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        dtypes |= {name: _DTYPES[entry["dtype"]] for name, entry in header.items() if entry["dtype"] in _DTYPES}
    return dtypes
