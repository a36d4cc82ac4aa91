"""A sandbox driver without processes: a given function answers every command. For tests and dry runs of agents.

Deterministic, and true to the port where callers depend on it: files persist per sandbox, outputs are cut at the limit,
answers that take longer than the deadline are timeouts, destroyed sandboxes are lost.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.contracts.errors import NotFound, SandboxLost
from gateway.contracts.ports import ExecOutcome, ExecResult, SandboxLimits, SandboxSpec
from sandbox.holder import SANDBOX_HOME, HeadTail
from sandbox.limits import check_spec, check_timeout
from sandbox.register import Register, furnish


@dataclass(frozen=True, slots=True)
class ScriptedCommand:
    """One command as `execute` got it, and the sandbox's files by absolute path, which an answer may change."""

    command: str | Sequence[str]
    stdin: bytes
    cwd: str
    env: Mapping[str, str]
    files: dict[str, bytes]


def exited(exit_code: int = 0, stdout: bytes = b"", stderr: bytes = b"", *, seconds: float = 0.0) -> ExecResult:
    """An answer of a command that ended by itself after so many (pretended) seconds."""
    return ExecResult(ExecOutcome.EXITED, exit_code, stdout, stderr, len(stdout), len(stderr), seconds)


class ScriptedSandbox:
    """One scripted sandbox (`ports.Sandbox`)."""

    def __init__(
        self,
        sandbox_id: str,
        limits: SandboxLimits,
        answer: Callable[[ScriptedCommand], ExecResult],
        on_destroyed: Callable[[], None],
    ) -> None:
        self._id = sandbox_id
        self._limits = limits
        self._answer = answer
        self._on_destroyed = on_destroyed
        self._files: dict[str, bytes] = {}
        self._alive = True

    @property
    def sandbox_id(self) -> str:
        return self._id

    @property
    def alive(self) -> bool:
        """Whether it was not destroyed."""
        return self._alive

    async def execute(
        self,
        command: str | Sequence[str],
        *,
        timeout_seconds: float,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """What the function answers, within deadline and output limit; raises SandboxLost after `destroy`."""
        check_timeout(timeout_seconds)
        self._require()
        answer = self._answer(ScriptedCommand(command, stdin, _absolute(cwd or "."), dict(env or {}), self._files))
        if answer.seconds > timeout_seconds:
            answer = replace(answer, outcome=ExecOutcome.TIMEOUT, exit_code=None, seconds=timeout_seconds)
        limit = self._limits.output_bytes
        return replace(answer, stdout=_cut(answer.stdout, limit), stderr=_cut(answer.stderr, limit))

    async def write_file(self, path: str, content: bytes) -> None:
        """Keep a file; raises SandboxLost after `destroy`."""
        self._require()
        self._files[_absolute(path)] = content

    async def read_file(self, path: str) -> bytes:
        """Raises NotFound if there is no such file, SandboxLost after `destroy`."""
        self._require()
        try:
            return self._files[_absolute(path)]
        except KeyError:
            raise NotFound(f"sandbox {self._id}: no file {path}") from None

    async def destroy(self) -> None:
        """Forget its files; repeating it is fine."""
        if self._alive:
            self._alive = False
            self._files.clear()
            self._on_destroyed()

    def _require(self) -> None:
        if not self._alive:
            raise SandboxLost(f"sandbox {self._id} was destroyed")


class ScriptedSandboxDriver:
    """Makes sandboxes in which `answer` is every program (`ports.SandboxDriver`)."""

    def __init__(self, answer: Callable[[ScriptedCommand], ExecResult]) -> None:
        self._answer = answer
        self._register: Register[ScriptedSandbox] = Register()

    async def create(self, spec: SandboxSpec) -> ScriptedSandbox:
        """The living sandbox of this key, or a new one; raises ConfigurationError for impossible limits."""
        check_spec(spec)

        async def make() -> ScriptedSandbox:
            forget = lambda: self._register.forget(spec.key)  # noqa: E731  (names what it does)
            return await furnish(ScriptedSandbox(spec.key, spec.limits, self._answer, forget), spec.files)

        return await self._register.obtain(spec.key, make)

    async def aclose(self) -> None:
        """Destroy every sandbox of this driver."""
        await self._register.destroy_all()


def _absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join(SANDBOX_HOME, path))


def _cut(output: bytes, limit: int) -> bytes:
    cut = HeadTail(limit)
    cut.add(output)
    return cut.render()
