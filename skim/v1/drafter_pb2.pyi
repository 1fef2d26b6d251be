from skim.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SelectionOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECTION_OUTCOME_UNSPECIFIED: _ClassVar[SelectionOutcome]
    SELECTION_OUTCOME_KEEP_RATIO: _ClassVar[SelectionOutcome]
    SELECTION_OUTCOME_COVERAGE: _ClassVar[SelectionOutcome]
    SELECTION_OUTCOME_LOW_COVERAGE: _ClassVar[SelectionOutcome]
    SELECTION_OUTCOME_FORCED_ONLY: _ClassVar[SelectionOutcome]

class ResidencyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_STATE_UNSPECIFIED: _ClassVar[ResidencyState]
    RESIDENCY_STATE_RESIDENT: _ClassVar[ResidencyState]
    RESIDENCY_STATE_PARKING: _ClassVar[ResidencyState]
    RESIDENCY_STATE_PARKED: _ClassVar[ResidencyState]
    RESIDENCY_STATE_UNPARKING: _ClassVar[ResidencyState]
    RESIDENCY_STATE_FAILED: _ClassVar[ResidencyState]
SELECTION_OUTCOME_UNSPECIFIED: SelectionOutcome
SELECTION_OUTCOME_KEEP_RATIO: SelectionOutcome
SELECTION_OUTCOME_COVERAGE: SelectionOutcome
SELECTION_OUTCOME_LOW_COVERAGE: SelectionOutcome
SELECTION_OUTCOME_FORCED_ONLY: SelectionOutcome
RESIDENCY_STATE_UNSPECIFIED: ResidencyState
RESIDENCY_STATE_RESIDENT: ResidencyState
RESIDENCY_STATE_PARKING: ResidencyState
RESIDENCY_STATE_PARKED: ResidencyState
RESIDENCY_STATE_UNPARKING: ResidencyState
RESIDENCY_STATE_FAILED: ResidencyState

class ScoreConfig(_message.Message):
    __slots__ = ("request_id", "model", "selection", "scoring", "protected", "query", "protect_tail_tokens", "control_ranges")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    SCORING_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PROTECT_TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_RANGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    selection: _common_pb2.SelectionConfig
    scoring: _common_pb2.ScoringConfig
    protected: _containers.RepeatedCompositeFieldContainer[_common_pb2.ByteRange]
    query: _common_pb2.ByteRange
    protect_tail_tokens: int
    control_ranges: _containers.RepeatedCompositeFieldContainer[_common_pb2.ByteRange]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., selection: _Optional[_Union[_common_pb2.SelectionConfig, _Mapping]] = ..., scoring: _Optional[_Union[_common_pb2.ScoringConfig, _Mapping]] = ..., protected: _Optional[_Iterable[_Union[_common_pb2.ByteRange, _Mapping]]] = ..., query: _Optional[_Union[_common_pb2.ByteRange, _Mapping]] = ..., protect_tail_tokens: _Optional[int] = ..., control_ranges: _Optional[_Iterable[_Union[_common_pb2.ByteRange, _Mapping]]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("config", "prompt", "end")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    config: ScoreConfig
    prompt: _common_pb2.PromptPart
    end: _common_pb2.PromptEnd
    def __init__(self, config: _Optional[_Union[ScoreConfig, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.PromptPart, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.PromptEnd, _Mapping]] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("spans", "outcome", "prompt_tokens", "kept_tokens", "coverage", "layer_density", "cut_row_share", "yarn_factor", "scorer", "queue_s", "tokenise_s", "forward_s", "select_s", "model", "model_digest", "memory_s")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    LAYER_DENSITY_FIELD_NUMBER: _ClassVar[int]
    CUT_ROW_SHARE_FIELD_NUMBER: _ClassVar[int]
    YARN_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENISE_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    SELECT_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEMORY_S_FIELD_NUMBER: _ClassVar[int]
    spans: _common_pb2.SpanSet
    outcome: SelectionOutcome
    prompt_tokens: int
    kept_tokens: int
    coverage: float
    layer_density: _containers.RepeatedScalarFieldContainer[float]
    cut_row_share: float
    yarn_factor: float
    scorer: str
    queue_s: float
    tokenise_s: float
    forward_s: float
    select_s: float
    model: str
    model_digest: str
    memory_s: float
    def __init__(self, spans: _Optional[_Union[_common_pb2.SpanSet, _Mapping]] = ..., outcome: _Optional[_Union[SelectionOutcome, str]] = ..., prompt_tokens: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., coverage: _Optional[float] = ..., layer_density: _Optional[_Iterable[float]] = ..., cut_row_share: _Optional[float] = ..., yarn_factor: _Optional[float] = ..., scorer: _Optional[str] = ..., queue_s: _Optional[float] = ..., tokenise_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., select_s: _Optional[float] = ..., model: _Optional[str] = ..., model_digest: _Optional[str] = ..., memory_s: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    result: ScoreResult
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., result: _Optional[_Union[ScoreResult, _Mapping]] = ...) -> None: ...

class GetDrafterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDrafterResponse(_message.Message):
    __slots__ = ("model", "model_digest", "layout_digest", "backend", "architecture", "layers", "max_prompt_tokens", "trained_context_tokens", "queued", "queue_limit", "running", "tokens_per_s", "residency", "scorers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_digest: str
    layout_digest: str
    backend: str
    architecture: str
    layers: int
    max_prompt_tokens: int
    trained_context_tokens: int
    queued: int
    queue_limit: int
    running: int
    tokens_per_s: float
    residency: ResidencyState
    scorers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., model_digest: _Optional[str] = ..., layout_digest: _Optional[str] = ..., backend: _Optional[str] = ..., architecture: _Optional[str] = ..., layers: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., trained_context_tokens: _Optional[int] = ..., queued: _Optional[int] = ..., queue_limit: _Optional[int] = ..., running: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., residency: _Optional[_Union[ResidencyState, str]] = ..., scorers: _Optional[_Iterable[str]] = ...) -> None: ...
