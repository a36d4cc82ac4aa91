"""The old process's side of a hand-over: it answers at the control socket, and gives its place to who asks for it.

See `predecessor` for the messages. Until a successor has said `serving` this process goes on whatever happens to that
one; and also afterwards, for as long as replies of its own still run: it keeps the listening socket that long, and
takes it up again if the successor dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress

from gateway.contracts.errors import EngineUnavailable, HandoverFailed
from gateway.handover.channel import Channel, Message
from gateway.handover.control import PROTOCOL, check_owner
from gateway.handover.estate import Estate, emptied
from gateway.handover.link import Link
from gateway.handover.predecessor import ANSWER_SECONDS
from gateway.handover.server import LAST_SECONDS

_log = logging.getLogger(__name__)

_READY_SECONDS = 30.0
"""For a successor to open the ledger once it has its lock."""


class Succession:
    """Serves the control socket; `run` ends when a successor has taken over and nothing runs here any more."""

    def __init__(self) -> None:
        self.is_under_way = False
        self._successor: Channel | None = None
        self._successor_pid = 0
        self._listening: asyncio.Task[None] | None = None
        self._meetings: set[asyncio.Task[None]] = set()
        self._given: list[int] = []
        self._ended = asyncio.Event()

    async def run(self, estate: Estate) -> None:
        """Until this process has been replaced."""
        self._estate = estate
        self._listen()
        try:
            await self._ended.wait()
        finally:
            self._stop_listening()
            for meeting in self._meetings:
                meeting.cancel()
            await asyncio.gather(*self._meetings, return_exceptions=True)

    def close(self) -> None:
        """Tell the successor that this process is over: nothing more is written to the ledger."""
        if self._successor is not None:
            self._successor.close()

    # ---- who asks ----

    def _listen(self) -> None:
        self._listening = self._listening or asyncio.create_task(self._accept())

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._estate.place.control)
            meeting = asyncio.create_task(self._meet(Channel(connection)))
            self._meetings.add(meeting)
            meeting.add_done_callback(self._part)

    def _part(self, meeting: asyncio.Task[None]) -> None:
        self._meetings.discard(meeting)
        if not meeting.cancelled() and (error := meeting.exception()) is not None:
            _log.error("a hand-over failed", exc_info=error)

    async def _meet(self, channel: Channel) -> None:
        try:
            check_owner(channel)
            hello = await channel.receive(timeout_seconds=ANSWER_SECONDS)
            if hello is None:
                return
            if reason := self._refusal(hello):
                await channel.send("refused", reason=reason)
                return
            self._successor, self._successor_pid = channel, hello.fields["pid"]
            await self._hand_over(channel)
        except (HandoverFailed, TimeoutError) as error:
            _log.warning("process %s does not take over: %s", channel.peer.pid, error or "it does not answer")
        finally:
            if not self._ended.is_set():
                if self._successor is channel:
                    self._successor = None
                await channel.send("withdrawn")
                channel.close()

    def _refusal(self, hello: Message) -> str:
        protocol, me = hello.fields.get("protocol"), f"the gateway that serves (process {os.getpid()})"
        if protocol != PROTOCOL:
            return f"{me} speaks version {PROTOCOL} of the hand-over, this one {protocol}: stop it, then start this one"
        if self._successor is not None:
            return f"{me} is being replaced by process {self._successor_pid} already"
        return ""

    # ---- giving the place ----

    async def _hand_over(self, channel: Channel) -> None:
        estate = self._estate
        address = list(estate.place.listener.getsockname()[:2])
        await channel.send("state", pid=os.getpid(), address=address, state=estate.state().to_json())
        if await channel.receive() is None:  # it gets ready; who gives up, or dies, has taken nothing
            return
        self._share(is_under_way=True)
        try:
            await channel.send("given", self._descriptors())
            if await channel.receive(timeout_seconds=_READY_SECONDS) is not None:
                await self._leave(channel)
        finally:
            if not self._ended.is_set():
                self._share(is_under_way=False)

    def _share(self, *, is_under_way: bool) -> None:
        self.is_under_way = is_under_way
        self._estate.share(is_under_way)

    def _descriptors(self) -> list[int]:
        estate = self._estate
        descriptors = [socket.fileno() for socket in estate.place]
        return descriptors if estate.lock is None else [*descriptors, estate.lock]

    async def _leave(self, channel: Channel) -> None:
        estate = self._estate
        self._stop_listening()
        await estate.stop_accepting()
        try:
            await channel.send("leaving", state=estate.state().to_json())
            try:
                serving = await channel.receive(timeout_seconds=ANSWER_SECONDS)
            except TimeoutError:
                await self._withdraw(channel)
                return
            if serving is not None:
                await self._depart(channel)
        finally:
            if not self._ended.is_set():
                await self._stay()

    async def _withdraw(self, channel: Channel) -> None:
        """The successor hangs: go on, and share the ledger with it for as long as it is there."""
        _log.warning("process %d does not begin to serve; this one goes on", self._successor_pid)
        await self._stay()
        await channel.send("withdrawn")
        while await channel.receive() is not None:
            pass

    async def _stay(self) -> None:
        await self._estate.stay()
        self._listen()

    async def _depart(self, channel: Channel) -> None:
        """Give connections away and end replies; should the successor die before that is done, go on serving."""
        told_to_stop = asyncio.Event()

        async def take(message: Message) -> None:
            if message.type == "stop":
                told_to_stop.set()

        link = Link(channel, self._estate.operations, pid=self._successor_pid)
        stop = asyncio.create_task(told_to_stop.wait())
        gone = asyncio.create_task(link.run(take))
        left = asyncio.create_task(self._end_replies(channel))
        try:
            await asyncio.wait({stop, gone, left}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() or left.done():
                self._ended.set()
                self._estate.end()
            else:
                _log.error("process %d, which took over, has died: this one serves again", self._successor_pid)
        finally:
            for task in (stop, gone, left):
                task.cancel()
            results = await asyncio.gather(stop, gone, left, return_exceptions=True)
            await self._take_back()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _end_replies(self, channel: Channel) -> None:
        """Until nothing of this process, and of those before it, is left; beyond the limit turns are cut."""
        estate = self._estate
        estate.leave(self._given.append)
        try:
            async with asyncio.timeout(estate.drain_seconds):
                await emptied(estate, channel, self._given)
        except TimeoutError:
            _log.warning("%d turns still run after %g s and are cut", estate.num_running, estate.drain_seconds)
            estate.cut(EngineUnavailable("this gateway was replaced, and the reply took too long; try again"))
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_SECONDS):
                    await emptied(estate, channel, self._given)

    async def _take_back(self) -> None:
        """Connections that nobody took."""
        given, self._given[:] = list(self._given), []
        for descriptor in given:
            await self._estate.adopt(descriptor)
