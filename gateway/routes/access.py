"""Who may do what: an agent's key opens its own session only, the operator's key opens everything (design 5).

A session's key is `vbs-<id>.<secret>`: it names its session, the secret is random, and only its sha256 is stored.
Without an operator's key all checks are off; the composition root allows that on loopback only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass

from fastapi import Request

from gateway.contracts.errors import Forbidden, Unauthorized
from gateway.contracts.records import SessionRecord

_PREFIX = "vbs-"
_OPEN_SECRET = "open"
_NEEDS_ITS_KEY = "this session needs its key as a bearer token (POST /sessions returned it as api_key)"
_NOT_ITS_KEY = "the key that was sent does not open this session"


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A new key: `text` for the agent, `stored` (sha256 hex, "" where keys are off) for the ledger."""

    text: str
    stored: str


class Access:
    """Checks requests against `operator_key` (None: keys are off)."""

    def __init__(self, operator_key: str | None) -> None:
        self._operator_key = operator_key

    @property
    def keys_are_on(self) -> bool:
        """Whether anything is checked."""
        return self._operator_key is not None

    async def check_operator(self, request: Request) -> None:
        """Raise Unauthorized without a key, Forbidden for a key that is not the operator's."""
        if not self.keys_are_on or self._is_operator(_presented(request)):
            return
        if _presented(request) is None:
            raise Unauthorized("this call needs the operator's key as a bearer token")
        raise Forbidden("this call needs the operator's key; the key that was sent is another one")

    def check_agent(self, request: Request, session: SessionRecord) -> None:
        """Raise Unauthorized or Forbidden unless the key is this session's or the operator's."""
        key = _presented(request)
        if not self.keys_are_on or self._is_operator(key):
            return
        if key is None:
            raise Unauthorized(_NEEDS_ITS_KEY)
        if not session.key_hash or not hmac.compare_digest(_digest(key), session.key_hash):
            raise Forbidden(_NOT_ITS_KEY)

    def check_newcomer(self, request: Request, session_id: str | None) -> None:
        """Raise Unauthorized or Forbidden for a session that does not exist, as for one that does: who has no key to it
        must not learn which sessions there are. session_id: None where the request names none."""
        key = _presented(request)
        if not self.keys_are_on or self._is_operator(key):
            return
        if session_id is None:
            raise Unauthorized("no session has this id or key; make one with POST /sessions")
        raise Unauthorized(_NEEDS_ITS_KEY) if key is None else Forbidden(_NOT_ITS_KEY)

    def new_key(self, session_id: str, *, seed: str | None = None) -> SessionKey:
        """A key for a new session; the same for the same `seed`, which must be hard to guess, else a random one."""
        name = base64.urlsafe_b64encode(session_id.encode()).decode().rstrip("=")
        if not self.keys_are_on:
            return SessionKey(f"{_PREFIX}{name}.{_OPEN_SECRET}", "")
        text = f"{_PREFIX}{name}.{secrets.token_urlsafe(24) if seed is None else self._secret_of(session_id, seed)}"
        return SessionKey(text, _digest(text))

    def _secret_of(self, session_id: str, seed: str) -> str:
        """Nobody can make it from the seed alone."""
        facts = json.dumps([session_id, seed]).encode()
        mac = hmac.digest((self._operator_key or "").encode(), facts, "sha256")
        return base64.urlsafe_b64encode(mac[:24]).decode()

    def _is_operator(self, key: str | None) -> bool:
        return (
            key is not None
            and self._operator_key is not None
            and hmac.compare_digest(key.encode(), self._operator_key.encode())
        )


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


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
