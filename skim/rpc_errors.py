"""The error tree on the wire: one table to gRPC codes, `google.rpc.Status` details, and back.

The server's interceptor (`skim.rpc`) ends a refused call with `abort`; a client turns a failed call
back into the error that the other side raised with `from_rpc_error`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from skim import errors
from skim.errors import EngineFault, SkimError

DOMAIN = "skim"

# The one table. A server takes the first class that matches an error, so subclasses stand above
# their parents; a client takes the last class of a code, so the general one stands below.
STATUS_CODES: tuple[tuple[type[SkimError], grpc.StatusCode], ...] = (
    (errors.PartOutOfOrder, grpc.StatusCode.OUT_OF_RANGE),
    (errors.DigestMismatch, grpc.StatusCode.DATA_LOSS),
    (errors.PromptTooLong, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SpansNotCanonical, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ModelFileError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PreconditionFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Aborted, grpc.StatusCode.ABORTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.EngineFault, grpc.StatusCode.INTERNAL),
)

_BY_REASON: dict[str, type[SkimError]] = {
    cls.default_reason: cls
    for cls in (errors.SpansNotCanonical, errors.PromptTooLong, errors.ModelFileError)
}


def status_code(error: SkimError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    return next(
        (code for cls, code in STATUS_CODES if isinstance(error, cls)), grpc.StatusCode.INTERNAL
    )


def trailers(error: SkimError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that carries an error's details, and its retry hint."""
    status = status_pb2.Status(
        code=getattr(code_pb2, status_code(error).name), message=error.message
    )
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    )
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    result: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration(
            seconds=int(error.retry_after_s), nanos=int(error.retry_after_s % 1 * 1e9)
        )
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        result.append(("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1000))))
    result.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(result)


async def abort(context: grpc.aio.ServicerContext, error: SkimError) -> None:
    """End the call with an error. Does not return."""
    await context.abort(status_code(error), error.message, trailers(error))


def from_rpc_error(failure: grpc.RpcError) -> SkimError:
    """Turn a failed call back into the error that the other side raised."""
    code, message = failure.code(), failure.details() or ""
    cls = next((cls for cls, mapped in reversed(STATUS_CODES) if mapped is code), EngineFault)
    details = dict(failure.trailing_metadata() or ()).get("grpc-status-details-bin")
    if not isinstance(details, bytes):
        return cls(message or code.name)
    info, field, retry_after_s = error_details_pb2.ErrorInfo(), None, None
    for packed in status_pb2.Status.FromString(details).details:
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Is(info.DESCRIPTOR):
            packed.Unpack(info)
        elif packed.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    cls = _BY_REASON.get(info.reason, cls)
    return cls(
        message,
        reason=info.reason or None,
        field=field,
        metadata=dict(info.metadata),
        retry_after_s=retry_after_s,
    )


@contextlib.asynccontextmanager
async def errors_from_peer() -> AsyncIterator[None]:
    """Raise a peer's failure as our error inside the body."""
    try:
        yield
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from failure
