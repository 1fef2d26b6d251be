"""The bounds of what a caller may ask for, written once for every service that is asked.

The request messages of `common.proto` pass through the gateway to the drafter or the target. Each
service checks them at its edge with the functions here, so that both sides of a wire agree. Refuses
(InvalidRequest) by the name of the field, with what came and what is allowed. What depends on a
model or a setting is checked by the service that knows it.
"""

from __future__ import annotations

import math

from google.protobuf.message import Message

from skim.errors import InvalidRequest
from skim.spans import Span
from skim.v1 import common_pb2 as pb

SCORERS = ("specprefill", "mid_layer", "lexical", "ends", "random")
MAX_REQUEST_ID = 128  # characters
MAX_CONTROL_RANGES = 16_384  # a template writes two a message; 8,192 messages are absurd enough
MAX_PROTECT_TAIL_TOKENS = 65_536
MAX_EDGE_CHUNKS = 1_024
MAX_NEIGHBOUR_CHUNKS = 64
MAX_LOOKAHEAD_TOKENS = 32
MAX_TEMPERATURE = 100.0
MAX_TOP_LOGPROBS = 20  # the limit users know from other servers
MAX_STOPS, MAX_STOP_BYTES = 16, 256
MAX_DRAFT_TOKENS = 7


def require(ok: bool, field: str, got: object, allowed: str) -> None:
    """Refuse the value of `config.<field>` unless it is `ok`."""
    if not ok:
        raise InvalidRequest.field_value(f"config.{field}", got, allowed)


def decimal(value: float) -> float:
    """The decimal that was meant by a float32 from the wire: 0.1, not 0.10000000149."""
    return float(f"{value:.7g}") if math.isfinite(value) else value


def check_whole(message: Message, path: str, least: int, most: int | None = None) -> None:
    """Refuse the optional whole number that `path` ends in, where it is set and out of range."""
    name = path.rsplit(".", 1)[-1]
    if message.HasField(name):
        got = getattr(message, name)
        allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"
        require(got >= least and (most is None or got <= most), path, got, allowed)


def check_fraction(message: Message, path: str, *, zero: bool) -> None:
    """Refuse the optional fraction that `path` ends in unless in (0, 1], or [0, 1] with `zero`."""
    name = path.rsplit(".", 1)[-1]
    if message.HasField(name):
        got = getattr(message, name)
        # Written so that NaN, which compares false to everything, is refused.
        ok = (0.0 <= got if zero else 0.0 < got) and got <= 1.0
        require(ok, path, decimal(got), "in [0, 1]" if zero else "in (0, 1]")


def check_request_id(request_id: str) -> None:
    """Refuse a request id that is too long for a log line."""
    require(
        len(request_id) <= MAX_REQUEST_ID,
        "request_id",
        f"{len(request_id)} characters",
        f"at most {MAX_REQUEST_ID} characters",
    )


def check_selection(selection: pb.SelectionConfig) -> None:
    """Refuse selection settings out of range, or that exclude each other."""
    for name in ("keep_ratio", "coverage", "min_keep", "max_keep"):
        check_fraction(selection, f"selection.{name}", zero=False)
    require(
        not (selection.HasField("keep_ratio") and selection.HasField("coverage")),
        "selection.coverage",
        decimal(selection.coverage),
        "unset where keep_ratio is set: they exclude each other",
    )
    # A bound that stands alone moves the default of the other one out of its way.
    least, most = decimal(selection.min_keep), decimal(selection.max_keep)
    both = selection.HasField("min_keep") and selection.HasField("max_keep")
    require(not both or least <= most, "selection.max_keep", most, f"at least min_keep, {least}")
    check_whole(selection, "selection.head_chunks", 0, MAX_EDGE_CHUNKS)
    check_whole(selection, "selection.tail_chunks", 0, MAX_EDGE_CHUNKS)
    check_whole(selection, "selection.neighbour_chunks", 0, MAX_NEIGHBOUR_CHUNKS)


def check_scoring(scoring: pb.ScoringConfig) -> None:
    """Refuse scoring settings out of range."""
    if scoring.HasField("scorer"):
        allowed = f"one of {', '.join(SCORERS)}"
        require(scoring.scorer in SCORERS, "scoring.scorer", scoring.scorer[:64], allowed)
    check_whole(scoring, "scoring.lookahead_tokens", 0, MAX_LOOKAHEAD_TOKENS)
    check_fraction(scoring, "scoring.alpha", zero=True)
    check_fraction(scoring, "scoring.max_density", zero=False)


def check_sampling(sampling: pb.SamplingConfig) -> None:
    """Refuse sampling settings out of range; how many tokens are too many, the target knows."""
    check_whole(sampling, "sampling.max_tokens", 1)
    require(
        0.0 <= sampling.temperature <= MAX_TEMPERATURE,
        "sampling.temperature",
        decimal(sampling.temperature),
        f"finite and in [0, {MAX_TEMPERATURE:g}]",
    )
    require(sampling.top_k < 1 << 31, "sampling.top_k", sampling.top_k, "in [0, 2^31)")
    check_fraction(sampling, "sampling.top_p", zero=False)
    check_fraction(sampling, "sampling.min_p", zero=True)
    check_whole(sampling, "sampling.logprobs", 0, MAX_TOP_LOGPROBS)
    count = len(sampling.stop)
    require(count <= MAX_STOPS, "sampling.stop", f"{count} texts", f"at most {MAX_STOPS} texts")
    for index, stop in enumerate(sampling.stop):
        size = len(stop.encode())
        allowed = f"1 to {MAX_STOP_BYTES} bytes"
        require(1 <= size <= MAX_STOP_BYTES, f"sampling.stop[{index}]", f"{size} bytes", allowed)


def check_speculation(speculation: pb.SpeculationConfig) -> None:
    """Refuse speculation settings out of range."""
    check_whole(speculation, "speculation.draft_tokens", 1, MAX_DRAFT_TOKENS)


def query_range(query: pb.ByteRange) -> Span:
    """Read the range that asks.

    Raises:
        InvalidRequest: it is empty or reversed.
    """
    shown = f"[{query.begin}, {query.end})"
    require(query.begin < query.end, "query", shown, "a range with begin < end")
    return Span(query.begin, query.end)
