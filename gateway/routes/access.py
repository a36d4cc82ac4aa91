"""Who may do what: an agent's key opens its own session only, an operator's key opens everything (design 5).

A session's key is `vbs-<id>.<secret>`: it names its session, the secret is random, and only its sha256 is stored.
Operators' keys are kept as sha256 too. Without one all checks of keys are off; the composition root allows that on
loopback only, and `HostCheck` keeps the web pages out that a browser on the same machine may show.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from gateway.contracts.errors import ConfigurationError, Forbidden, Unauthorized
from gateway.contracts.records import SessionRecord
from gateway.routes.audit import audit_note

_PREFIX = "vbs-"
_OPEN_SECRET = "open"
_FINGERPRINT_CHARACTERS = 8
_BETWEEN_KEYS = re.compile(r"[\s,]+")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/,]*))(?::[0-9]*)?")
_MOST_NAMES_SEEN = 64
_NEEDS_ITS_KEY = "this session needs its key as a bearer token (POST /sessions returned it as api_key)"
_NOT_ITS_KEY = "the key that was sent does not open this session"


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A new key: `text` for the agent, `stored` (sha256 hex, "" where keys are off) for the ledger."""

    text: str
    stored: str


class Access:
    """Checks requests against operators' keys.

    operator_digests: what `read_operator_keys` gives; empty: keys are off. on_refused hears why a call was refused,
    `no_key` or `wrong_key`.
    """

    def __init__(self, operator_digests: Sequence[str], *, on_refused: Callable[[str], None] = lambda _: None) -> None:
        self._operator_digests = tuple(operator_digests)
        self._on_refused = on_refused

    @property
    def keys_are_on(self) -> bool:
        """Whether keys are checked."""
        return bool(self._operator_digests)

    async def check_operator(self, request: Request) -> None:
        """Raise Unauthorized without a key, Forbidden for a key that is no operator's; either way the audit hears of
        the call."""
        key = _presented(request)
        audit_note(request.scope).reach_operators_call(request.path_params)
        if not self.keys_are_on or self._is_operator(request, key):
            return
        if key is None:
            raise self._no_key("this call needs the operator's key as a bearer token")
        raise self._wrong_key("this call needs the operator's key; the key that was sent is another one")

    def check_agent(self, request: Request, session: SessionRecord) -> None:
        """Raise Unauthorized or Forbidden unless the key is this session's or the operator's."""
        if not self._operator_digests:
            return
        key = _presented(request)
        if self._is_operator(request, key):
            return
        if key is None:
            raise self._no_key(_NEEDS_ITS_KEY)
        if not session.key_hash or not hmac.compare_digest(key_digest(key), session.key_hash):
            raise self._wrong_key(_NOT_ITS_KEY)

    def check_newcomer(self, request: Request, session_id: str | None) -> None:
        """Raise Unauthorized or Forbidden for a session that does not exist, as for one that does: who has no key to it
        must not learn which sessions there are. session_id: None where the request names none."""
        if self.opens_all(request):
            return
        key = _presented(request)
        if session_id is None:
            raise self._no_key("no session has this id or key; make one with POST /sessions")
        raise self._no_key(_NEEDS_ITS_KEY) if key is None else self._wrong_key(_NOT_ITS_KEY)

    def opens_all(self, request: Request) -> bool:
        """Whether this caller may use every session, those that nobody made yet among them."""
        return not self.keys_are_on or self._is_operator(request, _presented(request))

    def new_key(self, session_id: str, *, seed: str | None = None) -> SessionKey:
        """A key for a new session; the same for the same `seed`, which must be hard to guess, else a random one."""
        name = base64.urlsafe_b64encode(session_id.encode()).decode().rstrip("=")
        if not self.keys_are_on:
            return SessionKey(f"{_PREFIX}{name}.{_OPEN_SECRET}", "")
        text = f"{_PREFIX}{name}.{secrets.token_urlsafe(24) if seed is None else self._secret_of(session_id, seed)}"
        return SessionKey(text, key_digest(text))

    def _secret_of(self, session_id: str, seed: str) -> str:
        """Nobody can make it from the seed alone; another first operator's key makes another one."""
        facts = json.dumps([session_id, seed]).encode()
        mac = hmac.digest(self._operator_digests[0].encode(), facts, "sha256")
        return base64.urlsafe_b64encode(mac[:24]).decode()

    def _is_operator(self, request: Request, key: str | None) -> bool:
        if key is None:
            return False
        digest = key_digest(key)
        note = audit_note(request.scope)
        note.key_fingerprint = digest[:_FINGERPRINT_CHARACTERS]
        fitting = [known for known in self._operator_digests if hmac.compare_digest(digest, known)]  # no early end
        note.has_operators_key = bool(fitting)
        return bool(fitting)

    def _no_key(self, message: str) -> Unauthorized:
        self._on_refused("no_key")
        return Unauthorized(message)

    def _wrong_key(self, message: str) -> Forbidden:
        self._on_refused("wrong_key")
        return Forbidden(message)


def read_operator_keys(text: str | None) -> Sequence[str]:
    """sha256 hex of each key of a list whose separators are spaces or commas; None or "": no keys.

    Of several all are good, so that one can replace another. Raises ConfigurationError for a list without any, and for
    a key that no header can carry.
    """
    keys = [key for key in _BETWEEN_KEYS.split(text or "") if key]
    if text and not keys:
        raise ConfigurationError("the operator's key is set and empty")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigurationError("the operator's key must be printable ASCII: it is sent in a header")
    return tuple(dict.fromkeys(map(key_digest, keys)))


class HostCheck:
    """Where keys are off: only calls that name this machine, and no page of another site.

    A browser lets any site call 127.0.0.1 under a name of the site's own (DNS rebinding), and send what needs no
    answer to any address (`Origin` names the site then). names: hosts that are fine besides loopback's own.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower().rstrip(".").strip("[]") for name in names)
        self._seen: set[bytes] = set()

    def is_plainly_ours(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request names one host, which was found fine before, and no page sent it; headers: those of the
        scope. Where it does not, `refusal` looks closely."""
        return headers.get(b"host") in self._seen and b"origin" not in headers and len(headers) == len(scope["headers"])

    def refusal(self, scope: Scope) -> str | None:
        """Why a request is refused, None if it is fine."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or not all(self._is_ours(host) for host in hosts):
            named = ", ".join(hosts)[:200]
            return f"Host: {named!r} is not this gateway's name; call 127.0.0.1 or list the name in `allowed_hosts`"
        for origin in headers.getlist("origin"):
            site = origin.rpartition("://")[2].lower()
            if [site] != [host.lower() for host in hosts] and not self._is_listed(site):
                return f"Origin: pages of {origin[:200]!r} may not call this gateway"
        if len(self._seen) < _MOST_NAMES_SEEN:
            self._seen.update(host.encode("latin-1") for host in hosts)
        return None

    def _is_ours(self, host: str) -> bool:
        name = _host_name(host)
        return name == "localhost" or self._is_listed(host) or _is_loopback_address(name)

    def _is_listed(self, host: str) -> bool:
        return _host_name(host) in self._names


def session_of_key(request: Request) -> str | None:
    """The session that a request's key names, None if it is no session's key; says nothing about its secret."""
    key = _presented(request)
    if key is None or not key.startswith(_PREFIX):
        return None
    name = key.removeprefix(_PREFIX).partition(".")[0]
    try:
        return base64.b64decode(name + "=" * (-len(name) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:  # letters that base64 does not have, or bytes that are no text
        return None


def _presented(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("x-api-key") or None


def key_digest(key: str) -> str:
    """sha256 hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def _host_name(host: str) -> str:
    """Without its port; "" for what is no host."""
    found = _HOST.fullmatch(host.strip().lower())
    return "" if found is None else (found[1] or found[2]).rstrip(".")


def _is_loopback_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
