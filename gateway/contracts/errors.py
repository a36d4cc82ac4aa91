"""Every error of the project, as one tree; each class has a code, an HTTP status and whether a retry can help.

    VerbatimError
    ├── ConfigurationError            what the user wrote or pointed at is wrong (exit code 2)
    ├── RequestError                  4xx: the caller must change something
    │   ├── InvalidRequest · UnknownPrevious · ContextOverflow · TemplateRaised
    │   ├── PayloadTooLarge · UnsupportedEncoding · MethodNotAllowed · RequestTimeout
    │   ├── Unauthorized · Forbidden · TooManyRequests
    │   ├── NotFound · SessionSealed
    │   └── Conflict · TurnIndexTaken              of Conflict: another process was faster; read, append anew
    ├── EngineError                   5xx (what an engine refuses: 400): an inference engine failed us
    │   ├── EngineUnavailable · EngineTimeout      another replica, or a later try, can help
    │   │   ├── WorkerUnavailable                  of EngineUnavailable: one worker of a router; the others go on
    │   │   └── EngineBusy                         of EngineUnavailable: it lives and takes nothing for now
    │   └── EngineRejected · EngineProtocolError   it answered, and the answer is a refusal or nonsense
    │       └── UnknownWeights                     of EngineProtocolError: its weights stand for no policy version
    ├── LedgerError                   the store cannot take or give what was asked
    │   └── LedgerFull                             no room on its disk
    ├── IntegrityError                two things that must be equal are not; never retried, never repaired silently
    │   ├── ExpertsMismatch · LengthMismatch · LedgerCorrupt · SchemaMismatch
    │   └── IdentityMismatch                       an engine that may not serve here
    │       └── CapabilityMissing                  of IdentityMismatch: it cannot give what is required
    ├── SandboxError                  the sandbox itself failed (a command's non-zero exit is data, not this)
    │   └── SandboxUnavailable · SandboxLost
    ├── ProcessFailed                 a process that we started ended, or never got ready
    ├── HandoverFailed                a gateway could not take over from another, which goes on serving
    ├── RewardError                   no reward could be computed (which is not a reward of zero)
    ├── TransportError                weights did not reach an engine
    └── TrainingError
        └── NonFiniteLoss · StaleBatch · ReplayUnsupported

Foreign exceptions are translated into these once, at the boundary that meets them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

_NAMED_FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]{0,255})(?:, [\w.\[\]-]{1,255})*: ")


class VerbatimError(Exception):
    """Base of all errors that Verbatim raises on purpose; `str(error)` is one line that says what to do."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(VerbatimError):
    """A setting, path, port or flag is wrong; the command line exits with 2."""

    code = "configuration_error"


class RequestError(VerbatimError):
    """The caller must change the request."""

    code = "invalid_request_error"
    http_status = 400


class InvalidRequest(RequestError):
    """A field is missing, has the wrong type or an impossible value.

    The message names the field first, as in `messages[0].role: expected a string`; `param` is that name, or None where
    the fault is the body's as a whole.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        named = _NAMED_FIELD.match(message)
        self.param = None if named is None else named.group(1)


class UnknownPrevious(InvalidRequest):
    """A request continues a response that nobody here has."""

    code = "previous_response_not_found"


class ContextOverflow(RequestError):
    """Prompt (plus requested output) is longer than the engine's context; the message must contain
    "maximum context length", which is what agents' clients look for."""

    code = "context_length_exceeded"


class TemplateRaised(RequestError):
    """The model's own chat template refused the conversation; the message is the template's."""

    code = "chat_template_error"


class PayloadTooLarge(RequestError):
    """The body is longer than this gateway takes."""

    code = "payload_too_large"
    http_status = 413


class UnsupportedEncoding(RequestError):
    """The body is compressed; bodies are taken as they are only."""

    code = "unsupported_content_encoding"
    http_status = 415


class MethodNotAllowed(RequestError):
    """The path exists, for the methods `allowed` only."""

    code = "method_not_allowed"
    http_status = 405

    def __init__(self, message: str, *, allowed: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.allowed = tuple(sorted(allowed))


class RequestTimeout(RequestError):
    """The client took too long to send its request."""

    code = "request_timeout"
    http_status = 408
    retryable = True


class Unauthorized(RequestError):
    """No key, or a key that opens nothing."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(RequestError):
    """A valid key, for something else."""

    code = "permission_denied"
    http_status = 403


class NotFound(RequestError):
    """No such session, rollout, lease or engine."""

    code = "not_found"
    http_status = 404


class SessionSealed(RequestError):
    """The session was finished; it takes no more turns."""

    code = "session_finished"
    http_status = 409


class Conflict(RequestError):
    """The request contradicts what is recorded (an id taken with other content, a stale snapshot)."""

    code = "conflict"
    http_status = 409


class TurnIndexTaken(Conflict):
    """A session has another turn of this index: another process was faster; read it and append behind it."""

    code = "turn_index_taken"
    retryable = True


class TooManyRequests(RequestError):
    """A limit of rate, size or concurrency was met; try again in `retry_after_seconds`."""

    code = "rate_limit_exceeded"
    http_status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineError(VerbatimError):
    """An inference engine failed."""

    code = "engine_error"
    http_status = 502


class EngineUnavailable(EngineError):
    """No connection, a 5xx, or the stream ended early; tokens that already came are kept by the caller."""

    code = "engine_unavailable"
    http_status = 503
    retryable = True


class WorkerUnavailable(EngineUnavailable):
    """One worker behind a router failed; the router can serve the same request with another at once."""


class EngineBusy(EngineUnavailable):
    """The engine lives and takes nothing for now (429, or 503 with `Retry-After`). retry_after_seconds: as it said."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineTimeout(EngineError):
    """The engine did not answer within the deadline."""

    code = "engine_timeout"
    http_status = 504
    retryable = True


class EngineRejected(EngineError):
    """The engine refused the request (its 4xx); the same request will be refused again. reason: in its own words."""

    http_status = 400

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message

    code = "engine_rejected"


class EngineProtocolError(EngineError):
    """The engine's answer does not have the shape that its protocol promises."""

    code = "engine_protocol_error"


class UnknownWeights(EngineProtocolError):
    """The engine's weight label stands for no policy version, or for weights that it holds a part of."""


class LedgerError(VerbatimError):
    """The ledger cannot take or give what was asked; nothing that was acknowledged is lost."""

    code = "ledger_unavailable"
    http_status = 503
    retryable = True


class LedgerFull(LedgerError):
    """There is no room for more: nothing that was recorded is lost, and what is new is taken again when there is."""

    code = "storage_full"


class IntegrityError(VerbatimError):
    """Two things that must be equal are not."""

    code = "integrity_error"


class ExpertsMismatch(IntegrityError):
    """Routing rows do not fit their tokens (number, shape, range or type)."""

    code = "experts_mismatch"


class LengthMismatch(IntegrityError):
    """I2 is broken: arrays of one segment or turn differ in length."""

    code = "length_mismatch"


class LedgerCorrupt(IntegrityError):
    """A checksum or a reference inside the ledger does not hold."""

    code = "ledger_corrupt"


class SchemaMismatch(IntegrityError):
    """Stored data has a schema version that this program does not read."""

    code = "schema_mismatch"


class IdentityMismatch(IntegrityError):
    """Gateway and engine do not have the same tokenizer, template or model."""

    code = "identity_mismatch"
    http_status = 409


class CapabilityMissing(IdentityMismatch):
    """An engine cannot give what this gateway was told to require of engines."""

    code = "capability_missing"


class SandboxError(VerbatimError):
    """The sandbox itself failed; never to be turned into a reward."""

    code = "sandbox_error"


class SandboxUnavailable(SandboxError):
    """This machine cannot make such a sandbox, or all are taken."""

    code = "sandbox_unavailable"
    http_status = 503


class SandboxLost(SandboxError):
    """A sandbox that existed is gone."""

    code = "sandbox_lost"
    retryable = True


class ProcessFailed(VerbatimError):
    """A process that we started ended by itself, or did not get ready in time."""

    code = "process_failed"


class HandoverFailed(VerbatimError):
    """A gateway could not take over from the one that serves; that one goes on."""

    code = "handover_failed"


class RewardError(VerbatimError):
    """No reward could be computed; the rollout is recorded without one."""

    code = "reward_error"


class TransportError(VerbatimError):
    """Weights did not reach an engine."""

    code = "transport_error"
    retryable = True


class TrainingError(VerbatimError):
    """A training step cannot be made."""

    code = "training_error"


class NonFiniteLoss(TrainingError):
    """Loss or gradient norm is NaN or infinite."""

    code = "non_finite_loss"


class StaleBatch(TrainingError):
    """Samples are older than the staleness bound allows."""

    code = "stale_batch"


class ReplayUnsupported(TrainingError):
    """Routing replay cannot be installed on this model, so training with it would silently not replay."""

    code = "replay_unsupported"
