"""One model call as an agent asked for it, in whatever dialect: what all of them are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.media import Blob

PROTECTED = frozenset(
    (
        "audio_data", "bootstrap_host", "bootstrap_port", "bootstrap_room", "image_data", "input_embeds", "input_ids",
        "logprob_start_len", "lora_path", "max_new_tokens", "mm_content_hashes", "mm_hashes", "prompt_token_ids",
        "return_indexer_topk", "return_logprob", "return_prompt_token_ids", "return_text_in_logprobs", "rid",
        "routed_experts_start_len", "sampling_params", "sampling_seed", "session_id", "session_params",
        "skip_special_tokens", "text", "token_ids_logprob", "top_logprobs_num", "video_data", "weight_version",
    )
)  # fmt: skip
"""Fields of the engines' own requests, which the gateway alone may set (I7)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the captured arrays the client asked to see; what is recorded does not depend on it (I7)."""

    token_ids: bool
    routed_experts: bool
    logprobs: bool
    usage_chunk: bool


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


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One call as asked; messages and tools as OpenAI's chat completions spell them.

    prompt: of a call that has no messages, which are then (); None for a conversation.
    sampling: normalised names (`max_new_tokens`, `temperature`, …) → values, only those that the request has.
    template_arguments: `chat_template_kwargs`, `reasoning_effort` and `documents`. digest: sha256 hex of the body.
    kept: what the dialect must find again in the record (meta "request"); nothing else reads it.
    required_calls: names of functions of which the reply must call one; () leaves it to the model. several_calls:
    whether such a reply may call more than one. blobs: the bytes that its parts refer to, by sha256.
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
    kept: Mapping[str, JsonValue] = field(default_factory=dict)
    prompt: RawPrompt | None = None
    required_calls: tuple[str, ...] = ()
    several_calls: bool = True
    blobs: Mapping[str, Blob] = field(default_factory=dict)
