from skim.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]
    ROLE_TOOL: _ClassVar[Role]

class PrefillMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREFILL_MODE_UNSPECIFIED: _ClassVar[PrefillMode]
    PREFILL_MODE_AUTO: _ClassVar[PrefillMode]
    PREFILL_MODE_FULL: _ClassVar[PrefillMode]
    PREFILL_MODE_SKIM: _ClassVar[PrefillMode]

class ModelKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_KIND_UNSPECIFIED: _ClassVar[ModelKind]
    MODEL_KIND_TARGET: _ClassVar[ModelKind]
    MODEL_KIND_DRAFTER: _ClassVar[ModelKind]
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
ROLE_TOOL: Role
PREFILL_MODE_UNSPECIFIED: PrefillMode
PREFILL_MODE_AUTO: PrefillMode
PREFILL_MODE_FULL: PrefillMode
PREFILL_MODE_SKIM: PrefillMode
MODEL_KIND_UNSPECIFIED: ModelKind
MODEL_KIND_TARGET: ModelKind
MODEL_KIND_DRAFTER: ModelKind

class Message(_message.Message):
    __slots__ = ("role", "size_bytes")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    role: Role
    size_bytes: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class GenerateConfig(_message.Message):
    __slots__ = ("request_id", "model", "drafter", "messages", "mode", "selection", "scoring", "sampling", "speculation", "positions", "protected", "query", "protect_tail_tokens", "control_ranges", "want_spans")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PROTECT_TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_RANGES_FIELD_NUMBER: _ClassVar[int]
    WANT_SPANS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    drafter: str
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    mode: PrefillMode
    selection: _common_pb2.SelectionConfig
    scoring: _common_pb2.ScoringConfig
    sampling: _common_pb2.SamplingConfig
    speculation: _common_pb2.SpeculationConfig
    positions: _common_pb2.PositionMode
    protected: _containers.RepeatedCompositeFieldContainer[_common_pb2.ByteRange]
    query: _common_pb2.ByteRange
    protect_tail_tokens: int
    control_ranges: _containers.RepeatedCompositeFieldContainer[_common_pb2.ByteRange]
    want_spans: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., drafter: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., mode: _Optional[_Union[PrefillMode, str]] = ..., selection: _Optional[_Union[_common_pb2.SelectionConfig, _Mapping]] = ..., scoring: _Optional[_Union[_common_pb2.ScoringConfig, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingConfig, _Mapping]] = ..., speculation: _Optional[_Union[_common_pb2.SpeculationConfig, _Mapping]] = ..., positions: _Optional[_Union[_common_pb2.PositionMode, str]] = ..., protected: _Optional[_Iterable[_Union[_common_pb2.ByteRange, _Mapping]]] = ..., query: _Optional[_Union[_common_pb2.ByteRange, _Mapping]] = ..., protect_tail_tokens: _Optional[int] = ..., control_ranges: _Optional[_Iterable[_Union[_common_pb2.ByteRange, _Mapping]]] = ..., want_spans: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("config", "prompt", "end")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    config: GenerateConfig
    prompt: _common_pb2.PromptPart
    end: _common_pb2.PromptEnd
    def __init__(self, config: _Optional[_Union[GenerateConfig, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.PromptPart, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.PromptEnd, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("request_id", "model", "drafter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    drafter: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., drafter: _Optional[str] = ...) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("skimmed", "full_reason", "detail", "degraded", "drafter_prompt_tokens", "drafter_kept_tokens", "coverage", "density", "layer_density", "cut_row_share", "forced_only", "yarn_factor", "spans", "scorer")
    SKIMMED_FIELD_NUMBER: _ClassVar[int]
    FULL_REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    LAYER_DENSITY_FIELD_NUMBER: _ClassVar[int]
    CUT_ROW_SHARE_FIELD_NUMBER: _ClassVar[int]
    FORCED_ONLY_FIELD_NUMBER: _ClassVar[int]
    YARN_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    skimmed: bool
    full_reason: _common_pb2.FullReason
    detail: str
    degraded: bool
    drafter_prompt_tokens: int
    drafter_kept_tokens: int
    coverage: float
    density: float
    layer_density: _containers.RepeatedScalarFieldContainer[float]
    cut_row_share: float
    forced_only: bool
    yarn_factor: float
    spans: _common_pb2.SpanSet
    scorer: str
    def __init__(self, skimmed: bool = ..., full_reason: _Optional[_Union[_common_pb2.FullReason, str]] = ..., detail: _Optional[str] = ..., degraded: bool = ..., drafter_prompt_tokens: _Optional[int] = ..., drafter_kept_tokens: _Optional[int] = ..., coverage: _Optional[float] = ..., density: _Optional[float] = ..., layer_density: _Optional[_Iterable[float]] = ..., cut_row_share: _Optional[float] = ..., forced_only: bool = ..., yarn_factor: _Optional[float] = ..., spans: _Optional[_Union[_common_pb2.SpanSet, _Mapping]] = ..., scorer: _Optional[str] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "usage", "timings", "seed", "positions", "speculation")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    timings: _common_pb2.Timings
    seed: int
    positions: _common_pb2.PositionMode
    speculation: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., timings: _Optional[_Union[_common_pb2.Timings, _Mapping]] = ..., seed: _Optional[int] = ..., positions: _Optional[_Union[_common_pb2.PositionMode, str]] = ..., speculation: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("admitted", "progress", "plan", "tokens", "finish")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    progress: _common_pb2.Progress
    plan: PlanSummary
    tokens: _common_pb2.TokenChunk
    finish: Finish
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class TextMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    content: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., content: _Optional[str] = ...) -> None: ...

class GenerateTextRequest(_message.Message):
    __slots__ = ("config", "prompt", "chat")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    config: GenerateConfig
    prompt: str
    chat: _containers.RepeatedCompositeFieldContainer[TextMessage]
    def __init__(self, config: _Optional[_Union[GenerateConfig, _Mapping]] = ..., prompt: _Optional[str] = ..., chat: _Optional[_Iterable[_Union[TextMessage, _Mapping]]] = ...) -> None: ...

class GenerateTextResponse(_message.Message):
    __slots__ = ("request_id", "text", "plan", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    plan: PlanSummary
    finish: Finish
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("model", "text")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("prompt_tokens",)
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "kind", "serving", "detail", "model_digest", "max_prompt_tokens", "chat")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: ModelKind
    serving: bool
    detail: str
    model_digest: str
    max_prompt_tokens: int
    chat: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[ModelKind, str]] = ..., serving: bool = ..., detail: _Optional[str] = ..., model_digest: _Optional[str] = ..., max_prompt_tokens: _Optional[int] = ..., chat: bool = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "skim_min_tokens")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    SKIM_MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    skim_min_tokens: int
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., skim_min_tokens: _Optional[int] = ...) -> None: ...
