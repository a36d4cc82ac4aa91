"""Settings of the embedded engine; names are SGLang's where it has the same thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gateway.contracts.errors import ConfigurationError


class Dtype(StrEnum):
    """What weights and cache are held in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine process.

    context_length: 0 takes the model's own. retained_slots: slots on top of the running ones that keep the prefixes of
    ended turns. chunked_prefill_size: prompt tokens computed in one step. stream_interval: tokens between two chunks of
    a stream. threads: of torch; more than one pays only where nothing else runs on the machine.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: Dtype = Dtype.BFLOAT16
    max_running_requests: int = 64
    retained_slots: int = 64
    context_length: int = 0
    chunked_prefill_size: int = 512
    weight_version: str = "default"
    served_model_name: str = ""
    seed: int = 0
    stream_interval: int = 1
    incremental_streaming_output: bool = False
    skip_tokenizer_init: bool = False
    enable_return_routed_experts: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.model.is_dir():
            raise ConfigurationError(f"--model {self.model}: no such folder")
        if not 0 <= self.port < 65_536:
            raise ConfigurationError(f"--port {self.port}: not a TCP port")
        for name in ("max_running_requests", "chunked_prefill_size", "stream_interval", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.retained_slots < 0 or self.context_length < 0:
            raise ConfigurationError("retained_slots and context_length must not be negative")
