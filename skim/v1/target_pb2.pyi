from skim.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TargetGenerateConfig(_message.Message):
    __slots__ = ("request_id", "model", "sampling", "speculation", "positions", "control_ranges")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_RANGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    sampling: _common_pb2.SamplingConfig
    speculation: _common_pb2.SpeculationConfig
    positions: _common_pb2.PositionMode
    control_ranges: _containers.RepeatedCompositeFieldContainer[_common_pb2.ByteRange]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., sampling: _Optional[_Union[_common_pb2.SamplingConfig, _Mapping]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationConfig, _Mapping]] = ..., positions: _Optional[_Union[_common_pb2.PositionMode, str]] = ..., control_ranges: _Optional[_Iterable[_Union[_common_pb2.ByteRange, _Mapping]]] = ...) -> None: ...

class SkimPlan(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _common_pb2.SpanSet
    def __init__(self, spans: _Optional[_Union[_common_pb2.SpanSet, _Mapping]] = ...) -> None: ...

class FullPlan(_message.Message):
    __slots__ = ("reason", "fallback")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FullReason
    fallback: _common_pb2.SpanSet
    def __init__(self, reason: _Optional[_Union[_common_pb2.FullReason, str]] = ..., fallback: _Optional[_Union[_common_pb2.SpanSet, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("skim", "full")
    SKIM_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    skim: SkimPlan
    full: FullPlan
    def __init__(self, skim: _Optional[_Union[SkimPlan, _Mapping]] = ..., full: _Optional[_Union[FullPlan, _Mapping]] = ...) -> None: ...

class TargetServiceGenerateRequest(_message.Message):
    __slots__ = ("config", "prompt", "end", "plan")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    config: TargetGenerateConfig
    prompt: _common_pb2.PromptPart
    end: _common_pb2.PromptEnd
    plan: Plan
    def __init__(self, config: _Optional[_Union[TargetGenerateConfig, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.PromptPart, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.PromptEnd, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Tokenised(_message.Message):
    __slots__ = ("prompt_tokens", "tokenise_s", "full_prefill_estimate_s", "full_fits")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENISE_S_FIELD_NUMBER: _ClassVar[int]
    FULL_PREFILL_ESTIMATE_S_FIELD_NUMBER: _ClassVar[int]
    FULL_FITS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    tokenise_s: float
    full_prefill_estimate_s: float
    full_fits: bool
    def __init__(self, prompt_tokens: _Optional[int] = ..., tokenise_s: _Optional[float] = ..., full_prefill_estimate_s: _Optional[float] = ..., full_fits: bool = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("kept_tokens", "positions", "degraded", "queue_s", "map_s", "park_s")
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    MAP_S_FIELD_NUMBER: _ClassVar[int]
    PARK_S_FIELD_NUMBER: _ClassVar[int]
    kept_tokens: int
    positions: _common_pb2.PositionMode
    degraded: bool
    queue_s: float
    map_s: float
    park_s: float
    def __init__(self, kept_tokens: _Optional[int] = ..., positions: _Optional[_Union[_common_pb2.PositionMode, str]] = ..., degraded: bool = ..., queue_s: _Optional[float] = ..., map_s: _Optional[float] = ..., park_s: _Optional[float] = ...) -> None: ...

class TargetFinish(_message.Message):
    __slots__ = ("reason", "usage", "prefill_s", "decode_s", "seed", "speculation")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    prefill_s: float
    decode_s: float
    seed: int
    speculation: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., seed: _Optional[int] = ..., speculation: _Optional[str] = ...) -> None: ...

class TargetServiceGenerateResponse(_message.Message):
    __slots__ = ("tokenised", "progress", "started", "tokens", "finish")
    TOKENISED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    tokenised: Tokenised
    progress: _common_pb2.Progress
    started: PrefillStarted
    tokens: _common_pb2.TokenChunk
    finish: TargetFinish
    def __init__(self, tokenised: _Optional[_Union[Tokenised, _Mapping]] = ..., progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ..., finish: _Optional[_Union[TargetFinish, _Mapping]] = ...) -> None: ...

class GetTargetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTargetResponse(_message.Message):
    __slots__ = ("model", "model_digest", "architecture", "backend", "trained_context_tokens", "slots", "kept_max_tokens", "gen_max_tokens", "full_max_tokens", "original_positions", "chat", "kv_type", "prefill_tokens_per_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRAINED_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GEN_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FULL_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    KV_TYPE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_digest: str
    architecture: str
    backend: str
    trained_context_tokens: int
    slots: int
    kept_max_tokens: int
    gen_max_tokens: int
    full_max_tokens: int
    original_positions: bool
    chat: bool
    kv_type: str
    prefill_tokens_per_s: float
    def __init__(self, model: _Optional[str] = ..., model_digest: _Optional[str] = ..., architecture: _Optional[str] = ..., backend: _Optional[str] = ..., trained_context_tokens: _Optional[int] = ..., slots: _Optional[int] = ..., kept_max_tokens: _Optional[int] = ..., gen_max_tokens: _Optional[int] = ..., full_max_tokens: _Optional[int] = ..., original_positions: bool = ..., chat: bool = ..., kv_type: _Optional[str] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("queued", "queue_limit", "running", "slots", "kv_usage", "engine_restarts", "full_context")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    FULL_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    queued: int
    queue_limit: int
    running: int
    slots: int
    kv_usage: float
    engine_restarts: int
    full_context: bool
    def __init__(self, queued: _Optional[int] = ..., queue_limit: _Optional[int] = ..., running: _Optional[int] = ..., slots: _Optional[int] = ..., kv_usage: _Optional[float] = ..., engine_restarts: _Optional[int] = ..., full_context: bool = ...) -> None: ...

class TargetServiceCountTokensRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class TargetServiceCountTokensResponse(_message.Message):
    __slots__ = ("prompt_tokens",)
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ...) -> None: ...

class RenderChatRequest(_message.Message):
    __slots__ = ("roles",)
    ROLES_FIELD_NUMBER: _ClassVar[int]
    roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, roles: _Optional[_Iterable[str]] = ...) -> None: ...

class RenderChatResponse(_message.Message):
    __slots__ = ("pieces",)
    PIECES_FIELD_NUMBER: _ClassVar[int]
    pieces: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pieces: _Optional[_Iterable[str]] = ...) -> None: ...
