"""Images, recordings and films of a turn: shown by the template, read for the engine, kept beside the record.

What an engine makes of them (how many tokens, which) is its own: a turn whose prompt holds any is answered and
recorded, and never trains, nor does a turn that goes on from it (I1, I9).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

import pybase64

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, Media, MediaKind, TokenIds
from gateway.contracts.media import Blob, PlacedMedia, blob_name, blob_names, placed_media
from gateway.contracts.ports import Ledger
from gateway.contracts.records import TurnRecord
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

UNTRAINABLE = "media"
"""`untrainable_reason` of such a turn."""

_NAMES = {MediaKind.IMAGE: "images", MediaKind.AUDIO: "audio", MediaKind.VIDEO: "videos"}


def shown_media(template: ChatTemplate, messages: Sequence[JsonValue]) -> tuple[PlacedMedia, ...]:
    """All media of a conversation in order; raises InvalidRequest for one that the template would drop in silence."""
    found = tuple(placed_media(messages))
    for place, role, media in found:
        if not template.shows_media(role, media.kind):
            name = _NAMES[media.kind]
            raise InvalidRequest(f"{place}: this model takes no {name}: its template shows none in {role} messages")
    return found


def check_placeholders(
    tokenizer: ChatTokenizer, template: ChatTemplate, found: Sequence[PlacedMedia], token_ids: TokenIds
) -> None:
    """Raise InvalidRequest for a prompt int32[P] whose text holds more or fewer placeholders than it has media.

    Engines that decode a prompt to find them cannot tell what an agent wrote or the model sampled from what the
    template wrote; SGLang 0.5.23 never answers a request where the numbers differ. It decodes the whole prompt.
    """
    texts = [token.text for token in tokenizer.added_tokens.values()]
    expected: Counter[str] = Counter(dict.fromkeys(_all_placeholders(template, texts), 0))
    for _, role, media in found:
        expected.update(template.placeholders(_prompt_role(role), media.kind, texts))
    text = tokenizer.decode(token_ids)
    for placeholder, count in expected.items():
        if (num_found := text.count(placeholder)) != count:
            raise InvalidRequest(
                f"the prompt holds {placeholder!r} {num_found} times, {count} stand for its {len(found)} images, "
                "recordings and films: engines cannot tell them apart; leave that text out"
            )


async def load_media(
    found: Sequence[PlacedMedia], sent: Mapping[str, Blob], ledger: Ledger, session_id: str, *, takes_urls: bool
) -> tuple[Media, ...]:
    """What the engine is sent: references as data URLs, made of the bytes that were sent or that the session has.

    takes_urls: whether an engine may be asked to fetch an http(s) URL. Raises InvalidRequest for one where it may not,
    and for a reference to bytes that nobody sent to this session.
    """
    for place, _, media in found:
        if blob_name(media.url) is None and not takes_urls:
            raise InvalidRequest(f"{place}: http(s) URLs are not taken here; send a data: URL")
    return tuple([await _loaded(each, sent, ledger, session_id) for each in found])


async def keep_media(ledger: Ledger, session_id: str, messages: Sequence[JsonValue], sent: Mapping[str, Blob]) -> None:
    """Store the bytes that newly recorded messages refer to; durable when it returns, as the turn will be (I4)."""
    names = blob_names(messages) & sent.keys()
    await asyncio.gather(*(ledger.put_blob(session_id, sent[name]) for name in names))


def num_prompt_tokens(record: TurnRecord, num_ids: int) -> int:
    """How long a turn's prompt was: as many as its ids, or what the engine counted where it had media to read."""
    return int(record.meta.get("media", {}).get("engine_prompt_tokens") or num_ids)


def _all_placeholders(template: ChatTemplate, texts: Sequence[str]) -> set[str]:
    return {text for kind in MediaKind for text in template.placeholders("user", kind, texts)}


def _prompt_role(role: str) -> str:
    """A raw prompt has the placeholders that a question would have."""
    return "user" if role == "prompt" else role


async def _loaded(each: PlacedMedia, sent: Mapping[str, Blob], ledger: Ledger, session_id: str) -> Media:
    name = blob_name(each.media.url)
    if name is None:
        return each.media
    blob = sent.get(name) or await ledger.blob(session_id, name)
    if blob is None:
        raise InvalidRequest(f"{each.place}: this session has no bytes with sha256 {name}; send a data: URL")
    return Media(each.media.kind, await asyncio.to_thread(_data_url, blob))


def _data_url(blob: Blob) -> str:
    return f"data:{blob.media_type};base64,{pybase64.b64encode(blob.content).decode('ascii')}"
