"""Proving a faster tokenizer library in a process of its own: thirty megabytes and a second of work that the gateway
would otherwise keep and share its interpreter with.

    python -m gateway.tito.proof CHOICE  < tokenizer.json  > what came of it, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from gateway.tito.backends import BackendChoice
from gateway.tito.tokenizer import ChatTokenizer, FoundBackend

_PROOF_SECONDS = 300.0
_NICENESS = 10


def prove_elsewhere(tokenizer: ChatTokenizer, choice: BackendChoice) -> None:
    """As `ChatTokenizer.prove_backend`; a proof that breaks off leaves it with `tokenizers`, and says why."""
    if choice is BackendChoice.TOKENIZERS:
        return
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "gateway.tito.proof", choice.value]
    try:
        done = subprocess.run(
            command,
            input=tokenizer.json,
            stdout=subprocess.PIPE,
            timeout=_PROOF_SECONDS,
            check=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        found = FoundBackend(**json.loads(done.stdout))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        found = FoundBackend(BackendChoice.TOKENIZERS.value, {choice.value: f"its proof broke off: {error}"})
    tokenizer.use_backend(found)


def main() -> None:
    """The other process."""
    os.nice(_NICENESS)
    found = ChatTokenizer(sys.stdin.buffer.read()).find_backend(BackendChoice(sys.argv[1]))
    sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
