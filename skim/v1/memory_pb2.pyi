from skim.v1 import drafter_pb2 as _drafter_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Region(_message.Message):
    __slots__ = ("name", "generation", "state", "size_bytes", "model_digest", "layout_digest", "device_uuid", "lease_pid", "transport")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    LEASE_PID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    state: _drafter_pb2.ResidencyState
    size_bytes: int
    model_digest: str
    layout_digest: str
    device_uuid: str
    lease_pid: int
    transport: str
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., state: _Optional[_Union[_drafter_pb2.ResidencyState, str]] = ..., size_bytes: _Optional[int] = ..., model_digest: _Optional[str] = ..., layout_digest: _Optional[str] = ..., device_uuid: _Optional[str] = ..., lease_pid: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class ListRegionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRegionsResponse(_message.Message):
    __slots__ = ("regions",)
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class ParkRequest(_message.Message):
    __slots__ = ("name", "expect_generation", "timeout_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    expect_generation: int
    timeout_s: float
    def __init__(self, name: _Optional[str] = ..., expect_generation: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ParkResponse(_message.Message):
    __slots__ = ("region", "freed_bytes", "already_parked", "park_s", "workspace_bytes")
    REGION_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALREADY_PARKED_FIELD_NUMBER: _ClassVar[int]
    PARK_S_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    region: Region
    freed_bytes: int
    already_parked: bool
    park_s: float
    workspace_bytes: int
    def __init__(self, region: _Optional[_Union[Region, _Mapping]] = ..., freed_bytes: _Optional[int] = ..., already_parked: bool = ..., park_s: _Optional[float] = ..., workspace_bytes: _Optional[int] = ...) -> None: ...

class UnparkRequest(_message.Message):
    __slots__ = ("name", "expect_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    expect_generation: int
    def __init__(self, name: _Optional[str] = ..., expect_generation: _Optional[int] = ...) -> None: ...

class UnparkResponse(_message.Message):
    __slots__ = ("region", "copied_bytes", "layers_ready")
    REGION_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_READY_FIELD_NUMBER: _ClassVar[int]
    region: Region
    copied_bytes: int
    layers_ready: int
    def __init__(self, region: _Optional[_Union[Region, _Mapping]] = ..., copied_bytes: _Optional[int] = ..., layers_ready: _Optional[int] = ...) -> None: ...

class WatchStateRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchStateResponse(_message.Message):
    __slots__ = ("region",)
    REGION_FIELD_NUMBER: _ClassVar[int]
    region: Region
    def __init__(self, region: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...
