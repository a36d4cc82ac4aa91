"""What prompts rely on and has to be proven first, in a process of its own: thirty megabytes and two seconds of work
that the gateway would otherwise keep, and share its interpreter with while its first turns run. What is to be proven
and what came of it are pickled: both ends are this program.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gateway.tito.backends import BackendChoice
from gateway.tito.certificate import ShapeCertificate, ShapeKey, certify_shape
from gateway.tito.junction import TurnTokens
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.shapes import standard_shapes
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer, FoundBackend

_PROOF_SECONDS = 300.0
_ENTRY = """\
from gateway.child_process import end_with_parent
end_with_parent({parent})
from gateway.tito.proof import main
main({niceness})
"""
"""Before all that takes time the process is bound to its parent's life: killed, that would leave it behind, with its
standard error."""
_NICENESS = 10
"""While turns run; who waits for the proof takes none."""


class ToProve(NamedTuple):
    """Of one model: templates by name and the special tokens that they see, what ends and builds turns; the
    tokenizer.json, and which faster library is wanted for it."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    tokens: TurnTokens
    reasoning: ReasoningMarkers | None
    tokenizer_json: bytes
    backend: BackendChoice


class Proven(NamedTuple):
    """Certificates of the shapes that ordinary agents' turns have, and the tokenizer library to use."""

    certificates: Sequence[tuple[ShapeKey, ShapeCertificate]]
    backend: FoundBackend


def prove(wanted: ToProve) -> Proven:
    """In this process; a second or two, for a thread."""
    template = ChatTemplate(wanted.templates, special_tokens=wanted.special_tokens)
    certificates = [
        (
            ShapeKey(shape, "{}"),
            certify_shape(template, shape, {}, tokens=wanted.tokens, reasoning=wanted.reasoning),
        )
        for has_tools in (True, False)
        for starts_with_system in (True, False)
        for shape in standard_shapes(starts_with_system=starts_with_system, has_tools=has_tools)
    ]
    if wanted.backend is BackendChoice.TOKENIZERS:
        return Proven(certificates, FoundBackend(BackendChoice.TOKENIZERS.value))
    return Proven(certificates, ChatTokenizer(wanted.tokenizer_json).find_backend(wanted.backend))


class Prover:
    """Proves in another process, once; `end` ends it before its time, from any thread. niceness: of that process."""

    def __init__(self, *, niceness: int = _NICENESS) -> None:
        self._niceness = niceness
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False
        self._lock = threading.Lock()

    def prove(self, wanted: ToProve) -> Proven:
        """What came of it. A process that breaks off proves nothing, and the library's reason says why: shapes are
        certified when they are met, and `tokenizers` serves."""
        try:
            process = self._start()
            said, _ = process.communicate(pickle.dumps(wanted), timeout=_PROOF_SECONDS)
            if process.returncode:
                raise ChildProcessError(f"it ended with {process.returncode}")
            return Proven(*pickle.loads(said))  # of our own program
        except (subprocess.SubprocessError, OSError, pickle.UnpicklingError, EOFError) as error:
            reasons = {wanted.backend.value: f"its proof broke off: {error}"}
            return Proven((), FoundBackend(BackendChoice.TOKENIZERS.value, reasons))
        finally:
            self.end()

    def end(self) -> None:
        """Nobody needs the proof any more."""
        with self._lock:
            self._is_ended = True
            if self._process is not None:
                self._process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._is_ended:
                raise ChildProcessError("it is not needed any more")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _ENTRY.format(parent=os.getpid(), niceness=self._niceness)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": paths},
            )
            return self._process


def main(niceness: int) -> None:
    """The other process."""
    os.nice(niceness)
    sys.stdout.buffer.write(pickle.dumps(tuple(prove(pickle.load(sys.stdin.buffer)))))
