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
from collections.abc import Mapping
from typing import NamedTuple

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_X32_CALLS = 0x40000000

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NEW_NAMESPACES = 0x7E020000
_SOCKET_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)


class _Machine(NamedTuple):
    """Of one architecture: its audit number, the numbers of the calls whose arguments matter, its column below."""

    audit: int
    clone: int
    clone3: int
    socket: int
    column: int


_MACHINES = {
    "x86_64": _Machine(audit=0xC000003E, clone=56, clone3=435, socket=41, column=0),
    "aarch64": _Machine(audit=0xC00000B7, clone=220, clone3=435, socket=198, column=1),
}

# name: numbers on x86_64 and aarch64
_REFUSED: Mapping[str, tuple[int, int | None]] = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "move_pages": (279, 239),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
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
    for numbers in _REFUSED.values():
        if (number := numbers[known.column]) is None:
            continue
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
