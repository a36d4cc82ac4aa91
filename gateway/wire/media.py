"""Images, recordings and films in messages, whatever the dialect: their bytes taken out, a reference left in the part.

    {"type": "input_audio", "input_audio": {"data": "UklGR…", "format": "wav"}}
    {"type": "audio_url", "audio_url": {"url": "verbatim-blob:sha256-…", "media_type": "audio/wav", "num_bytes": …, …}}

A reference is made of the bytes alone, so that a replay is the message that was recorded. Other keys of a part stay. An
http(s) URL stays as it is: the gateway never fetches one. No other place is taken, because some engines would open a
file of theirs that an agent names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pybase64

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, MediaKind
from gateway.contracts.media import MEDIA_KEYS, MEDIA_PARTS, SENT_BLOCKS, Blob, blob_name, blob_names, placed_media
from gateway.wire.fields import kind_of

MAX_BLOB_BYTES = 32 * 2**20
"""Of one image, recording or film."""

MAX_MEDIA = 512
"""In one request; every replay sends them again."""

_DATA_URL = re.compile(r"data:(?P<media_type>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]*/[a-z0-9][a-z0-9!#$&^_.+-]*")
_UNNAMED_TYPE = "application/octet-stream"
_PLACES = "a data: URL with base64, or an http(s) URL"

_KINDS: Mapping[str, MediaKind] = {
    **MEDIA_PARTS,
    **{kind.value: kind for kind in MediaKind},
    **{f"input_{kind.value}": kind for kind in MediaKind},
}
"""`type` of a part in any spelling that clients use → what it is."""

_FILES = frozenset(("file", "file_url", "input_file"))


class TakenMedia(NamedTuple):
    """Messages with references in place of bytes, the bytes by sha256, and whether any part is no text."""

    messages: tuple[JsonValue, ...]
    blobs: Mapping[str, Blob]
    has_media: bool


def have_parts(messages: Sequence[JsonValue]) -> bool:
    """Whether any message has more than a text: nearly none has."""
    for message in messages:
        if isinstance(message.get("content"), list):
            return True
        if SENT_BLOCKS in message and isinstance(message[SENT_BLOCKS], list):
            return True
    return False


def take_media(messages: Sequence[JsonValue], first: int = 0) -> TakenMedia:
    """Put the parts of messages, from index `first` on, that are no text into one spelling; raises InvalidRequest
    naming the part that cannot be read, or that no model is shown (a file)."""
    if not have_parts(messages):
        return TakenMedia(tuple(messages), {}, has_media=False)
    taker = _Taker()
    taken = tuple(taker.message(message, f"messages[{i}]") for i, message in enumerate(messages, start=first))
    has_media = bool(taker.blobs or blob_names(taken)) or any(True for _ in placed_media(taken))
    return TakenMedia(taken, taker.blobs, has_media)


def take_engine_media(
    fields: Mapping[str, JsonValue], num_prompts: int
) -> tuple[list[list[JsonValue]], dict[str, Blob]]:
    """SGLang's `image_data`, `video_data` and `audio_data`: for each prompt its parts, in one spelling.

    One prompt has a place or a list of them; several have a list with an entry for each, which is a place, a list or
    null. A place may be bare base64 here. Raises InvalidRequest.
    """
    taker = _Taker()
    parts: list[list[JsonValue]] = [[] for _ in range(num_prompts)]
    for kind in MediaKind:
        name = f"{kind.value}_data"
        for i, (own, places) in enumerate(zip(parts, _places(fields.get(name), name, num_prompts), strict=True)):
            own += [taker.place(place, kind, f"{name}[{i}][{j}]") for j, place in enumerate(places)]
    return parts, taker.blobs


class _Taker:
    """Takes bytes out of one request's parts; equal bytes once."""

    def __init__(self) -> None:
        self.blobs: dict[str, Blob] = {}
        self._num_media = 0

    def message(self, message: JsonValue, at: str) -> JsonValue:
        """One message; the same object where it holds text only."""
        changed = {
            key: [read(part, f"{at}.{key}[{i}]") for i, part in enumerate(message[key])]
            for key, read in (("content", self._part), (SENT_BLOCKS, self._block))
            if isinstance(message.get(key), list)
        }
        return {**message, **changed} if any(value != message[key] for key, value in changed.items()) else message

    def place(self, place: JsonValue, kind: MediaKind, at: str) -> JsonValue:
        """A part for a place that stands alone, `{"url": …}` or bare base64 too."""
        if isinstance(place, Mapping):
            return self._spelt({}, place, kind, at)
        if isinstance(place, str) and not place.startswith(("http:", "https:", "data:", "verbatim-blob:")):
            place = f"data:{_UNNAMED_TYPE};base64,{place}"
        return self._spelt({}, {"url": place}, kind, at)

    def _part(self, part: JsonValue, at: str) -> JsonValue:
        name = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(name, str):
            return part
        if name in _FILES or (name == "document" and not _has_text(part)):
            raise InvalidRequest(f"{at}: this model takes no files; send their text, or pages as images")
        if name not in _KINDS:
            return part
        kind = _KINDS[name]
        keys = (name, f"{kind.value}_url", kind.value, "url")
        key = next((key for key in keys if part.get(key) is not None), None)
        if key is None:
            other = f"; {', '.join(sorted(part.keys() - {'type'}))} cannot be read here" if len(part) > 1 else ""
            raise InvalidRequest(f"{at}: {kind.value} without a URL{other}; expected {_PLACES}")
        found = part[key] if isinstance(part[key], Mapping) else {"url": part[key]}
        others = {k: v for k, v in part.items() if k not in MEDIA_KEYS | {"type", "url"}}
        return self._spelt(others, found, kind, f"{at}.{key}")

    def _spelt(
        self, others: Mapping[str, JsonValue], found: Mapping[str, JsonValue], kind: MediaKind, at: str
    ) -> dict[str, JsonValue]:
        self._num_media += 1
        if self._num_media > MAX_MEDIA:
            raise InvalidRequest(f"{at}: at most {MAX_MEDIA} images, recordings and films in a request")
        name = f"{kind.value}_url"
        url = found.get("url")
        if url is None and isinstance(found.get("data"), str):  # OpenAI's input_audio
            url = f"data:{_audio_type(found, kind, at)};base64,{found['data']}"
        if not isinstance(url, str):
            raise InvalidRequest(f"{at}.url: expected {_PLACES}, got {kind_of(url)}")
        kept = {key: value for key, value in found.items() if key not in ("url", "data")}
        return {"type": name, name: {"url": url, **kept} | self._reference(url, kind, at), **others}

    def _block(self, block: JsonValue, at: str) -> JsonValue:
        """A block of Anthropic's that stays beside its message: its bytes go all the same."""
        source = block.get("source") if isinstance(block, Mapping) else None
        if not isinstance(source, Mapping) or source.get("type") != "base64" or not isinstance(source.get("data"), str):
            return block
        blob = self._blob(source["data"], str(source.get("media_type")).lower(), at)
        return {**block, "source": {**source, "data": blob.url}}

    def _reference(self, url: str, kind: MediaKind, at: str) -> dict[str, JsonValue]:
        """What stands in a part in place of a data URL; {} for a URL that stays."""
        if url.startswith(("http://", "https://")) or blob_name(url) is not None:
            return {}
        header = _DATA_URL.match(url)
        if header is None:
            raise InvalidRequest(f"{at}: expected {_PLACES}, got {url[:40]!r}")
        media_type, parameters = header["media_type"].lower(), header["parameters"].lower()
        if not parameters.endswith(";base64"):
            raise InvalidRequest(f"{at}: a data: URL must say ;base64 before its comma")
        if not media_type.startswith((f"{kind.value}/", _UNNAMED_TYPE)) or not _MEDIA_TYPE.fullmatch(media_type):
            raise InvalidRequest(f"{at}: expected {kind.value}/… as media type, got {media_type[:60]!r}")
        blob = self._blob(url[header.end() :], media_type, at)
        return {"url": blob.url, "media_type": media_type, "num_bytes": len(blob.content)}

    def _blob(self, encoded: str, media_type: str, at: str) -> Blob:
        if len(encoded) > MAX_BLOB_BYTES // 3 * 4 + 4:
            raise InvalidRequest(f"{at}: longer than {MAX_BLOB_BYTES} bytes")
        try:
            content = pybase64.b64decode(encoded, validate=True)
        except ValueError as error:  # binascii.Error is one; so is what is raised for other characters than ASCII
            raise InvalidRequest(f"{at}: the data is not base64 ({error})") from error
        if not content:
            raise InvalidRequest(f"{at}: the data is empty")
        blob = Blob.of(content, media_type)
        return self.blobs.setdefault(blob.sha256, blob)


def _audio_type(found: Mapping[str, JsonValue], kind: MediaKind, at: str) -> str:
    name = found.get("format")
    if not isinstance(name, str) or not _MEDIA_TYPE.fullmatch(f"{kind.value}/{name.lower()}"):
        raise InvalidRequest(f"{at}.format: expected a name such as wav, got {name!r:.40}")
    return f"{kind.value}/{name.lower()}"


def _has_text(document: Mapping[str, JsonValue]) -> bool:
    source = document.get("source")
    return isinstance(source, Mapping) and source.get("type") not in ("base64", "file", "url")


def _places(value: JsonValue, name: str, num_prompts: int) -> Iterator[Sequence[JsonValue]]:
    """For each prompt its places."""
    if value is None:
        value = [None] * num_prompts
    elif num_prompts == 1:
        value = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not isinstance(value, list) or len(value) != num_prompts:
        raise InvalidRequest(f"{name}: expected an entry for each of {num_prompts} prompts, got {kind_of(value)}")
    for entry in value:
        yield [place for place in (entry if isinstance(entry, list) else [entry]) if place is not None]
