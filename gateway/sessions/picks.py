"""Picks: which sampled turns of a session train, by name, and the account of every sampled token they leave out.

    all          every turn
    delivered    turns whose reply was seen: it was delivered, or a later turn goes on from it (the default: tokens that
                 no agent ever saw did not cause the reward)
    final-path   turns that the last delivered turn goes on from, and that turn
    module:function   the operator's own, see `OwnPick`

A pick is chosen among these names and recorded with what it made. It only ever leaves out whole turns; what may not be
trained at all (`trainable_tokens`) no pick brings back.
"""

from __future__ import annotations

import importlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.records import TurnRecord
from gateway.contracts.rollouts import LeftOut, PickReport

DEFAULT_PICK = "delivered"

OwnPick: TypeAlias = Callable[[Sequence[TurnRecord]], Iterable[str]]
"""What `module:function` names: takes all turns of one session in order of index (at least one), returns the turn ids
whose tokens train. A plain function, called in worker threads, also several at a time; it must not change the records
and should give the same answer for the same turns."""


class LeftOutReason(StrEnum):
    """Why sampled tokens do not train; beside these there are the turns' own `untrainable_reason`s."""

    UNDELIVERED = "undelivered"
    NOT_ON_FINAL_PATH = "not_on_final_path"
    NOT_PICKED = "not_picked"
    NO_LOGPROB = "no_logprob"


class Pick(Protocol):
    """One way to choose turns."""

    @property
    def name(self) -> str:
        """What requests and settings call it, and what is recorded."""
        ...

    def leaves_out(self, turns: Sequence[TurnRecord]) -> Mapping[str, LeftOutReason]:
        """The turns that do not train, by turn id, each with its reason; all others do."""
        ...


@dataclass(frozen=True, slots=True)
class PickedTurns:
    """The turns of one session whose tokens train where they may, and the account of all sampled tokens."""

    turn_ids: frozenset[str]
    report: PickReport


def pick_turns(turns: Sequence[TurnRecord], pick: Pick) -> PickedTurns:
    """Apply a pick to all turns of one session.

    A token that may not be trained at all counts under that reason, whatever the pick says of its turn.
    Raises ConfigurationError if the operator's own pick fails or returns something else than ids of these turns.
    """
    left_out = pick.leaves_out(turns)
    tokens_of: defaultdict[str, int] = defaultdict(int)
    turns_of: defaultdict[str, int] = defaultdict(int)
    num_trained = 0
    for turn in turns:
        trainable = int(trainable_tokens(turn).sum())
        reason = left_out.get(turn.turn_id)
        if reason is None:
            num_trained += trainable
        elif trainable or not len(turn.output_token_ids):
            turns_of[reason] += 1
            tokens_of[reason] += trainable
        excluded = len(turn.output_token_ids) - trainable
        if excluded:
            never = turn.untrainable_reason or LeftOutReason.NO_LOGPROB
            turns_of[never] += 1
            tokens_of[never] += excluded
    report = PickReport(
        pick=pick.name,
        num_sampled_tokens=sum(len(turn.output_token_ids) for turn in turns),
        num_trained_tokens=num_trained,
        left_out=tuple(LeftOut(str(reason), turns_of[reason], tokens_of[reason]) for reason in sorted(turns_of)),
    )
    return PickedTurns(frozenset(turn.turn_id for turn in turns) - left_out.keys(), report)


def trainable_tokens(turn: TurnRecord) -> npt.NDArray[np.bool_]:
    """bool[C]: which sampled tokens of a turn may be trained, those of a trainable turn that have a log-prob (I9)."""
    if not turn.trainable:
        return np.zeros(len(turn.output_token_ids), dtype=np.bool_)
    return np.isfinite(turn.output_logprobs)


@dataclass(frozen=True, slots=True)
class AllTurns:
    """Every turn."""

    name: str = "all"

    def leaves_out(self, turns: Sequence[TurnRecord]) -> Mapping[str, LeftOutReason]:
        """Nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class DeliveredTurns:
    """Turns whose reply was seen."""

    name: str = DEFAULT_PICK

    def leaves_out(self, turns: Sequence[TurnRecord]) -> Mapping[str, LeftOutReason]:
        """The turns that nobody saw."""
        seen = _seen(turns)
        return {turn.turn_id: LeftOutReason.UNDELIVERED for turn in turns if turn.turn_id not in seen}


@dataclass(frozen=True, slots=True)
class FinalPath:
    """The conversation that the last delivered turn ends, through new segments too."""

    name: str = "final-path"

    def leaves_out(self, turns: Sequence[TurnRecord]) -> Mapping[str, LeftOutReason]:
        """What was not seen, and what was seen beside the path; where no turn has a delivery, the last seen one ends
        the path."""
        seen = _seen(turns)
        path = _conversation(turns, max((turn for turn in turns if turn.turn_id in seen), key=_lateness, default=None))
        beside = {
            turn.turn_id: LeftOutReason.NOT_ON_FINAL_PATH if turn.turn_id in seen else LeftOutReason.UNDELIVERED
            for turn in turns
        }
        return {turn_id: reason for turn_id, reason in beside.items() if turn_id not in path}


@dataclass(frozen=True, slots=True)
class OperatorPick:
    """The operator's own function; `name` is its `module:function`."""

    name: str
    choose: OwnPick

    def leaves_out(self, turns: Sequence[TurnRecord]) -> Mapping[str, LeftOutReason]:
        """All turns that the function does not return."""
        if not turns:
            return {}
        known = {turn.turn_id for turn in turns}
        try:
            answer = self.choose(tuple(turns))
            is_listing = isinstance(answer, Iterable) and not isinstance(answer, str | bytes)
            ids = list(answer) if is_listing else []
        except Exception as error:  # the user's code may raise anything
            raise ConfigurationError(f"pick {self.name} failed: {_one_line(error)}") from error
        wrong = [turn_id for turn_id in ids if not isinstance(turn_id, str) or turn_id not in known]
        if wrong or not is_listing:
            what = " ".join(repr(wrong[0] if is_listing else answer).split())[:100]
            raise ConfigurationError(
                f"pick {self.name} returned {what} for session {turns[0].session_id}; "
                "it must return a collection of turn ids, each of a turn that it was given"
            )
        return dict.fromkeys(known.difference(ids), LeftOutReason.NOT_PICKED)


@dataclass(frozen=True, slots=True)
class PickChoice:
    """The picks that requests may name: those built in and the operator's; `default` where they name none."""

    picks: tuple[Pick, ...]
    default: Pick

    @classmethod
    def load(cls, configured: str = DEFAULT_PICK) -> PickChoice:
        """`configured` is the default: a built-in name or `module:function`, which is imported and checked here.

        Raises ConfigurationError naming what is wrong.
        """
        default = next((pick for pick in BUILT_IN if pick.name == configured), None)
        if default is not None:
            return cls(BUILT_IN, default)
        own = OperatorPick(configured, _load_function(configured))
        return cls((*BUILT_IN, own), own)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may say."""
        return tuple(pick.name for pick in self.picks)

    def named(self, name: str | None) -> Pick:
        """The pick of that name, None for the default; raises InvalidRequest listing the names.

        A caller only ever names what is here already: no text of a request is imported.
        """
        if name is None:
            return self.default
        for pick in self.picks:
            if pick.name == name:
                return pick
        raise InvalidRequest(f"pick: {name!r} is none of {', '.join(self.names)}")


BUILT_IN: tuple[Pick, ...] = (AllTurns(), DeliveredTurns(), FinalPath())


def _seen(turns: Iterable[TurnRecord]) -> set[str]:
    """A reply that a later turn goes on from was seen, also where its delivery was never noted (a killed gateway).

    What broke off was seen with the turn that brought the rest.
    """
    seen: set[str] = set()
    for turn in sorted(turns, key=lambda turn: turn.index, reverse=True):
        if turn.delivered_at is not None:
            seen.add(turn.turn_id)
        if not turn.attachment.continues or turn.turn_id in seen:
            seen.update(_goes_on_from(turn))
    return seen


def _goes_on_from(turn: TurnRecord) -> list[str]:
    """Of tokens (the parent) and of the conversation, which also goes on where tokens start anew."""
    links = (turn.attachment.parent_id, turn.attachment.follows_id)
    return [turn_id for turn_id in links if turn_id is not None]


def _conversation(turns: Iterable[TurnRecord], last: TurnRecord | None) -> set[str]:
    """`last` and all that it goes on from, directly or not."""
    by_id = {turn.turn_id: turn for turn in turns}
    path: set[str] = set()
    waiting = [] if last is None else [last.turn_id]
    while waiting:
        turn_id = waiting.pop()
        if turn_id in by_id and turn_id not in path:
            path.add(turn_id)
            waiting += _goes_on_from(by_id[turn_id])
    return path


def _lateness(turn: TurnRecord) -> tuple[float, int]:
    return (float("-inf") if turn.delivered_at is None else turn.delivered_at, turn.index)


def _load_function(text: str) -> OwnPick:
    module_name, colon, name = text.partition(":")
    if not colon or not module_name or not name:
        names = ", ".join(pick.name for pick in BUILT_IN)
        raise ConfigurationError(f"pick {text!r} is none of {names}, and no module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigurationError(f"pick {text}: {module_name} cannot be imported: {_one_line(error)}{hint}") from error
    function = vars(module).get(name)
    if not callable(function) or inspect.iscoroutinefunction(function) or not _takes_turns(function):
        raise ConfigurationError(f"pick {text}: {module_name} has no plain function {name} of one argument, the turns")
    loaded: OwnPick = function
    return loaded


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _takes_turns(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind(())
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature: its first call will tell
        return True
    return True
