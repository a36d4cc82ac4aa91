"""What engines of a chaos run must sample, told by arithmetic: every token, log-prob and routing row can be checked.

Standard library only, so that the reader, which trusts nobody, can use it beside `sqlite3` and `struct`.

A reply's first two tokens are drawn (its "draw"); they and the prompt decide all others. So two samples of one prompt
differ, and yet whoever has a prompt and a reply knows whether each of its tokens is right, wherever it was continued.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 8, 2
NUM_DRAWN = 2
"""Tokens of a reply that are chosen freely."""

_FEWEST_WORDS, _MORE_WORDS = 6, 30


class WrongContinuation(Exception):
    """Tokens that no reply to this prompt begins with."""


@dataclass(frozen=True, slots=True)
class Script:
    """The vocabulary of a run. words: ids that replies draw from; calls: whole tool calls as ids.

    opening: ids that stand before every reply; stop: the id that ends one.
    """

    words: Sequence[int]
    calls: Sequence[Sequence[int]]
    opening: Sequence[int]
    stop: int

    @classmethod
    def load(cls, file: Path) -> Script:
        """As `save` wrote it."""
        return cls(**json.loads(file.read_text()))

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        content = {"words": self.words, "calls": self.calls, "opening": self.opening, "stop": self.stop}
        file.write_text(json.dumps({name: value if name == "stop" else list(value) for name, value in content.items()}))

    def split(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Prompt and what of its reply is there already; raises WrongContinuation where no reply was opened."""
        first, length = self.opening[0], len(self.opening)
        for start in range(len(token_ids) - length, -1, -1):
            if token_ids[start] == first:
                if list(token_ids[start : start + length]) != list(self.opening):
                    break
                return list(token_ids[: start + length]), list(token_ids[start + length :])
        raise WrongContinuation("the prompt does not end in an opened reply")

    def reply(self, prompt: Sequence[int], drawn: Sequence[int]) -> list[int]:
        """The whole reply, its draw first and its stop token last."""
        seed = zlib.crc32(struct.pack("<II", *drawn), checksum(prompt))
        num_words = _FEWEST_WORDS + seed % _MORE_WORDS
        words = [self.words[zlib.crc32(struct.pack("<II", seed, i)) % len(self.words)] for i in range(num_words)]
        call = self.calls[(seed >> 12) % len(self.calls)] if (seed >> 8) % 3 == 0 else ()
        return [*drawn, *words, *call, self.stop]

    def check(self, prompt: Sequence[int], begun: Sequence[int]) -> list[int]:
        """The whole reply that `begun` is the beginning of ([] while its draw is open); raises WrongContinuation."""
        if any(token not in self.words for token in begun[:NUM_DRAWN]):
            raise WrongContinuation(f"a reply begins with {list(begun[:NUM_DRAWN])}")
        if len(begun) < NUM_DRAWN:
            return []
        whole = self.reply(prompt, begun[:NUM_DRAWN])
        if list(begun) != whole[: len(begun)]:
            raise WrongContinuation(f"{list(begun)} is not the beginning of {whole}")
        return whole


def checksum(token_ids: Sequence[int], before: int = 0) -> int:
    """crc32 of little-endian 32-bit ids."""
    return zlib.crc32(array("i", token_ids).tobytes(), before)


def logprob(token: int, position: int, policy_version: int) -> float:
    """Of a token at a position of its sequence, sampled by a version; a multiple of 1/128, exact in 32 bits."""
    return -((token * 31 + position * 17 + policy_version * 101) % 997 + 1) / 128


def experts(token: int, position: int) -> list[int]:
    """The routing row of one input token: its experts, layer by layer."""
    first = token * 7 + position * 3
    return [(first + layer * 5 + k) % NUM_EXPERTS for layer in range(NUM_LAYERS) for k in range(TOP_K)]
