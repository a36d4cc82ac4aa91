"""The OpenAPI document: what every route takes and answers, as data that routes name in `openapi_extra`.

Bodies are read by ourselves (I8), so FastAPI knows nothing of them; the schemas here are what `gateway.wire` reads and
writes. A request of agents may have any other field, which goes on to the engine; a reply may have fields of the
engine's. Path parameters, keys and the errors of every route are added in one place, `add_document`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.routes.bodies import MAX_ID_CHARACTERS
from gateway.wire.openai import MAX_CHOICES, MAX_TOP_LOGPROBS
from gateway.wire.raw_prompts import MAX_PROMPTS
from gateway.wire.sampling import MAX_STOP_STRINGS

Schema: TypeAlias = dict[str, Any]
Operation: TypeAlias = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_INTEGER: Schema = {"type": "integer"}
_FLAG: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_ANY: Schema = {}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_LONG: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_ID: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARACTERS}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **rest: Any) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}, **rest}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _fields(optional: Mapping[str, Schema]) -> dict[str, Schema]:
    """Fields of a request that may be null, which means absent."""
    return {name: _maybe(schema) for name, schema in optional.items()}


def _json(schema: Schema, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(
    summary: str,
    reply: Schema,
    *,
    body: Schema | None = None,
    query: Mapping[str, Schema] | None = None,
    streams: bool = False,
    also: Mapping[str, dict[str, Any]] | None = None,
    needs_body: bool = True,
) -> Operation:
    """also: replies of other statuses than 200."""
    found: Operation = {"summary": summary, "responses": {"200": _json(reply, "OK"), **(also or {})}}
    if body is not None:
        found["requestBody"] = {"required": needs_body, "content": {"application/json": {"schema": body}}}
    if streams:
        found["responses"]["200"]["content"]["text/event-stream"] = {"schema": _object({"data": _TEXT})}
    if query:
        found["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    return found


_SAMPLING = _fields(
    {
        "temperature": {"type": "number", "minimum": 0, "maximum": 1e9},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": _either({"const": -1}, {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}),
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "stop": _either(_TEXT, _list(_TEXT, maxItems=MAX_STOP_STRINGS)),
        "stop_token_ids": _list(_COUNT),
        "seed": _LONG,
        "ignore_eos": _FLAG,
    }
)
_LIMIT: Schema = {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}
_CHOICES: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES}
_CAPTURED = _fields({"return_token_ids": _FLAG, "return_routed_experts": _FLAG})
_STREAMED = _fields({"stream": _FLAG, "stream_options": _object({}, _fields({"include_usage": _FLAG}))})
_TOOL = _object(
    {"type": {"const": "function"}, "function": _object({"name": _TEXT}, {"description": _TEXT, "parameters": _OBJECT})}
)
_MESSAGE = _object(
    {"role": {"enum": ["system", "developer", "user", "assistant", "tool"]}},
    _fields(
        {
            "content": _either(_TEXT, _list(_object({"type": {"const": "text"}, "text": _TEXT}))),
            "name": _TEXT,
            "tool_calls": _list(
                _object(
                    {
                        "id": _TEXT,
                        "type": {"const": "function"},
                        "function": _object({"name": _TEXT, "arguments": _TEXT}),
                    }
                )
            ),
            "tool_call_id": _TEXT,
            "reasoning_content": _TEXT,
        }
    ),
)
_CHAT_FIELDS = {
    **_SAMPLING,
    **_CAPTURED,
    **_STREAMED,
    **_fields(
        {
            "model": _TEXT,
            "n": _CHOICES,
            "max_tokens": _LIMIT,
            "max_completion_tokens": _LIMIT,
            "tools": _list(_TOOL),
            "tool_choice": _either({"enum": ["none", "auto", "required"]}, _OBJECT),
            "parallel_tool_calls": _FLAG,
            "response_format": _object({"type": {"enum": ["text", "json_object", "json_schema"]}}),
            "logprobs": _FLAG,
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
            "reasoning_effort": _TEXT,
            "chat_template_kwargs": _OBJECT,
            "metadata": _OBJECT,
            "user": _TEXT,
        }
    ),
}
_ROWS = _object({"data": _TEXT, "dtype": {"enum": ["uint8", "uint16"]}, "shape": _list(_COUNT), "start": _COUNT})
_SHOWN = {"token_ids": _list(_TOKEN_ID), "routed_experts": _maybe(_ROWS), "meta_info": _OBJECT}
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_PROMPTS = _either(
    _TEXT,
    _list(_TOKEN_ID, minItems=1),
    _list(_TEXT, minItems=1, maxItems=MAX_PROMPTS),
    _list(_list(_TOKEN_ID, minItems=1), minItems=1, maxItems=MAX_PROMPTS),
)
_IDS = _either(_list(_TOKEN_ID, minItems=1), _list(_list(_TOKEN_ID, minItems=1), minItems=1, maxItems=MAX_PROMPTS))
_TEXTS = _either(_TEXT, _list(_TEXT, minItems=1, maxItems=MAX_PROMPTS))

_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _TEXT})},
    additionalProperties=False,
)
_ANTHROPIC_ERROR = _object(
    {"type": {"const": "error"}, "error": _object({"type": _TEXT, "message": _TEXT}), "request_id": _TEXT}
)

CHAT = _operation(
    "One chat completion, of the turn that its messages extend",
    _object(
        {
            "id": _TEXT,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _maybe(_TEXT)},
                            {"reasoning_content": _maybe(_TEXT), "tool_calls": _list(_OBJECT)},
                        ),
                        "logprobs": _maybe(_OBJECT),
                        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                    },
                    _SHOWN,
                ),
                minItems=1,
            ),
            "usage": _USAGE,
        },
        {"prompt_token_ids": _list(_TOKEN_ID)},
    ),
    body=_object({"messages": _list(_MESSAGE, minItems=1)}, _CHAT_FIELDS),
    streams=True,
)
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "max_model_len": _maybe(_COUNT)})
MODEL = _operation("It, under a name of the agent's choice", _MODEL)
MODELS = _operation(
    "The one model that is served",
    _object(
        {
            "object": {"const": "list"},
            "data": _list(_MODEL),
        }
    ),
)
COMPLETIONS = _operation(
    "Completions of texts or token ids",
    _object(
        {
            "id": _TEXT,
            "object": {"const": "text_completion"},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "logprobs": _maybe(_OBJECT),
                        "finish_reason": {"enum": ["stop", "length"]},
                    },
                    {**_SHOWN, "prompt_token_ids": _list(_TOKEN_ID)},
                ),
                minItems=1,
            ),
            "usage": _USAGE,
        }
    ),
    body=_object(
        {"prompt": _PROMPTS},
        {
            **_SAMPLING,
            **_CAPTURED,
            **_STREAMED,
            **_fields(
                {
                    "model": _TEXT,
                    "n": _CHOICES,
                    "max_tokens": _LIMIT,
                    "echo": _FLAG,
                    "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
                    "add_special_tokens": _FLAG,
                }
            ),
        },
    ),
    streams=True,
)
_GENERATION = _object(
    {
        "text": _TEXT,
        "output_ids": _list(_TOKEN_ID),
        "meta_info": _object(
            {"id": _TEXT, "finish_reason": _OBJECT, "prompt_tokens": _COUNT, "completion_tokens": _COUNT}
        ),
    }
)
_GENERATE_SAMPLING = _object({}, {**_SAMPLING, **_fields({"max_new_tokens": _LIMIT, "n": _CHOICES})})
GENERATE = _operation(
    "SGLang's native call: samples for one or several prompts",
    _either(_GENERATION, _list(_GENERATION)),
    body={
        **_object(
            {},
            {
                "text": _maybe(_TEXTS),
                "input_ids": _maybe(_IDS),
                "sampling_params": _maybe(_GENERATE_SAMPLING),
                "rid": _maybe(_either(_TEXT, _list(_TEXT))),
                **_fields({"return_logprob": _FLAG, "return_text_in_logprobs": _FLAG, "stream": _FLAG}),
                **_CAPTURED,
            },
        ),
        "oneOf": [{"required": ["text"]}, {"required": ["input_ids"]}],
    },
    streams=True,
)
_RESPONSE = _object(
    {
        "id": _TEXT,
        "object": {"const": "response"},
        "created_at": _NUMBER,
        "status": {"enum": ["completed", "incomplete", "failed"]},
        "model": _TEXT,
        "output": _list(_object({"id": _TEXT, "type": {"enum": ["message", "reasoning", "function_call"]}})),
        "usage": _maybe(_object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT})),
        "error": _maybe(_object({"code": _TEXT, "message": _TEXT})),
    }
)
_PART = _object({"type": {"enum": ["input_text", "output_text", "text"]}, "text": _TEXT})
_ITEM = _either(
    _object(
        {"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": _either(_TEXT, _list(_PART))},
        {"type": {"const": "message"}},
    ),
    _object({"type": {"const": "reasoning"}}, {"summary": _list(_object({"type": _TEXT, "text": _TEXT}))}),
    _object({"type": {"const": "function_call"}, "call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}),
    _object({"type": {"const": "function_call_output"}, "call_id": _TEXT, "output": _either(_TEXT, _list(_PART))}),
)
RESPONSES = _operation(
    "One response; `previous_response_id` continues a recorded one",
    _RESPONSE,
    body=_object(
        {},
        {
            **_SAMPLING,
            **_CAPTURED,
            **_fields(
                {
                    "model": _TEXT,
                    "input": _either({"type": "string", "minLength": 1}, _list(_ITEM, minItems=1)),
                    "instructions": _TEXT,
                    "previous_response_id": _TEXT,
                    "max_output_tokens": _LIMIT,
                    "include": _list(_TEXT),
                    "metadata": _OBJECT,
                    "reasoning": _object({}, _fields({"effort": _TEXT, "summary": _TEXT})),
                    "store": _FLAG,
                    "stream": _FLAG,
                    "text": _object({}, {"format": _maybe(_object({"type": {"const": "text"}}))}),
                    "tools": _list(_object({"type": {"const": "function"}, "name": _TEXT}, {"parameters": _OBJECT})),
                    "tool_choice": _either({"enum": ["none", "auto", "required"]}, _OBJECT),
                    "parallel_tool_calls": _FLAG,
                    "truncation": {"enum": ["auto", "disabled"]},
                }
            ),
        },
    ),
    streams=True,
)
BLOB: Operation = {
    "summary": "The bytes of a picture, recording or film that a session's messages refer to",
    "responses": {"200": {"description": "OK", "content": {"*/*": {"schema": {"type": "string"}}}}},
}
READ_RESPONSE = _operation("A recorded response once more", _RESPONSE, query={"stream": {"enum": ["true", "false"]}})
DELETE_RESPONSE = _operation(
    "Hide a recorded response from its agents",
    _object({"id": _TEXT, "object": {"const": "response"}, "deleted": {"const": True}}),
)
_BLOCK = _either(
    _object({"type": {"const": "text"}, "text": _TEXT}),
    _object({"type": {"const": "thinking"}, "thinking": _TEXT}),
    _object({"type": {"const": "tool_use"}, "id": _TEXT, "name": _TEXT, "input": _OBJECT}),
    _object({"type": {"const": "tool_result"}, "tool_use_id": _TEXT, "content": _TEXT}),
)
_ANTHROPIC_FIELDS = {
    "messages": _list(
        _object({"role": {"enum": ["user", "assistant"]}, "content": _either(_TEXT, _list(_BLOCK))}), minItems=1
    ),
}
_ANTHROPIC_OPTIONS = _fields(
    {
        "model": _TEXT,
        "system": _either(_TEXT, _list(_object({"type": {"const": "text"}, "text": _TEXT}))),
        "tools": _list(_object({"name": _TEXT, "input_schema": _OBJECT}, {"description": _TEXT})),
        "tool_choice": _object({"type": {"enum": ["auto", "any", "none", "tool"]}}),
        "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}}),
        "stop_sequences": _list(_TEXT, maxItems=MAX_STOP_STRINGS),
        "metadata": _OBJECT,
    }
)
MESSAGES = _operation(
    "One message, as Anthropic's clients ask for it",
    _object(
        {
            "id": _TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": _TEXT,
            "content": _list(_object({"type": {"enum": ["text", "thinking", "tool_use"]}})),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": _maybe(_TEXT),
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        }
    ),
    body=_object(
        {"max_tokens": _LIMIT, **_ANTHROPIC_FIELDS},
        {
            **_ANTHROPIC_OPTIONS,
            **_CAPTURED,
            **_fields({"stream": _FLAG, "temperature": {"type": "number", "minimum": 0, "maximum": 1}}),
        },
    ),
    streams=True,
)
COUNT_TOKENS = _operation(
    "Length of the prompt that a message would have",
    _object({"input_tokens": _COUNT}),
    body=_object(_ANTHROPIC_FIELDS, _ANTHROPIC_OPTIONS),
)
TOKENIZE = _operation(
    "Ids of texts, or of the prompt that a conversation would be",
    _object(
        {
            "tokens": _either(_list(_TOKEN_ID), _list(_list(_TOKEN_ID))),
            "count": _either(_COUNT, _list(_COUNT)),
            "max_model_len": _COUNT,
        }
    ),
    body={
        **_object(
            {},
            {
                "prompt": _TEXTS,
                "messages": _list(_MESSAGE, minItems=1),
                **_fields({"model": _TEXT, "add_special_tokens": _FLAG, "return_token_strs": _FLAG}),
            },
        ),
        "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    },
)
DETOKENIZE = _operation(
    "The text of ids",
    _object({"text": _TEXTS, "prompt": _TEXTS}),
    body=_object({"tokens": _IDS}, _fields({"skip_special_tokens": _FLAG, "model": _TEXT})),
)

_SESSION_FIELDS: dict[str, Schema] = {
    "session_id": _ID,
    "group": _maybe(_TEXT),
    "group_size": _maybe({"type": "integer", "minimum": 1}),
    "task": _ANY,
    "labels": {"type": "object", "additionalProperties": _TEXT},
    "metadata": _OBJECT,
    "sampling": _OBJECT,
    "ttl_seconds": _maybe(_NUMBER),
    "origin": _TEXT,
    "complete": _FLAG,
    "created_at": _NUMBER,
    "gaps": _list(_COUNT),
}
_FINISH = _object(
    {
        "session_id": _ID,
        "snapshot": _TEXT,
        "reward": _maybe(_NUMBER),
        "outcome": _TEXT,
        "metadata": _OBJECT,
        "finished_at": _NUMBER,
        "dropped_at": _maybe(_NUMBER),
    }
)
_CREATED = _object({"base_url": _TEXT, "api_key": _maybe(_TEXT), **_SESSION_FIELDS})
_ARRAYS = {"arrays": {"enum": ["0", "1", "true", "false"]}}
_PICKED = {"pick": _TEXT}
_PICK_REPORT = _object(
    {"pick": _TEXT, "num_sampled_tokens": _COUNT, "num_trained_tokens": _COUNT, "left_out": _list(_OBJECT)}
)
CREATE_SESSION: Operation = _operation(
    "Make a session; 200 with one of equal properties that exists, without its key unless this call repeats another",
    _CREATED,
    body=_object(
        {},
        _fields(
            {
                "session_id": _ID,
                "group": _TEXT,
                "group_size": {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
                "task": _ANY,
                "labels": {"type": "object", "additionalProperties": _TEXT},
                "metadata": _OBJECT,
                "sampling": _object({}, {**_SAMPLING, **_fields({"max_tokens": _LIMIT})}),
                "ttl_seconds": {"type": "number", "minimum": 0},
            }
        ),
        additionalProperties=False,
    ),
    needs_body=False,
    also={"201": _json(_CREATED, "Created")},
) | {"parameters": [{"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "minLength": 32}}]}
LIST_SESSIONS = _operation(
    "Sessions in order of id",
    _object(
        {
            "sessions": _list(
                _object(
                    {
                        **_SESSION_FIELDS,
                        "state": {"enum": ["open", "finished"]},
                        "outcome": _maybe(_TEXT),
                        "reward": _maybe(_NUMBER),
                    }
                )
            )
        }
    ),
    query={
        "label": _list({"type": "string", "pattern": "^[a-z]+:[a-z]*$"}),
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "after": _TEXT,
    },
)
SHOW_SESSION = _operation(
    "One session with the figures of its turn tree",
    _object(
        {
            "base_url": _TEXT,
            **_SESSION_FIELDS,
            "finish": _maybe(_FINISH),
            "num_running_turns": _COUNT,
            "reports": _OBJECT,
        }
    ),
)
DELETE_SESSION = _operation("Forget a session", _object({"session_id": _ID}))
FINISH_SESSION = _operation(
    "Seal a session: its rollout enters the feed",
    _FINISH,
    body=_object(
        {},
        _fields({"reward": {"type": "number"}, "outcome": {"type": "string", "minLength": 1}, "metadata": _OBJECT}),
        additionalProperties=False,
    ),
    needs_body=False,
)
SESSION_TURNS = _operation(
    "All turns as recorded",
    _object(
        {
            "turns": _list(
                _object(
                    {
                        "turn_id": _TEXT,
                        "index": _COUNT,
                        "attachment": _OBJECT,
                        "added_messages": _list(_OBJECT),
                        "reply": _OBJECT,
                        "num_prompt_tokens_added": _COUNT,
                        "num_output_tokens": _COUNT,
                        "version_spans": _list(_object({"start": _COUNT, "stop": _COUNT, "policy_version": _INTEGER})),
                        "trainable": _FLAG,
                        "created_at": _NUMBER,
                        "delivered_at": _maybe(_NUMBER),
                    }
                )
            )
        }
    ),
    query=_ARRAYS,
)
SESSION_SEGMENTS = _operation(
    "What a trainer would read now",
    _object(
        {
            "pick": _PICK_REPORT,
            "segments": _list(_object({"segment_id": _TEXT, "num_tokens": _COUNT, "num_trained_tokens": _COUNT})),
        }
    ),
    query={**_ARRAYS, **_PICKED},
)
SESSION_REPORT = _operation(
    "What happened to a session's tokens",
    _object(
        {
            "session_id": _ID,
            "origin": _TEXT,
            "complete": _FLAG,
            "gaps": _list(_COUNT),
            "num_turns": _COUNT,
            "num_segments": _COUNT,
            "pick": _PICK_REPORT,
        }
    ),
    query=_PICKED,
)

_LEASE = _object(
    {
        "lease_id": _TEXT,
        "consumer": _TEXT,
        "expires_at": _NUMBER,
        "rollouts": _list(_object({"session_id": _ID, "snapshot": _TEXT, "complete": _FLAG})),
        "incomplete": _list(
            _object(
                {
                    "group": _TEXT,
                    "expected": _maybe(_COUNT),
                    "unfinished": _list(_ID),
                    "num_not_created": _COUNT,
                    "lent_before": _list(_ID),
                    "dropped": _list(_ID),
                    "damaged": _list(_ID),
                }
            )
        ),
    }
)
LEASE = _operation(
    "Borrow finished rollouts",
    _LEASE,
    body=_object(
        {
            "consumer": {"type": "string", "minLength": 1},
            "limit": {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
        },
        {
            "wait_seconds": {"type": "number", "minimum": 0, "exclusiveMaximum": 1e9},
            "lease_seconds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9},
            "whole_groups": _FLAG,
            "labels": _maybe({"type": "object", "additionalProperties": _TEXT}),
            "group_deadline_seconds": _maybe({"type": "number", "minimum": 0, "exclusiveMaximum": 1e9}),
            "lease_id": _maybe({"type": "string", "minLength": 1, "maxLength": 128}),
        },
        additionalProperties=False,
    ),
    also={"204": {"description": "Nothing was there in time"}},
)
LEASES = _operation("Leases that are held now", _object({"leases": _list(_LEASE)}), query={"consumer": _TEXT})
EXTEND = _operation(
    "Let a lease run on",
    _object({"lease_id": _TEXT, "expires_at": _NUMBER}),
    body=_object(
        {},
        {"lease_seconds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}},
        additionalProperties=False,
    ),
    needs_body=False,
)
ACKNOWLEDGE = _operation("These rollouts are consumed", _object({"session_ids": _list(_ID)}))
RELEASE = _operation("Give a lease back", _object({"lease_id": _TEXT}))
RELEASE_CONSUMER = _operation("Give back all that a consumer holds", _object({"released": _COUNT}))
ROLLOUT: Operation = {
    "summary": "A finished rollout as one safetensors body",
    "parameters": [
        {"name": "snapshot", "in": "query", "required": True, "schema": _TEXT},
        {"name": "pick", "in": "query", "schema": _TEXT},
    ],
    "responses": {"200": {"description": "OK", "content": {"application/octet-stream": {"schema": _ANY}}}},
}
DROP_ROLLOUT: Operation = _operation("Free a rollout's data", _object({"session_id": _ID})) | {
    "parameters": [{"name": "snapshot", "in": "query", "required": True, "schema": _TEXT}]
}
CONSUMERS = _operation("Who leases or has leased", _object({"consumers": _list(_TEXT)}))
FEED_COUNTS: Operation = _operation("Back-pressure figures of one consumer", _OBJECT) | {
    "parameters": [{"name": "consumer", "in": "query", "required": True, "schema": _TEXT}]
}
PICKS = _operation("What `pick` may be", _object({"default": _TEXT, "picks": _list(_TEXT)}))

_ENGINE = _object(
    {
        "engine_id": _TEXT,
        "url": _TEXT,
        "kind": _TEXT,
        "weight_version": _TEXT,
        "policy_version": _INTEGER,
        "healthy": _FLAG,
        "draining": _FLAG,
        "running": _COUNT,
    }
)
ENGINES = _operation("All engines", _object({"engines": _list(_ENGINE), "paused": _maybe(_TEXT)}))
ADD_ENGINE = _operation(
    "Take an engine in",
    _ENGINE,
    body=_object(
        {"url": {"type": "string", "format": "uri"}},
        _fields({"kind": _TEXT, "engine_id": _TEXT}),
        additionalProperties=False,
    ),
    also={"201": _json(_ENGINE, "Added")},
)
REMOVE_ENGINE = _operation(
    "Take an engine out", _object({"engine_id": _TEXT}), query={"drain": {"enum": ["true", "false", "1", "0"]}}
)
_PAUSES = ["abort", "keep", "retract", "drain"]
PAUSE = _operation(
    "Hold generation",
    _object({"paused": {"enum": _PAUSES}}),
    body=_object(
        {},
        {
            "mode": {"enum": _PAUSES},
            "max_seconds": _maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 7 * 24 * 3600}),
        },
        additionalProperties=False,
    ),
    needs_body=False,
)
GENERATION = _operation(
    "Whether generation is paused, and what each engine says of it",
    _object(
        {
            "paused": _maybe({"enum": [*_PAUSES, "found"]}),
            "since": _maybe(_NUMBER),
            "max_seconds": _maybe(_NUMBER),
            "engines": _list(_OBJECT),
        }
    ),
)
RESUME = _operation("Let generation go on", _object({"paused": {"type": "null"}}))
POLICY = _operation(
    "What an engine's label means",
    _object({"policy_version": _COUNT, "weight_version": _TEXT}),
    body=_object(
        {
            "policy_version": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            "weight_version": {"type": "string", "minLength": 1},
        },
        additionalProperties=False,
    ),
)
IDENTITY = _operation(
    "What gateway and engines say of their model",
    _object(
        {
            "model": _TEXT,
            "fingerprints": {"type": "object", "additionalProperties": _TEXT},
            "vocab_size": _COUNT,
            "context_length": _COUNT,
            "routing": _maybe(_object({"num_layers": _COUNT, "num_experts": _COUNT, "top_k": _COUNT})),
            "engines": _list(_OBJECT),
        }
    ),
)
_SWEEP_REPORT = _object(
    {
        "dry_run": _FLAG,
        "num_rollouts": _COUNT,
        "num_leased": _COUNT,
        "stored_bytes": _COUNT,
        "num_dropped": _COUNT,
        "num_dropped_bytes": _COUNT,
        "dropped": _list(
            _object(
                {
                    "session_id": _TEXT,
                    "snapshot": _TEXT,
                    "num_bytes": _COUNT,
                    "reason": {"enum": ["age", "acknowledged_age", "size"]},
                }
            )
        ),
        "missed": _list(_TEXT),
        "reclaimed": _object({"num_files": _COUNT, "num_bytes": _INTEGER, "num_moved_bytes": _COUNT}),
    }
)
STORAGE = _operation(
    "The data folder's disk, the store by kind, what is dropped by itself",
    _object(
        {
            "space": _maybe(_object({"state": _TEXT, "free_bytes": _COUNT, "reserve_bytes": _COUNT})),
            "usage": _object({"rows_bytes": _COUNT, "routing_bytes": _COUNT, "blob_bytes": _COUNT}),
            "stored_bytes": _COUNT,
            "settings": _OBJECT,
            "last_sweep": _maybe(_SWEEP_REPORT),
        }
    ),
)
SWEEP = _operation(
    "Drop finished rollouts, by the settings' rules or the body's",
    _SWEEP_REPORT,
    body=_object(
        {},
        _fields(
            {
                "older_than_seconds": {"type": "number", "minimum": 0, "maximum": 1e12},
                "keep_bytes": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                "dry_run": _FLAG,
                "acknowledged_only": _FLAG,
            }
        ),
        additionalProperties=False,
    ),
    needs_body=False,
)
_STATUS = _object(
    {
        "status": {"const": "ok"},
        "engines": _COUNT,
        "engines_healthy": _COUNT,
        "turns_running": _COUNT,
        "paused": _maybe(_TEXT),
        "engines_found_paused": _COUNT,
        "storage": _maybe({"enum": ["open", "low", "reserve", "full"]}),
    }
)
HEALTH = _operation("200 while the process serves", _STATUS)
READY = _operation(
    "200 if an engine can sample and there is room to record it",
    _STATUS,
    also={"503": _json(_STATUS, "No engine can, or there is no room")},
)
METRICS: Operation = {
    "summary": "Figures in Prometheus' text format",
    "responses": {"200": {"description": "OK", "content": {"text/plain": {"schema": _TEXT}}}},
}

_ERRORS = {
    "400": "A field is wrong; `param` names it",
    "401": "No key",
    "403": "Another key's, or where keys are off a Host or Origin that is not this gateway's",
    "404": "Not there",
    "405": "Other methods only",
    "408": "The body came too slowly",
    "409": "It contradicts what is recorded",
    "413": "The body is too long",
    "415": "The body is compressed",
    "429": "Too much at once, or too often; `Retry-After` says in how many seconds a retry can help",
    "502": "An engine refused, or answered nonsense",
    "503": "No engine, or no store, for now",
    "504": "An engine did not answer in time",
}
_DESCRIPTION = (
    "Agents speak their clients' dialects, under `/sessions/{session_id}`, with `X-Session-ID` or a session's key; "
    "operators make sessions and keep engines; trainers read finished rollouts from the feed. An agent's request may "
    "hold fields that are not named here: they go on to the engine."
)
_ANTHROPIC_OVERLOADED = "529"
_PATH_PARAMETER = re.compile(r"{(\w+)}")


def add_document(app: FastAPI) -> None:
    """Have `/openapi.json` tell what the routes' `openapi_extra` says."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes, description=_DESCRIPTION)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    found["components"] = {
        "schemas": {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    return found


def _complete(path: str, operation: Operation) -> None:
    """Path parameters, keys and errors, which every route has; nothing of what the framework guessed."""
    query = [each for each in operation.get("parameters", ()) if each["in"] == "query"]
    named = [
        {"name": name, "in": "path", "required": True, "schema": _ID, "description": "percent-encoded"}
        for name in _PATH_PARAMETER.findall(path)
    ]
    operation["parameters"] = [*named, *query]
    is_anthropic = "/v1/messages" in path
    error = _ref("AnthropicError" if is_anthropic else "Error")
    statuses = _ERRORS | ({_ANTHROPIC_OVERLOADED: _ERRORS["503"]} if is_anthropic else {})
    responses = operation["responses"]
    responses.pop("422", None)
    content = responses["200"]["content"]
    if len(content) > 1 and not content["application/json"]["schema"]:
        del content["application/json"]
    for status, description in statuses.items():
        responses.setdefault(status, _json(error, description))
    if operation["tags"] != ["status"]:
        operation["security"] = [{"bearer": []}, {"key": []}, {}]
