"""The control socket, by which a new gateway process finds the one that serves: `control.sock` in the data folder.

Only its owner can open it (0600), and the kernel tells each end the other's user (SO_PEERCRED). The socket itself is
handed over, so its name never changes and who knocks meanwhile is answered by whoever serves then.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gateway.contracts.errors import ConfigurationError, HandoverFailed
from gateway.handover.channel import Channel

PROTOCOL = 1
"""Of the messages; two versions of the gateway with different numbers cannot replace each other."""


class Place(NamedTuple):
    """Where one gateway is to be found: the socket for HTTP, and the control socket; both listen."""

    listener: socket.socket
    control: socket.socket


def bound_control(path: Path) -> socket.socket:
    """A listening socket at `path`; the name that a dead gateway left is taken.

    Raises ConfigurationError where it cannot be made, or a gateway answers there.
    """
    if (channel := connect(path)) is not None:
        pid = channel.peer.pid
        channel.close()
        raise ConfigurationError(
            f"{path}: another gateway (process {pid}) answers there; start this one with --replace, or choose another "
            "place with --set control=FILE"
        )
    control = _socket()
    try:
        os.fchmod(control.fileno(), 0o600)  # what the name gets when it is bound
        with _short(path) as short:
            with suppress(FileNotFoundError):
                os.unlink(short)
            control.bind(short)
        control.listen()
    except OSError as error:
        control.close()
        raise ConfigurationError(f"{path}: no control socket can be made ({error.strerror})") from error
    return control


def remove_control(path: Path) -> None:
    """Take the name away that `bound_control` made, while no other process can have made it anew."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def connect(path: Path) -> Channel | None:
    """A channel to the gateway that listens at `path`, None if there is none; raises HandoverFailed if it is not ours,
    or hangs."""
    connection = _socket()
    try:
        with _short(path) as short:
            connection.connect(short)
        channel = Channel(connection)
        check_owner(channel)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        if error.errno == errno.EAGAIN:
            raise HandoverFailed(f"{path}: too many wait there; the gateway that serves seems to hang") from error
        raise HandoverFailed(f"{path}: cannot be reached ({error.strerror})") from error
    except HandoverFailed:
        connection.close()
        raise
    return channel


def check_owner(channel: Channel) -> None:
    """Raise HandoverFailed unless the process at the other end is of this user, or root's."""
    pid, uid = channel.peer
    if uid not in (os.geteuid(), 0):
        raise HandoverFailed(f"process {pid} belongs to user {uid}, this gateway to {os.geteuid()}")


def _socket() -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.setblocking(False)
    return control


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same file by a name that fits into a socket's address (108 bytes), however deep its folder lies."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
