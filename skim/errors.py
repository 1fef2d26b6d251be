"""The one tree of errors that every Skim process raises, and the reason each carries on the wire.

    SkimError
    ├── InvalidRequest            the caller sent something malformed          INVALID_ARGUMENT
    │   ├── PromptTooLong         more bytes or tokens than this server takes  INVALID_ARGUMENT
    │   ├── SpansNotCanonical     spans that break the canonical form          INVALID_ARGUMENT
    │   ├── PartOutOfOrder        a gap or overlap between prompt parts        OUT_OF_RANGE
    │   └── DigestMismatch        the prompt is not what the sender hashed     DATA_LOSS
    ├── NotFound                  unknown model, drafter or request            NOT_FOUND
    ├── Busy                      a bounded queue or budget is full            RESOURCE_EXHAUSTED
    ├── PreconditionFailed        right request, wrong state or model          FAILED_PRECONDITION
    ├── Aborted                   begun, and not reached: see its figures      ABORTED
    ├── Unavailable               draining, loading, or a peer is gone         UNAVAILABLE
    ├── DeadlineExceeded          the deadline passed, or cannot be met        DEADLINE_EXCEEDED
    ├── Cancelled                 the caller went away                         CANCELLED
    ├── Unimplemented             a call this build does not answer            UNIMPLEMENTED
    ├── Unauthenticated           token missing or wrong                       UNAUTHENTICATED
    ├── ConfigError               a setting is unknown or out of range         (start-up only)
    ├── ModelFileError            a GGUF is cut short, corrupt, unsupported    FAILED_PRECONDITION
    └── EngineFault               a defect or a crash of ours                  INTERNAL

Each error says what is wrong, what came (`got`) and what is allowed. `skim/rpc_errors.py` maps the
tree to gRPC statuses in one table. Nothing here imports gRPC.
"""

from __future__ import annotations


class SkimError(Exception):
    """Root of every error Skim raises on purpose.

    Attributes:
        message: one sentence for people.
        reason: UPPER_SNAKE word for machines (`ErrorInfo.reason`).
        field: dotted name of the offending request field, or None.
        metadata: short string pairs, for example `{"limit": "8192", "got": "9000"}`.
        retry_after_s: seconds after which a retry may help, or None when it will not.
    """

    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        got: object = None,
        allowed: object = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.metadata = dict(metadata or {})
        if got is not None:
            self.metadata.setdefault("got", str(got))
        if allowed is not None:
            self.metadata.setdefault("allowed", str(allowed))
        self.retry_after_s = retry_after_s


class InvalidRequest(SkimError):
    """The request cannot be served by anyone: fix it before sending it again."""

    default_reason = "INVALID_ARGUMENT"

    @classmethod
    def field_value(cls, field: str, got: object, allowed: str, **kwargs: object) -> InvalidRequest:
        """Build the usual message: `field must be ALLOWED, got GOT`."""
        reason = kwargs.get("reason")
        return cls(
            f"{field} must be {allowed}, got {got!r}",
            field=field,
            got=repr(got),
            allowed=allowed,
            reason=str(reason) if reason else None,
        )


class PromptTooLong(InvalidRequest):
    """The prompt has more bytes or tokens than this server can ever take."""

    default_reason = "PROMPT_TOO_LONG"


class SpansNotCanonical(InvalidRequest):
    """Spans are unsorted, empty, touching, past the end, or cut a code point."""

    default_reason = "SPANS_NOT_CANONICAL"


class PartOutOfOrder(InvalidRequest):
    """A prompt part does not start where the one before it ended."""

    default_reason = "PART_OUT_OF_ORDER"


class DigestMismatch(InvalidRequest):
    """The received prompt's sha256 differs from the one the sender stated."""

    default_reason = "DIGEST_MISMATCH"


class NotFound(SkimError):
    """The named model, drafter or request does not exist here."""

    default_reason = "MODEL_NOT_FOUND"


class Busy(SkimError):
    """A bounded queue or budget is full now; `retry_after_s` is a measured hint."""

    default_reason = "QUEUE_FULL"


class PreconditionFailed(SkimError):
    """The request is well formed, but this server's model or state cannot serve it."""

    default_reason = "FAILED_PRECONDITION"


class Aborted(SkimError):
    """What was asked was begun and did not reach its end; the metadata holds the figures."""

    default_reason = "ABORTED"


class Unavailable(SkimError):
    """The service is loading, draining or gone; another attempt may succeed."""

    default_reason = "UNAVAILABLE"


class DeadlineExceeded(SkimError):
    """The deadline passed, or the work cannot be finished before it."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(SkimError):
    """The caller cancelled, or vanished."""

    default_reason = "CANCELLED"


class Unimplemented(SkimError):
    """This build does not answer the call."""

    default_reason = "UNIMPLEMENTED"


class Unauthenticated(SkimError):
    """The bearer token is missing or wrong."""

    default_reason = "TOKEN_INVALID"


class ConfigError(SkimError):
    """A setting is unknown, of the wrong type, or out of range."""

    default_reason = "CONFIG_INVALID"


class ModelFileError(SkimError):
    """A GGUF file is truncated, corrupt, or of an architecture Skim does not know."""

    default_reason = "MODEL_FILE_INVALID"


class EngineFault(SkimError):
    """Our own defect, or a crash below us. The details stay in the log."""

    default_reason = "ENGINE_FAULT"
