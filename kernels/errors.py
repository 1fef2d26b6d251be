"""The small root of errors that kernels raise; each service maps it onto its own tree once.

    KernelError
    ├── InvalidArgument   a shape, dtype or option the kernel does not take
    ├── CompileError      NVRTC refused a kernel; carries architecture and log
    ├── LaunchError       a launch, or an event after it, failed; carries the kernel's name
    ├── OutOfMemory       the device cannot give the bytes that were asked for
    ├── HandleError       an exported memory handle could not be made, sent or opened
    ├── ProtocolError     the other end of a lease said what the protocol does not allow
    ├── PeerGone          the other end of a lease closed its socket, or died
    └── NoDevice          there is no GPU that kernels can run on; says why

Kernels import nothing else of ours, hence a root of their own.
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of every error that `kernels` raises on purpose.

    Attributes:
        kernel: name of the kernel or call at fault.
    """

    def __init__(self, kernel: str, message: str) -> None:
        super().__init__(f"{kernel}: {message}")
        self.kernel = kernel


class InvalidArgument(KernelError):
    """An argument has a shape, dtype or value that the kernel does not take."""

    @classmethod
    def value(cls, kernel: str, name: str, got: object, allowed: str) -> InvalidArgument:
        """Build the usual message: `KERNEL: NAME must be ALLOWED, got GOT`."""
        return cls(kernel, f"{name} must be {allowed}, got {got!r}")


class CompileError(KernelError):
    """NVRTC refused a kernel.

    Attributes:
        arch: the architecture it was compiled for.
        log: NVRTC's own words, with file and line.
    """

    def __init__(self, kernel: str, arch: str, log: str) -> None:
        super().__init__(kernel, f"does not compile for {arch}:\n{log}")
        self.arch = arch
        self.log = log


class LaunchError(KernelError):
    """A launch failed, or the work behind it did."""


class OutOfMemory(KernelError):
    """The device cannot give the bytes that were asked for."""

    @classmethod
    def of(cls, kernel: str, num_bytes: int, free_bytes: int) -> OutOfMemory:
        """Build the usual message from the bytes asked for and the bytes free."""
        return cls(kernel, f"asked for {num_bytes:,} bytes, {free_bytes:,} are free")


class HandleError(KernelError):
    """A memory handle could not be exported, sent, imported or mapped."""


class ProtocolError(KernelError):
    """The other end of a lease broke the protocol; its socket is to be closed."""


class PeerGone(KernelError):
    """The other end of a lease closed its socket, or died."""


class NoDevice(KernelError):
    """There is no GPU that kernels can run on: no package, no driver, no device, or too old."""
