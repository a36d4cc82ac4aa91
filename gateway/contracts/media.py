"""Parts of messages that are no text: how a message spells them, and how a record refers to their bytes.

    {"type": "image_url", "image_url": {"url": "verbatim-blob:sha256-…", "media_type": "image/png", "num_bytes": 70}}

`gateway.wire` puts every dialect's parts into this spelling and takes their bytes out, `gateway.ledger` keeps the bytes
once, by content, and `gateway.sessions` puts them back for the engine. A part may also name an http(s) URL, which
nobody here ever fetches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.contracts.generation import JsonValue, Media, MediaKind

MEDIA_PARTS: Mapping[str, MediaKind] = {f"{kind.value}_url": kind for kind in MediaKind}
"""`type` of a part, which is also the key of its object → what it is."""

MEDIA_KEYS = frozenset(name for kind in MediaKind for name in (kind.value, f"{kind.value}_url", f"input_{kind.value}"))
"""Keys by which templates know a part that is no text."""

RAW_MEDIA = "media"
"""Key of the message that stands for a raw prompt: its parts that are no text."""

SENT_BLOCKS = "anthropic_content"
"""Key of an assistant message: its blocks as they came, where chat completions cannot spell all of them."""

_REFERENCE = re.compile(r"verbatim-blob:sha256-([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that a message refers to. sha256: hex, of the bytes. media_type: as the agent named it (`image/png`)."""

    sha256: str
    media_type: str
    content: bytes

    @classmethod
    def of(cls, content: bytes, media_type: str) -> Blob:
        """A blob under its own name."""
        return cls(hashlib.sha256(content).hexdigest(), media_type, content)

    @property
    def url(self) -> str:
        """How a record refers to it."""
        return f"verbatim-blob:sha256-{self.sha256}"


class PlacedMedia(NamedTuple):
    """A part that is no text. place: where it stands, as errors name it (`messages[2].content[0]`)."""

    place: str
    role: str
    media: Media


def blob_name(url: str) -> str | None:
    """The sha256 that a reference names; None for a URL that is none."""
    found = _REFERENCE.fullmatch(url)
    return None if found is None else found.group(1)


def media_kind(part: JsonValue) -> MediaKind | None:
    """What a part is, None for text and for what nobody here knows."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return MEDIA_PARTS.get(kind) if isinstance(kind, str) else None


def media_of(part: JsonValue) -> Media | None:
    """A part's media, None for a part that has none."""
    kind = media_kind(part)
    if kind is None:
        return None
    found = part.get(f"{kind.value}_url")
    url = found.get("url") if isinstance(found, Mapping) else None
    return Media(kind, url) if isinstance(url, str) else None


def placed_media(messages: Sequence[JsonValue]) -> Iterator[PlacedMedia]:
    """All parts of a conversation that are no text, in order."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue
        for key in ("content", RAW_MEDIA):
            for j, part in enumerate(_parts(message, key)):
                if (media := media_of(part)) is not None:
                    yield PlacedMedia(f"messages[{i}].{key}[{j}]", str(message.get("role")), media)


def blob_names(messages: Sequence[JsonValue]) -> frozenset[str]:
    """Every sha256 that messages refer to, also in blocks that stand beside a message."""
    urls = [placed.media.url for placed in placed_media(messages)]
    blocks = [block for message in messages if isinstance(message, Mapping) for block in _parts(message, SENT_BLOCKS)]
    sources = [block["source"] for block in blocks if isinstance(block, Mapping) and "source" in block]
    urls += [
        source["data"] for source in sources if isinstance(source, Mapping) and isinstance(source.get("data"), str)
    ]
    return frozenset(name for name in map(blob_name, urls) if name is not None)


def _parts(message: Mapping[str, JsonValue], key: str) -> Sequence[JsonValue]:
    """Only the message of a raw prompt has media of its own: on others that key is an agent's."""
    parts = message.get(key) if key != RAW_MEDIA or message.get("role") == "prompt" else None
    return parts if isinstance(parts, list) else ()
