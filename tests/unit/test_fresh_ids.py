"""Random ids: of the length that was asked for, never twice, not even in a process that was forked."""

from __future__ import annotations

import os

from gateway.contracts.fresh_ids import FreshDigits


def test_no_digits_are_given_out_twice() -> None:
    digits = FreshDigits()
    taken = [digits.take(number) for number in (24, 32) * 1000]
    assert {len(one) for one in taken} == {24, 32}
    assert len(set(taken)) == len(taken)
    assert set("".join(taken)) == set("0123456789abcdef")


def test_a_forked_process_gives_out_others() -> None:
    digits = FreshDigits()
    digits.take(32)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, digits.take(32).encode())
        os._exit(0)
    os.waitpid(child, 0)
    of_child = os.read(reading, 64).decode()
    os.close(reading)
    os.close(writing)
    assert len(of_child) == 32
    assert of_child != digits.take(32)
