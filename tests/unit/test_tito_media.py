"""Images in prompts: placeholders where the template puts them, as many as there are images (I1)."""

from __future__ import annotations

import base64
import threading
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import Finish, FinishReason, JsonValue, Media, MediaKind
from gateway.contracts.media import Blob, placed_media
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.media import load_media, shown_media
from gateway.tito.conversation import Conversation, ParentTurn
from gateway.tito.prompt import PromptBuilder
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

OWN_TEMPLATE = (Path(__file__).parents[2] / "trainer" / "recipes" / "data" / "chat_template.jinja").read_text()
PLACEHOLDERS = ("<|image_pad|>", "<|audio_pad|>")
NUMBERED = """
{%- set count = namespace(images=0) -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set count.images = count.images + 1 -%}Picture {{ count.images }}: <|image_pad|>
{%- elif part.type == 'audio' and message.role == 'user' -%}<|audio_pad|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
IMAGE: JsonValue = {"type": "image_url", "image_url": {"url": "verbatim-blob:sha256-" + "0" * 64}}
TEMPLATES = {
    "own": OWN_TEMPLATE,
    "numbered": NUMBERED,
    "text": "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}",
    "printing": "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}",
    "json": "{% for message in messages %}{{ message.role }}: {{ message.content | tojson }}{% endfor %}",
}


def template(name: str) -> ChatTemplate:
    return ChatTemplate({"default": TEMPLATES[name]}, special_tokens={})


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    made = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in PLACEHOLDERS])
    content = made.to_str().encode()
    stop = made.token_to_id("<|im_end|>")
    return ChatTokenizer(content, eos_token_ids=(stop,))


@pytest.mark.parametrize(
    ("name", "role", "kind", "is_shown"),
    [
        ("numbered", "user", MediaKind.IMAGE, True),
        ("numbered", "tool", MediaKind.IMAGE, True),
        ("numbered", "user", MediaKind.AUDIO, True),
        ("numbered", "tool", MediaKind.AUDIO, False),
        ("numbered", "user", MediaKind.VIDEO, False),
        *((name, "user", kind, False) for name in ("own", "text", "printing", "json") for kind in MediaKind),
    ],
)
def test_a_template_shows_media_where_it_writes_something_for_them(
    name: str, role: str, kind: MediaKind, is_shown: bool
) -> None:
    """What it prints, drops or refuses is not shown."""
    assert template(name).shows_media(role, kind) is is_shown


def test_what_a_template_would_drop_is_refused_by_place_and_kind() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]
    assert [place for place, _, _ in shown_media(template("numbered"), messages)] == ["messages[0].content[1]"]
    with pytest.raises(InvalidRequest, match=r"^messages\[0\].content\[1\]: this model takes no images"):
        shown_media(template("own"), messages)


def test_there_are_as_many_placeholders_as_images(tokenizer: ChatTokenizer) -> None:
    """Neither text that looks like one, nor keys by which templates know images, make another."""
    content: list[JsonValue] = [
        {"type": "text", "text": "see <|image_pad|>", "image": "x", "image_url": {"url": "y"}},
        {"type": "other", "image": "x"},
        IMAGE,
    ]
    built = PromptBuilder(tokenizer, template("numbered")).build(
        Conversation(({"role": "user", "content": content},)), None
    )
    placeholder = tokenizer.token_id("<|image_pad|>")
    assert built.token_ids.tolist().count(placeholder) == 1
    assert "see <|image_pad|>Picture 1: <|image_pad|>" in tokenizer.decode(built.token_ids)
    assert not built.hidden_messages


def test_a_turn_with_an_image_goes_on_from_recorded_tokens(tokenizer: ChatTokenizer) -> None:
    """I1: what is added is what the template adds in this conversation, the number of the picture too."""
    prompts = PromptBuilder(tokenizer, template("numbered"))
    question = {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]}
    first = prompts.build(Conversation((question,)), None)
    sampled = tokenizer.encode("so.<|im_end|>")
    parent = ParentTurn(np.concatenate([first.token_ids, sampled]), len(sampled), 2, Finish(FinishReason.STOP))
    reply = {"role": "assistant", "content": "so."}
    for added in ([IMAGE], [{"type": "text", "text": "and this"}, IMAGE]):
        conversation = Conversation((question, reply, {"role": "user", "content": added}))
        built = prompts.build(conversation, parent)
        assert built.segment_reason is None
        whole = np.concatenate([parent.token_ids, built.token_ids])
        assert tokenizer.decode(whole) == template("numbered").render(conversation)
        assert "Picture 2: <|image_pad|><|im_end|>" in tokenizer.decode(built.token_ids)


async def test_the_bytes_of_media_are_encoded_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film is tens of megabytes, and every turn after it sends it again."""
    threads: list[int] = []

    def encode(content: bytes) -> bytes:
        threads.append(threading.get_ident())
        return base64.b64encode(content)

    monkeypatch.setattr("gateway.sessions.media.pybase64.b64encode", encode)
    blob = Blob.of(b"pixels", "image/png")
    [found] = placed_media([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": blob.url}}]}])
    async with aclosing(SqliteLedger.open(tmp_path / "data")) as ledger:
        loaded = await load_media([found], {blob.sha256: blob}, ledger, "s", takes_urls=False)
    assert loaded == (Media(MediaKind.IMAGE, "data:image/png;base64,cGl4ZWxz"),)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
