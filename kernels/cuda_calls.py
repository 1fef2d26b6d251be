"""The driver's calls that need no context: unwrapped results, which GPU it is, how it allocates.

What `cuda_device` and its parts and the landlord's `kernels.ipc.cuda_physical` share. Refuses
nothing itself: a failed call raises with the driver's name for the failure.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

from kernels.errors import KernelError, LaunchError, NoDevice

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
FILE_DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def call(what: str, result: tuple[Any, ...], kind: type[KernelError] = LaunchError) -> Any:
    """Unwrap a driver call: its value, or `kind` with the driver's name for the failure."""
    status, *values = result
    if int(status) != 0:
        raise kind(what, f"failed with {getattr(status, 'name', int(status))}")
    return values[0] if values else None


def open_gpu(ordinal: int) -> Any:
    """The driver's handle of a GPU; makes no context.

    Raises:
        NoDevice: there is no driver or no such GPU.
    """
    try:
        call("cuInit", driver.cuInit(0), NoDevice)
        return call("cuDeviceGet", driver.cuDeviceGet(ordinal), NoDevice)
    except Exception as error:  # the bindings raise their own kinds where there is no driver
        raise NoDevice("device", f"GPU {ordinal} cannot be used: {error}") from error


def uuid_of(gpu: Any) -> str:
    """Its uuid as `nvidia-smi -L` writes it, `GPU-` and five groups of hexadecimal digits."""
    digits = bytes(call("cuDeviceGetUuid", driver.cuDeviceGetUuid(gpu), NoDevice).bytes).hex()
    groups = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "GPU-" + "-".join(groups)


def exportable_memory(gpu: Any) -> Any:
    """Properties of physical memory of a GPU that can be exported as a file descriptor."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = int(gpu)
    properties.requestedHandleTypes = FILE_DESCRIPTOR
    return properties


def granularity_of(gpu: Any) -> int:
    """Bytes that sizes of physical memory, and of the addresses for it, are multiples of."""
    recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    result = driver.cuMemGetAllocationGranularity(exportable_memory(gpu), recommended)
    return int(call("cuMemGetAllocationGranularity", result, NoDevice))
