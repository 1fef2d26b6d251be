"""A leased region on the device: mapped, filled, copied into, let go. No threads, no protocol.

The landlord owns a region of device memory and an image of the same bytes on the host; both come as
file descriptors (`lease`, `residency`). The addresses are reserved once, so the weights' addresses
hold while memory comes and goes behind them (by the legacy transport they may move, and the weights
with them); the image is mapped and pinned once and kept.

Refuses (HandleError, ProtocolError) a region or an image of another size or with another tensor
table than this model's, and (ModelFileError) a file that is no longer the one that was opened.
"""

from __future__ import annotations

from pathlib import Path

from drafter_svc.cuda_weights import CudaWeights, fill_region
from kernels.device import Device, Mark, Pinned
from kernels.errors import HandleError, ProtocolError
from kernels.ipc.image import Image, checksum, open_image
from kernels.ipc.legacy import SharedWindow
from kernels.ipc.messages import Tensor, Tensors
from modelfile.gguf_file import GgufFile
from skim.errors import ModelFileError


class LeasedRegion:
    """Where one model's weights lie while the landlord gives them room.

    Args:
        device: that maps the region.
        path: the GGUF file, read only when the landlord has no image of it.
        model_digest: of that file.
        weights: whose addresses become those of the window.

    Attributes:
        size_bytes: of region and image.
        tensors: the table that goes with them.
        ends: bytes from the region's start to the end of each layer; the first layer's include the
            embeddings in front of it.
    """

    def __init__(self, device: Device, path: Path, model_digest: str, weights: CudaWeights) -> None:
        self._device, self._path, self._weights = device, path, weights
        self.model_digest = model_digest
        self.layout_digest = weights.layout.digest
        self._window = SharedWindow(device, weights.layout.size_bytes)
        self.size_bytes = self._window.size_bytes
        weights.rebase(self._window.address)
        self.tensors: Tensors = tuple(
            Tensor(t.name, t.dtype, t.shape, t.offset) for t in weights.layout.tensors
        )
        layers = range(weights.shape.layers)
        self.ends = tuple(weights.layout.end_of_layer(layer) for layer in layers)
        self._image: Image | None = None
        self._pinned: Pinned | None = None

    @property
    def mapped(self) -> bool:
        """Whether device memory lies behind the addresses."""
        return self._window.mapped

    def map(self, fd: int) -> None:
        """Map a region; takes the descriptor. HandleError: see `SharedWindow.map`."""
        self._window.map(fd)
        if self._window.address != self._weights.base_address:  # only by the legacy transport
            self._weights.rebase(self._window.address)

    def unmap(self) -> None:
        """Let the region go once all queued work is done; idempotent."""
        self._window.unmap()

    def take_image(self, fd: int, tensors: Tensors) -> None:
        """Map and pin the model's image in the place of an older one; `fd` stays the caller's.

        Raises:
            ProtocolError: its tensor table is not this model's.
            HandleError: it has another size, or cannot be mapped or pinned.
        """
        if tensors != self.tensors:
            raise ProtocolError("lease", "the tensor table is not that of this model's layout")
        image = self._open(fd, writable=False)
        try:
            pinned = self._device.pin(image.bytes_)
        except BaseException:
            image.close()
            raise
        self._drop_image()
        self._image, self._pinned = image, pinned

    def copy_in(self) -> tuple[Mark, ...]:
        """Queue the copy of the image into the mapped region, in the order of the layers.

        Returns:
            For each layer the mark behind the last of its bytes.
        Raises:
            ProtocolError: there is no image.
        """
        if self._pinned is None:
            raise ProtocolError("lease", "a region without weights came, and no image of them")
        marks, begin = [], 0
        for end in self.ends:
            marks.append(
                self._device.copy_in(self._window.address + begin, self._pinned, begin, end - begin)
            )
            begin = end
        return tuple(marks)

    def fill(self, fd: int) -> str:
        """Fill the mapped region and a new image; from an image held already, else from the file.

        Args:
            fd: of the image; stays the caller's.
        Returns:
            The image's checksum. The image is mapped read-only by then, and pinned.
        Raises:
            ModelFileError: the file is gone, or another one.
            OutOfMemory: there is no room to stage the file's tensors.
        """
        image = self._open(fd, writable=True)
        try:
            if self._image is not None:
                marks = self.copy_in()
                image.bytes_[:] = self._image.bytes_
                marks[-1].wait()
            else:
                self._read_file()
                self._device.download(self._window.address, image.bytes_)
            digest = checksum(image.bytes_)
        finally:
            image.close()  # before it is sealed
        self.take_image(fd, self.tensors)
        return digest

    def close(self) -> None:
        """Unmap, unpin, and give the addresses up; idempotent."""
        self._window.close()
        self._drop_image()

    def _read_file(self) -> None:
        with GgufFile.open(self._path) as file:
            if file.model_digest != self.model_digest:
                raise ModelFileError(
                    f"{self._path} changed since it was opened",
                    got=file.model_digest,
                    allowed=self.model_digest,
                )
            self._device.fill(self._window.address, self.size_bytes)  # the gaps between tensors
            fill_region(self._device, file, self._weights)

    def _open(self, fd: int, *, writable: bool) -> Image:
        image = open_image(fd, writable)
        if image.size_bytes != self.size_bytes:
            got = image.size_bytes
            image.close()
            raise HandleError("image", f"has {got:,} bytes, the region {self.size_bytes:,}")
        return image

    def _drop_image(self) -> None:
        if self._pinned is not None:
            self._pinned.close()
        if self._image is not None:
            self._image.close()
        self._pinned = self._image = None
