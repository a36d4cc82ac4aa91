"""How many turns agents may have at once and per second: of one session, and of all together (`[limits]`).

A request takes as many turns as it has choices, all or none. Only turns that begin are counted: a retry that joins a
running turn, or is given a recorded reply, takes nothing; one that goes on from a kept part samples, and is a turn. A
turn whose client has gone counts until its sampling has ended. Rates also cover calls that sample nothing.

Between sessions the limits of all are fair: who is refused stands in a line, one place a session, and what comes free
is kept for those before. A session that asks without pause has one place like any other, and goes to the end of the
line with every turn it gets. A place is kept until a little after the time that `Retry-After` named.

Figures are this process's own: several gateways have them each. (Runner-up for the bucket: the `limits` package, whose
windows know neither a line nor several turns at a time.)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol

from gateway.contracts.errors import ConfigurationError, InvalidRequest, TooManyRequests

_KEPT_SECONDS = 1.0
"""How long a place in the line is kept beyond the time that its session was told."""
_LONGEST_WAIT_SECONDS = 30.0
"""That is told for turns to end: nobody knows that so well."""
_FIRST_GUESS_SECONDS = 1.0
_MEMORY = 0.1
"""Weight of the last turn in the mean length of turns."""
_FEW_BUCKETS = 1024


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """0 is no limit. requests_per_second: a request counts once for each of its choices, and up to a second's worth may
    come at a time. concurrent: turns under way."""

    requests_per_second_per_session: float = 0.0
    concurrent_per_session: int = 0
    requests_per_second: float = 0.0
    concurrent: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"limits.{name} is {value}: expected 0 (no limit) or more")


class Ending(Protocol):
    """A turn, as far as limits go."""

    def on_end(self, do: Callable[[], None]) -> None:
        """Have something done when it is over."""
        ...


class TokenBucket:
    """`rate` a second, at most a second's worth (and at least one) at a time. More than that at a time takes a full
    bucket, and leaves a debt."""

    def __init__(self, rate: float, *, now: float) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate)
        self._level = self._capacity
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; below 0 is owed."""
        return min(self._capacity, self._level + max(0.0, now - self._at) * self._rate)

    def is_full(self, now: float) -> bool:
        """Whether it is as a new one."""
        return self.level(now) >= self._capacity

    def wait_seconds(self, num: int, now: float, *, ahead: int = 0) -> float:
        """Until `num` may be taken, 0 if now; ahead: what others take before."""
        missing = min(num, self._capacity) + ahead - self.level(now)
        return max(0.0, missing / self._rate)

    def take(self, num: int, now: float) -> None:
        """Without asking."""
        self._level, self._at = self.level(now) - num, now

    def give_back(self, num: int, now: float) -> None:
        """What was taken and not used."""
        self._level, self._at = min(self._capacity, self.level(now) + num), now


class _Place(NamedTuple):
    """Of a session in the line: how many turns it wants, and until when the place is kept."""

    num_turns: int
    until: float


class _Line:
    """Sessions that were refused, in order of the first time since they last got something."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def ahead_of(self, session_id: str, now: float) -> int:
        """Turns that others want who came before."""
        for late in [name for name, place in self._places.items() if place.until < now]:
            del self._places[late]
        before = itertools.takewhile(lambda name: name != session_id, self._places)
        return sum(self._places[name].num_turns for name in before)

    def stand(self, session_id: str, place: _Place) -> None:
        """At the end, or where it stands already."""
        self._places[session_id] = place

    def leave(self, session_id: str) -> None:
        """It got what it wanted."""
        self._places.pop(session_id, None)


class _Running:
    """Turns under way, oldest first, and how long turns take."""

    def __init__(self) -> None:
        self._all: dict[int, float] = {}
        self._of: dict[str, dict[int, float]] = {}
        self._numbers = itertools.count()
        self._mean_seconds = _FIRST_GUESS_SECONDS

    def count(self, session_id: str | None) -> int:
        """Of one session, or all (None)."""
        return len(self._started(session_id))

    def begin(self, session_id: str, now: float) -> int:
        """One more; its number."""
        number = next(self._numbers)
        self._all[number] = now
        self._of.setdefault(session_id, {})[number] = now
        return number

    def end(self, session_id: str, number: int, now: float | None) -> None:
        """now: None for one that never began."""
        started = self._all.pop(number)
        mine = self._of[session_id]
        del mine[number]
        if not mine:
            del self._of[session_id]
        if now is not None:
            self._mean_seconds += _MEMORY * (now - started - self._mean_seconds)

    def wait_seconds(self, session_id: str | None, missing: int, now: float) -> float:
        """A guess when so many more will have ended: as turns took so far."""
        started = self._started(session_id)
        if missing <= 0 or not started:
            return 0.0
        first = max(0.0, next(iter(started.values())) + self._mean_seconds - now)
        return min(first + (missing - 1) * self._mean_seconds / len(started), _LONGEST_WAIT_SECONDS)

    def _started(self, session_id: str | None) -> dict[int, float]:
        return self._all if session_id is None else self._of.get(session_id, {})


class Quotas:
    """Holds agents to `settings`. on_refused hears the limit that was met, by its name."""

    def __init__(
        self,
        settings: LimitSettings,
        *,
        on_refused: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._limits_anything = any(asdict(settings).values())  # else nothing is counted
        self._on_refused = on_refused
        self._clock = clock
        self._running = _Running()
        self._line = _Line()
        rate = settings.requests_per_second
        self._bucket = TokenBucket(rate, now=clock()) if rate else None
        self._buckets: dict[str, TokenBucket] = {}
        self._num_buckets_to_sweep = _FEW_BUCKETS

    def permit(self, session_id: str, num_turns: int) -> Permit | None:
        """For a request of so many turns, some of which may turn out to run already; None where nothing is limited."""
        return Permit(self, session_id, num_turns) if self._limits_anything else None

    def admit_call(self, session_id: str) -> None:
        """Count a call that samples nothing; raises TooManyRequests."""
        if self._limits_anything:
            self._admit(session_id, 1, samples=False)

    def admit_turns(self, session_id: str, num_turns: int) -> list[int]:
        """Count turns that are about to begin, all of them or none; their numbers.

        Raises TooManyRequests with the time after which a retry can help, InvalidRequest where none ever can.
        """
        limits = [limit for limit in (self._settings.concurrent_per_session, self._settings.concurrent) if limit]
        if limits and num_turns > min(limits):
            raise InvalidRequest(f"n: {num_turns} turns at once, and at most {min(limits)} may run")
        self._admit(session_id, num_turns, samples=True)
        now = self._clock()
        return [self._running.begin(session_id, now) for _ in range(num_turns)]

    def end(self, session_id: str, number: int) -> None:
        """A turn is over."""
        self._running.end(session_id, number, self._clock())

    def give_back(self, session_id: str, numbers: list[int]) -> None:
        """Turns that never began."""
        now = self._clock()
        for number in numbers:
            self._running.end(session_id, number, None)
        for bucket in (self._bucket, self._buckets.get(session_id)):
            if bucket is not None:
                bucket.give_back(len(numbers), now)

    def _admit(self, session_id: str, num: int, *, samples: bool) -> None:
        now = self._clock()
        own = self._own_bucket(session_id, now)
        if samples:
            self._check_own_turns(session_id, num, now)
        if own is not None and (seconds := own.wait_seconds(num, now)):
            raise self._refusal("requests_per_second_per_session", "this session asks too often", seconds)
        self._check_all(session_id, num, now, samples=samples)
        self._line.leave(session_id)
        for bucket in (own, self._bucket):
            if bucket is not None:
                bucket.take(num, now)

    def _check_own_turns(self, session_id: str, num: int, now: float) -> None:
        limit = self._settings.concurrent_per_session
        missing = self._running.count(session_id) + num - limit
        if limit and missing > 0:
            seconds = self._running.wait_seconds(session_id, missing, now)
            raise self._refusal("concurrent_per_session", f"this session may run {limit} turns at once", seconds)

    def _check_all(self, session_id: str, num: int, now: float, *, samples: bool) -> None:
        """The limits of all; who is refused stands in the line."""
        limit = self._settings.concurrent
        ahead = self._line.ahead_of(session_id, now)
        missing = self._running.count(None) + num + ahead - limit if limit and samples else 0
        if missing > 0:
            name, seconds = "concurrent", max(self._running.wait_seconds(None, missing, now), _KEPT_SECONDS)
        elif self._bucket is not None and (seconds := self._bucket.wait_seconds(num, now, ahead=ahead)):
            name = "requests_per_second"
        else:
            return
        self._line.stand(session_id, _Place(num, now + math.ceil(seconds) + _KEPT_SECONDS))
        raise self._refusal(name, "the gateway has as much to do as it may", seconds)

    def _own_bucket(self, session_id: str, now: float) -> TokenBucket | None:
        rate = self._settings.requests_per_second_per_session
        if not rate:
            return None
        if session_id not in self._buckets:
            self._sweep(now)
            self._buckets[session_id] = TokenBucket(rate, now=now)
        return self._buckets[session_id]

    def _sweep(self, now: float) -> None:
        """Full buckets are as good as none; looked for whenever there are twice as many as were left."""
        if len(self._buckets) < self._num_buckets_to_sweep:
            return
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if not bucket.is_full(now)}
        self._num_buckets_to_sweep = max(_FEW_BUCKETS, 2 * len(self._buckets))

    def _refusal(self, name: str, why: str, seconds: float) -> TooManyRequests:
        self._on_refused(name)
        seconds = max(1, math.ceil(seconds))
        return TooManyRequests(f"{why} ({name}); try again in {seconds} s", retry_after_seconds=seconds)


class Permit:
    """What one request may begin: `ask` before each turn that begins, `settle` after each choice, then `close`."""

    def __init__(self, quotas: Quotas, session_id: str, num_turns: int) -> None:
        self._quotas = quotas
        self._session_id = session_id
        self._num_left = num_turns
        self._held: list[int] = []
        self._begins = False

    def ask(self) -> None:
        """A turn is about to begin: room for it and for all choices still to come, or none; raises TooManyRequests."""
        if not self._held:
            self._held = self._quotas.admit_turns(self._session_id, self._num_left)
        self._begins = True

    def settle(self, turn: Ending) -> None:
        """One choice has its turn, which holds what was asked for until it ends."""
        self._num_left -= 1
        if self._begins:
            turn.on_end(partial(self._quotas.end, self._session_id, self._held.pop()))
        elif self._held:  # it runs already
            self._quotas.give_back(self._session_id, [self._held.pop()])
        self._begins = False

    def close(self) -> None:
        """Give back what no turn holds."""
        self._quotas.give_back(self._session_id, self._held)
        self._held = []
