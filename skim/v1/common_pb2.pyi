from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PositionMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POSITION_MODE_UNSPECIFIED: _ClassVar[PositionMode]
    POSITION_MODE_COMPACTED: _ClassVar[PositionMode]
    POSITION_MODE_ORIGINAL: _ClassVar[PositionMode]

class FullReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FULL_REASON_UNSPECIFIED: _ClassVar[FullReason]
    FULL_REASON_FORCED: _ClassVar[FullReason]
    FULL_REASON_SHORT_PROMPT: _ClassVar[FullReason]
    FULL_REASON_NO_DRAFTER: _ClassVar[FullReason]
    FULL_REASON_DRAFTER_FAILED: _ClassVar[FullReason]
    FULL_REASON_DRAFTER_LATE: _ClassVar[FullReason]
    FULL_REASON_LOW_COVERAGE: _ClassVar[FullReason]
    FULL_REASON_SPANS_REFUSED: _ClassVar[FullReason]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP_TEXT: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_UPLOAD: _ClassVar[Stage]
    STAGE_QUEUE: _ClassVar[Stage]
    STAGE_TOKENISE: _ClassVar[Stage]
    STAGE_SCORE: _ClassVar[Stage]
    STAGE_PREFILL: _ClassVar[Stage]
    STAGE_MEMORY: _ClassVar[Stage]
POSITION_MODE_UNSPECIFIED: PositionMode
POSITION_MODE_COMPACTED: PositionMode
POSITION_MODE_ORIGINAL: PositionMode
FULL_REASON_UNSPECIFIED: FullReason
FULL_REASON_FORCED: FullReason
FULL_REASON_SHORT_PROMPT: FullReason
FULL_REASON_NO_DRAFTER: FullReason
FULL_REASON_DRAFTER_FAILED: FullReason
FULL_REASON_DRAFTER_LATE: FullReason
FULL_REASON_LOW_COVERAGE: FullReason
FULL_REASON_SPANS_REFUSED: FullReason
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP_TEXT: FinishReason
FINISH_REASON_LENGTH: FinishReason
STAGE_UNSPECIFIED: Stage
STAGE_UPLOAD: Stage
STAGE_QUEUE: Stage
STAGE_TOKENISE: Stage
STAGE_SCORE: Stage
STAGE_PREFILL: Stage
STAGE_MEMORY: Stage

class PromptPart(_message.Message):
    __slots__ = ("offset", "data", "message")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    message: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., message: _Optional[int] = ...) -> None: ...

class PromptEnd(_message.Message):
    __slots__ = ("total_bytes", "sha256")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    sha256: bytes
    def __init__(self, total_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ByteRange(_message.Message):
    __slots__ = ("begin", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: int
    end: int
    def __init__(self, begin: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class SpanSet(_message.Message):
    __slots__ = ("prompt_bytes", "gaps", "lengths")
    PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    prompt_bytes: int
    gaps: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_bytes: _Optional[int] = ..., gaps: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class SelectionConfig(_message.Message):
    __slots__ = ("keep_ratio", "coverage", "min_keep", "max_keep", "head_chunks", "tail_chunks", "neighbour_chunks")
    KEEP_RATIO_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    MIN_KEEP_FIELD_NUMBER: _ClassVar[int]
    MAX_KEEP_FIELD_NUMBER: _ClassVar[int]
    HEAD_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TAIL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOUR_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    keep_ratio: float
    coverage: float
    min_keep: float
    max_keep: float
    head_chunks: int
    tail_chunks: int
    neighbour_chunks: int
    def __init__(self, keep_ratio: _Optional[float] = ..., coverage: _Optional[float] = ..., min_keep: _Optional[float] = ..., max_keep: _Optional[float] = ..., head_chunks: _Optional[int] = ..., tail_chunks: _Optional[int] = ..., neighbour_chunks: _Optional[int] = ...) -> None: ...

class ScoringConfig(_message.Message):
    __slots__ = ("scorer", "lookahead_tokens", "alpha", "max_density", "seed")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    MAX_DENSITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    lookahead_tokens: int
    alpha: float
    max_density: float
    seed: int
    def __init__(self, scorer: _Optional[str] = ..., lookahead_tokens: _Optional[int] = ..., alpha: _Optional[float] = ..., max_density: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class SamplingConfig(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "logprobs", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    logprobs: int
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., logprobs: _Optional[int] = ..., ignore_eos: bool = ...) -> None: ...

class SpeculationConfig(_message.Message):
    __slots__ = ("enabled", "draft_tokens")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    draft_tokens: int
    def __init__(self, enabled: bool = ..., draft_tokens: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    done: int
    total: int
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class TokenAlternative(_message.Message):
    __slots__ = ("token_id", "token", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: bytes
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[bytes] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: TokenAlternative
    top: _containers.RepeatedCompositeFieldContainer[TokenAlternative]
    def __init__(self, chosen: _Optional[_Union[TokenAlternative, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenAlternative, _Mapping]]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "kept_tokens", "completion_tokens", "draft_tokens", "accepted_tokens", "target_steps", "prompt_bytes")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    kept_tokens: int
    completion_tokens: int
    draft_tokens: int
    accepted_tokens: int
    target_steps: int
    prompt_bytes: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., target_steps: _Optional[int] = ..., prompt_bytes: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("upload_s", "queue_s", "tokenise_s", "score_s", "select_s", "park_s", "map_s", "prefill_s", "ttft_s", "decode_s", "unpark_s", "total_s")
    UPLOAD_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENISE_S_FIELD_NUMBER: _ClassVar[int]
    SCORE_S_FIELD_NUMBER: _ClassVar[int]
    SELECT_S_FIELD_NUMBER: _ClassVar[int]
    PARK_S_FIELD_NUMBER: _ClassVar[int]
    MAP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    UNPARK_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    upload_s: float
    queue_s: float
    tokenise_s: float
    score_s: float
    select_s: float
    park_s: float
    map_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    unpark_s: float
    total_s: float
    def __init__(self, upload_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., tokenise_s: _Optional[float] = ..., score_s: _Optional[float] = ..., select_s: _Optional[float] = ..., park_s: _Optional[float] = ..., map_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., unpark_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...
