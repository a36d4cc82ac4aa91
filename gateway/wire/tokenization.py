"""/tokenize and /detokenize as SGLang and vLLM spell them: a text, a list of texts, or a conversation; or token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.wire.fields import check_nesting, flag, optional
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import chat_request
from gateway.wire.raw_prompts import is_batch, raw_prompts
from gateway.wire.request import RawPrompt, TurnRequest, Wanted

_NOTHING = Wanted(token_ids=False, routed_experts=False, logprobs=False, usage_chunk=False)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """turns: calls whose prompts' ids are wanted. is_list: whether the reply's fields are lists of one entry each."""

    turns: tuple[TurnRequest, ...]
    is_list: bool
    token_texts: bool


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """turns: calls whose prompts' texts are wanted. special_tokens: whether control tokens are shown."""

    turns: tuple[TurnRequest, ...]
    is_list: bool
    special_tokens: bool


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    token_texts = flag(fields, "return_token_strs")
    if fields.get("messages") is not None:
        if optional(fields, "add_generation_prompt", bool) is False or flag(fields, "continue_final_message"):
            raise InvalidRequest("add_generation_prompt: only the prompt that a chat completion would have is shown")
        return TokenizeRequest((chat_request(fields, body=body),), is_list=False, token_texts=token_texts)
    name = "text" if fields.get("prompt") is None else "prompt"
    texts = fields.get(name)
    if not isinstance(texts, str) and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise InvalidRequest("prompt: expected a text, a list of texts, or messages instead of it")
    adds_special_tokens = optional(fields, "add_special_tokens", bool) is not False
    prompts = raw_prompts(texts, name, adds_special_tokens=adds_special_tokens)
    return TokenizeRequest(_turns(prompts, fields, body), is_list=is_batch(texts), token_texts=token_texts)


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or any(isinstance(item, str) for item in tokens):
        raise InvalidRequest("tokens: expected a list of token ids, or a list of such lists")
    prompts = raw_prompts(tokens, "tokens", adds_special_tokens=False)
    return DetokenizeRequest(
        _turns(prompts, fields, body),
        is_list=is_batch(tokens),
        special_tokens=not flag(fields, "skip_special_tokens"),
    )


def tokenize_reply(
    asked: TokenizeRequest, ids: Sequence[TokenIds], texts: Sequence[Sequence[str]], *, max_model_len: int
) -> JsonValue:
    """`texts`: of each token, where asked for."""
    tokens = [each.tolist() for each in ids]
    reply: dict[str, JsonValue] = {
        "tokens": tokens if asked.is_list else tokens[0],
        "count": [len(each) for each in tokens] if asked.is_list else len(tokens[0]),
        "max_model_len": max_model_len,
    }
    if asked.token_texts:
        reply["token_strs"] = list(texts) if asked.is_list else texts[0]
    return reply


def detokenize_reply(asked: DetokenizeRequest, texts: Sequence[str]) -> JsonValue:
    """The text under both engines' names for it."""
    text = list(texts) if asked.is_list else texts[0]
    return {"text": text, "prompt": text}


def _turns(prompts: Sequence[RawPrompt], fields: Mapping[str, JsonValue], body: bytes) -> tuple[TurnRequest, ...]:
    digest = hashlib.sha256(body).hexdigest()
    return tuple(
        TurnRequest(
            model=optional(fields, "model", str),
            messages=(),
            tools=(),
            calls_tools=False,
            template_arguments={},
            sampling={},
            num_choices=1,
            stream=False,
            wanted=_NOTHING,
            passthrough={},
            ignored_fields=(),
            digest=digest,
            num_bytes=len(body),
            prompt=prompt,
        )
        for prompt in prompts
    )
