"""The system calls that a sandbox cannot use, as a classic BPF program for `bwrap --seccomp`.

Namespaces already make these calls harmless; refusing them keeps a sandbox away from the parts of the kernel in which
most escapes of the past were found (mounts, nested namespaces, keyrings, BPF, io_uring), and from socket families that
no network namespace confines (virtual-machine sockets reach the hypervisor). Call numbers are the kernel's own
(asm/unistd_64.h, asm-generic/unistd.h). Ordinary programs, compilers, debuggers and servers on loopback still run.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from typing import NamedTuple

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_X32_CALLS = 0x40000000

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NEW_NAMESPACES = 0x7E020000
_SOCKET_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)


class _Machine(NamedTuple):
    """Of one architecture: its audit number, and the numbers of the calls that this module names."""

    audit: int
    clone: int
    clone3: int
    socket: int
    refused: tuple[int, ...]


_MACHINES = {
    "x86_64": _Machine(
        audit=0xC000003E,
        clone=56,
        clone3=435,
        socket=41,
        # fmt: off
        refused=(
            165, 166, 155, 161, 428, 429, 430, 431, 432, 433, 442,  # mount, umount2, pivot_root, chroot, new mount calls
            272, 308,                                               # unshare, setns
            248, 249, 250,                                          # add_key, request_key, keyctl
            321, 298, 323, 425, 426, 427,                           # bpf, perf_event_open, userfaultfd, io_uring
            303, 304, 300,                                          # name_to_handle_at, open_by_handle_at, fanotify_init
            175, 176, 313, 246, 320, 169,                           # modules, kexec, reboot
            167, 168, 163, 179, 443, 103,                           # swapon, swapoff, acct, quotactl, syslog
            164, 227, 159, 305, 170, 171, 153, 172, 173, 154, 279,  # clocks, host names, vhangup, I/O ports, ldt
        ),
        # fmt: on
    ),
    "aarch64": _Machine(
        audit=0xC00000B7,
        clone=220,
        clone3=435,
        socket=198,
        # fmt: off
        refused=(
            40, 39, 41, 51, 428, 429, 430, 431, 432, 433, 442,
            97, 268,
            217, 218, 219,
            280, 241, 282, 425, 426, 427,
            264, 265, 262,
            105, 106, 273, 104, 294, 142,
            224, 225, 89, 60, 443, 116,
            170, 112, 171, 266, 161, 162, 58, 239,
        ),
        # fmt: on
    ),
}


def filter_program(machine: str = platform.machine()) -> bytes | None:
    """The filter for an architecture; None for one whose call numbers are not listed here (no filter then)."""
    known = _MACHINES.get(machine)
    if known is None:
        return None
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, known.audit, if_true=1),
        _step(_RETURN, _KILL),  # another architecture's calls have other numbers
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32_CALLS, if_false=1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    for number in known.refused:
        code += [_step(_EQUAL, number, if_false=1), _step(_RETURN, _ERROR | errno.EPERM)]
    # clone3 hides its flags behind a pointer; libraries then fall back to clone.
    code += [_step(_EQUAL, known.clone3, if_false=1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    code += [
        _step(_EQUAL, known.clone, if_false=4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _NEW_NAMESPACES, if_false=1),
        _step(_RETURN, _ERROR | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    families = [_step(_EQUAL, family, if_true=len(_SOCKET_FAMILIES) - i) for i, family in enumerate(_SOCKET_FAMILIES)]
    code += [
        _step(_EQUAL, known.socket, if_false=len(families) + 2),
        _step(_LOAD, _FIRST_ARGUMENT),
        *families,
        _step(_RETURN, _ERROR | errno.EAFNOSUPPORT),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _step(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction (`struct sock_filter`); jumps count the instructions to skip."""
    return struct.pack("<HBBI", code, if_true, if_false, value)
