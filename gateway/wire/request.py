"""One model call as an agent asked for it, in whatever dialect: what all of them are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.media import Blob

PROTECTED = frozenset(
    (
        "audio_data", "background", "beam_width", "bootstrap_host", "bootstrap_pair_key", "bootstrap_port",
        "bootstrap_room", "custom_logit_processor", "data_parallel_rank", "decode_tp_size", "detokenize",
        "disagg_prefill_dp_rank", "flat_logprobs", "http_worker_ipc", "image_data", "input_embeds", "input_ids",
        "kv_transfer_params", "logprob_start_len", "logprob_token_ids", "lora_id", "lora_path", "mm_content_hashes",
        "mm_hashes", "need_wait_for_mm_inputs", "num_items_assigned", "output_kind", "positional_embed_overrides",
        "prompt_logprobs", "prompt_token_ids", "received_time", "return_bytes", "return_flat_raw_output_top_logprobs",
        "return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64", "return_indexer_topk", "return_logprob",
        "return_prompt_token_ids", "return_text_in_logprobs", "rid", "routed_dp_rank", "routed_experts_prompt_start",
        "routed_experts_start_len", "sampling_params", "session_id", "session_params", "skip_clone",
        "skip_special_tokens", "text", "token_ids_logprob", "top_logprobs_num", "trace_decode_token_ids",
        "use_beam_search", "video_data", "weight_version",
    )
)  # fmt: skip
"""Fields of the engines' own requests, and of their sampling parameters, which the gateway alone may set (I7): what is
recorded, in which form it comes, which weights sample, where it runs, and code that would run in the engine."""


def protected_names(fields: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Which fields of a request, null ones left aside, only the gateway may set."""
    if PROTECTED.isdisjoint(fields):
        return ()
    return tuple(sorted(name for name in PROTECTED & fields.keys() if fields[name] is not None))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the captured arrays the client asked to see; what is recorded does not depend on it (I7).

    num_top_logprobs: how many of the likeliest tokens at each position, beside the log-prob of the sampled one. Engines
    are asked for them, and records hold them, only where this is above 0.
    """

    token_ids: bool
    routed_experts: bool
    logprobs: bool
    usage_chunk: bool
    num_top_logprobs: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RawPrompt:
    """A prompt without messages: exactly one of int32[P] ids and a text. adds_special_tokens: a text gets the tokens
    that the tokenizer itself puts before texts. media: its parts that are no text (`contracts.media`)."""

    token_ids: TokenIds | None = None
    text: str | None = None
    adds_special_tokens: bool = True
    media: tuple[JsonValue, ...] = ()

    def __post_init__(self) -> None:
        if (self.token_ids is None) == (self.text is None):
            raise InvalidRequest("prompt: expected either token ids or a text")


class TurnRequest(msgspec.Struct, frozen=True):
    """One call as asked; messages and tools as OpenAI's chat completions spell them.

    prompt: of a call that has no messages, which are then (); None for a conversation.
    sampling: normalised names (`max_new_tokens`, `temperature`, …) → values, only those that the request has.
    template_arguments: `chat_template_kwargs`, `reasoning_effort` and `documents`. digest: sha256 hex of the body.
    kept: what the dialect must find again in the record (meta "request"); nothing else reads it.
    required_calls: names of functions of which the reply must call one; () leaves it to the model. several_calls:
    whether such a reply may call more than one. blobs: the bytes that its parts refer to, by sha256. has_media: whether
    any part of its messages is no text.
    """

    model: str | None
    messages: tuple[JsonValue, ...]
    tools: tuple[JsonValue, ...]
    calls_tools: bool
    template_arguments: Mapping[str, JsonValue]
    sampling: Mapping[str, JsonValue]
    num_choices: int
    stream: bool
    wanted: Wanted
    passthrough: Mapping[str, JsonValue]
    ignored_fields: tuple[str, ...]
    digest: str
    num_bytes: int
    kept: Mapping[str, JsonValue] = msgspec.field(default_factory=dict)
    prompt: RawPrompt | None = None
    required_calls: tuple[str, ...] = ()
    several_calls: bool = True
    blobs: Mapping[str, Blob] = msgspec.field(default_factory=dict)
    has_media: bool = True
