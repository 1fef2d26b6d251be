"""Admit requests by count and by prompt bytes in flight; refuse the rest with a measured hint.

Stands before everything that costs: a request enters before its first part is read, and reserves
bytes as they arrive (or all at once where the caller states sizes). Nothing queues here: the
services behind the gateway have bounded queues of their own. Single-threaded (one event loop).
"""

from __future__ import annotations

import re
import time
import uuid
from types import TracebackType

from skim.errors import Busy, InvalidRequest

# A retry hint before anything was measured, and its bounds afterwards.
FIRST_HINT_S, LEAST_HINT_S, MOST_HINT_S = 1.0, 0.1, 60.0
# Weight of the newest request in the mean duration.
NEWEST_SHARE = 0.2
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Admission:
    """Counts what is in flight.

    Args:
        max_requests: requests at the same time.
        max_bytes: prompt bytes held at the same time, all requests together.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._ids: set[str] = set()
        self._mean_s: float | None = None
        self.requests = 0
        self.bytes = 0

    def enter(self) -> Ticket:
        """Admit one more request.

        Raises:
            Busy: as many as allowed are in flight.
        """
        if self.requests >= self._max_requests:
            raise Busy(
                f"the gateway serves at most {self._max_requests} requests at once",
                metadata={"limit": str(self._max_requests), "got": str(self.requests + 1)},
                retry_after_s=self._hint_s(),
            )
        self.requests += 1
        return Ticket(self)

    def reserve(self, size_bytes: int) -> None:
        """Take prompt bytes.

        Raises:
            Busy: they do not fit the budget; reason PROMPT_BYTES_LIMIT.
        """
        if self.bytes + size_bytes > self._max_bytes:
            raise Busy(
                f"the prompts in flight would exceed {self._max_bytes} bytes",
                reason="PROMPT_BYTES_LIMIT",
                metadata={"limit": str(self._max_bytes), "got": str(self.bytes + size_bytes)},
                retry_after_s=self._hint_s(),
            )
        self.bytes += size_bytes

    def claim_id(self, request_id: str) -> str:
        """Take the caller's request id, or make one.

        Raises:
            InvalidRequest: malformed, or in flight already (reason REQUEST_ID_IN_USE).
        """
        if not request_id:
            request_id = str(uuid.uuid4())
        elif not REQUEST_ID.fullmatch(request_id):
            raise InvalidRequest.field_value(
                "config.request_id", request_id[:80], "1 to 64 characters of [A-Za-z0-9._-]"
            )
        if request_id in self._ids:
            raise InvalidRequest.field_value(
                "config.request_id",
                request_id,
                "an id that no request in flight has",
                reason="REQUEST_ID_IN_USE",
            )
        self._ids.add(request_id)
        return request_id

    def leave(self, request_id: str, size_bytes: int, lasted_s: float) -> None:
        """Give back what a request held, and learn from how long it took."""
        self.requests -= 1
        self.bytes -= size_bytes
        self._ids.discard(request_id)
        before_s = lasted_s if self._mean_s is None else self._mean_s
        self._mean_s = before_s + NEWEST_SHARE * (lasted_s - before_s)

    def _hint_s(self) -> float:
        """Mean time until the next of the running requests ends, were they evenly spread."""
        if self._mean_s is None:
            return FIRST_HINT_S
        return min(MOST_HINT_S, max(LEAST_HINT_S, self._mean_s / max(1, self.requests)))


class Ticket:
    """One admitted request's share; a context manager that gives it back once."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._started_s = time.monotonic()
        self.request_id = ""
        self.size_bytes = 0

    def identify(self, request_id: str) -> None:
        """Take an id, see `Admission.claim_id`."""
        self.request_id = self._admission.claim_id(request_id)

    def hold(self, size_bytes: int) -> None:
        """Make sure that at least `size_bytes` are reserved, see `Admission.reserve`."""
        more_bytes = size_bytes - self.size_bytes
        if more_bytes > 0:
            self._admission.reserve(more_bytes)
            self.size_bytes = size_bytes

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._admission.leave(self.request_id, self.size_bytes, time.monotonic() - self._started_s)
