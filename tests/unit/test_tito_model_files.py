"""What the gateway reads of a model folder: tokenizer, template, routing shape, end tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS
from gateway.contracts.errors import ConfigurationError, TemplateRaised
from gateway.contracts.experts import RoutingShape
from gateway.contracts.fingerprints import tokenizer_sha256
from gateway.contracts.generation import JsonValue
from gateway.tito.conversation import Conversation
from gateway.tito.model_files import ModelFiles, read_model_files
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer


def test_the_tiny_model_is_read_from_its_files(tiny_model: Path) -> None:
    """Identity of a model is what its files say."""
    tokenizer = ChatTokenizer.load(tiny_model)
    files = read_model_files(tiny_model)
    assert (files.dimensions.routing, files.context_length) == (RoutingShape(4, num_experts=8, top_k=2), 2048)
    assert tokenizer.vocab_size == json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert [tokenizer.token_text(i) for i in tokenizer.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.fingerprint == tokenizer_sha256(json.loads((tiny_model / "tokenizer.json").read_text()))
    template_bytes = (tiny_model / "chat_template.jinja").read_bytes()
    assert ChatTemplate.load(tiny_model).fingerprint == hashlib.sha256(template_bytes).hexdigest()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1},
            RoutingShape(61, 256, 8),
        ),
        ({"num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2}, RoutingShape(32, 8, 2)),
        (
            {"num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4, "experts_per_token": 4},
            RoutingShape(36, 128, 4),
        ),
        (
            {
                "text_config": {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8},
                "num_experts": None,
            },
            RoutingShape(48, 128, 8),
        ),
        ({"num_hidden_layers": 54, "moe_num_experts": 64, "moe_k": 6}, RoutingShape(54, 64, 6)),
        ({"num_hidden_layers": 32, "num_experts": 64, "moe_topk": [8, 8]}, RoutingShape(32, 64, 8)),
        ({"num_hidden_layers": 32, "num_experts": 0, "num_experts_per_tok": 2}, None),
        ({"num_hidden_layers": 32}, None),
    ],
)
def test_routing_shapes_are_found_under_each_familys_names(
    config: JsonValue, expected: RoutingShape | None, tmp_path: Path
) -> None:
    """I2: rows can only be read with the right shape."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_files(tmp_path).dimensions.routing == expected


def test_context_length_is_found_in_nested_configurations(tmp_path: Path) -> None:
    """Multimodal models nest their text model."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 4096}}))
    assert read_model_files(tmp_path).context_length == 4096


def test_a_folder_without_config_is_unknown_not_wrong(tmp_path: Path) -> None:
    """The gateway needs tokenizer and template only."""
    assert read_model_files(tmp_path) == ModelFiles(UNKNOWN_DIMENSIONS, 0)


@pytest.mark.parametrize("missing", ["folder", "tokenizer.json", "chat template"])
def test_what_is_missing_is_named_in_one_line(missing: str, tmp_path: Path) -> None:
    """Exit code 2 with one clear line."""
    folder = tmp_path / "model"
    if missing != "folder":
        folder.mkdir()
    load: Callable[[Path], object] = ChatTemplate.load if missing == "chat template" else ChatTokenizer.load
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    """What the library raises is translated once."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


def test_a_template_with_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    """A broken template is found at start, not at the first request."""
    (tmp_path / "chat_template.jinja").write_text("hello\n{% if %}")
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatTemplate.load(tmp_path)


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    """tokenizer_config.json decides, special_tokens_map.json fills in; AddedToken objects count by their content."""
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "old"}))
    config = {"eos_token": {"content": "</s>", "special": True}, "chat_template": "{{ bos_token }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(Conversation(())) == "<s></s>"


def test_a_template_for_tools_is_used_when_there_are_tools(tmp_path: Path) -> None:
    """Named templates, as a list in tokenizer_config.json."""
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template.render(Conversation(())) == "plain"
    assert template.render(Conversation((), tools=({"type": "function"},))) == "tools"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__init__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_but_its_data(attack: str) -> None:
    """Templates are untrusted input."""
    template = ChatTemplate({"default": attack}, special_tokens={})
    conversation = Conversation(({"role": "user", "content": "a"},))
    try:
        shown = template.render(conversation)
    except TemplateRaised:
        shown = ""
    assert shown == ""
    assert conversation.messages == ({"role": "user", "content": "a"},)


def test_agents_cannot_replace_what_the_gateway_gives_the_template() -> None:
    """I7: messages, tools and the generation prompt are ours."""
    template = ChatTemplate(
        {"default": "{{ messages | length }}{{ tools }}{{ add_generation_prompt }}"}, special_tokens={}
    )
    arguments = {"messages": [1, 2], "tools": "x", "add_generation_prompt": False}
    assert template.render(Conversation((), template_arguments=arguments)) == "0NoneTrue"


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"b": 1,  "a": 2}'}}],
}


@pytest.mark.parametrize(
    ("shows", "expected"),
    [
        ("{{ arguments }}", '{"b": 1,  "a": 2}'),
        ("{{ arguments if arguments is string else arguments | tojson }}", '{"b": 1,  "a": 2}'),
        ("{{ arguments | tojson }}", '{"b": 1, "a": 2}'),
        ("{% for k, v in arguments | items %}{{ k }}={{ v }};{% endfor %}", "b=1;a=2;"),
        ("{{ '' + arguments }}", '{"b": 1,  "a": 2}'),
    ],
)
def test_arguments_are_text_or_object_as_the_template_needs_them(shows: str, expected: str) -> None:
    """Agents send JSON text; most templates show objects."""
    text = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{% set arguments = call.function.arguments %}"
        + shows
        + "{% endfor %}{% endfor %}"
    )
    template = ChatTemplate({"default": text}, special_tokens={})
    assert template.render(Conversation((CALLED,))) == expected
    assert template.shows_tool_calls


def test_arguments_that_are_not_json_do_not_refuse_the_history() -> None:
    """I6: a template that needs objects gets one."""
    text = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{% for k, v in call.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
    )
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "48/2"}}]}
    assert ChatTemplate({"default": text}, special_tokens={}).render(Conversation((broken,))) == "arguments=48/2;"


def test_text_survives_encoding_and_decoding(tiny_model: Path) -> None:
    """Special tokens are kept in text and found in it; plain encoding finds none."""
    tokenizer = ChatTokenizer.load(tiny_model)
    text = "<|im_start|>user\né🙂 <think>48/2</think><|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = tokenizer.encode_plain(text)
    assert tokenizer.decode(plain) == text
    assert not set(plain.tolist()) & set(tokenizer.added_tokens)
    assert tokenizer.encode("").dtype == plain.dtype == np.int32
    assert tokenizer.token_text(tokenizer.vocab_size) == tokenizer.token_text(-1) == ""


def test_bytes_of_tokens_join_to_the_text(tiny_model: Path) -> None:
    """What streaming shows is what decoding shows."""
    tokenizer = ChatTokenizer.load(tiny_model)
    ids = tokenizer.encode("<|im_start|>a é🙂\n\t<think>")
    assert b"".join(tokenizer.token_bytes(i) or b"" for i in ids.tolist()).decode() == tokenizer.decode(ids)


def test_a_control_token_that_is_a_word_of_the_vocabulary_can_still_be_spelled_as_text() -> None:
    """Unigram vocabularies hold control tokens as pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -5.0) for character in "</s>ab")]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = ChatTokenizer(inner.to_str().encode(), eos_token="</s>")
    assert tokenizer.encode("a</s>b").tolist() == [inner.token_to_id(t) for t in ("a", "</s>", "b")]
    assert tokenizer.encode_plain("a</s>b").tolist() == [inner.token_to_id(t) for t in "a</s>b"]


def test_what_a_vocabulary_has_no_word_for_is_unknown_and_no_error() -> None:
    """I6: the unknown token is an added token too, and no control token; nothing is refused for it."""
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), *((character, -5.0) for character in "</s>ab")], unk_id=0))
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "</s>")])
    tokenizer = ChatTokenizer(inner.to_str().encode(), eos_token="</s>")
    spelled = [tokenizer.token_text(token_id) for token_id in tokenizer.encode_plain("a\n</s>").tolist()]
    assert spelled == ["a", "<unk>", "<", "/", "s", ">"]
