"""The drafter's weights on the GPU: one region of memory, and where each tensor lies in it.

`plan_layout` decides the region from the model's shape alone: embeddings first, then layer by layer
in the order in which a pass reads them, so that a copy into the region can be followed by the pass.
`CudaWeights.load` fills it from a GGUF: raw bytes go up as they stand in the file and are
dequantised to bf16 on the GPU. Nothing in the region is an address, so it may lie anywhere.

Refuses (ModelFileError) widths that the matrix products do not take and head sizes without a
kernel. The output matrix stays in the file: no pass reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafter_svc.architecture import halves
from drafter_svc.backend import DrafterModel
from kernels.device import Device, Memory
from kernels.ops.dequant import DEQUANT_TYPES, dequant
from kernels.ops.rmsnorm import MAX_HIDDEN
from modelfile.ggml_types import GGML_TYPES
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape
from skim.errors import ModelFileError

HEAD_DIMS = (64, 128, 256)  # the attention kernels'
ROW_MULTIPLE = 8  # a row of bf16 that a matrix product reads starts on 16 bytes
REGION_MULTIPLE_BYTES = 2 << 20  # granularity of physical memory on the GPU
ALIGNMENT_BYTES = 256
STAGING_BYTES = 64 << 20  # raw tensors go up in pieces of this size

_BLOCKS = {kind.name: (kind.block_size, kind.block_bytes) for kind in GGML_TYPES.values()}


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the region: `dtype` is BF16 or F32, `offset` counts bytes from its start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return int(np.prod(self.shape)) * (2 if self.dtype == "BF16" else 4)


@dataclass(frozen=True)
class WeightLayout:
    """The region: its tensors in order of their offsets, and its size (a multiple of 2 MiB)."""

    tensors: tuple[PlacedTensor, ...]
    size_bytes: int

    @property
    def digest(self) -> str:
        """Hash of every name, dtype, shape and offset: sha256 in hex."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            shape = ",".join(map(str, tensor.shape))
            digest.update(f"{tensor.name}\0{tensor.dtype}\0{shape}\0{tensor.offset}\n".encode())
        return digest.hexdigest()

    def end_of_layer(self, layer: int) -> int:
        """Bytes from the start of the region up to and with a layer's last tensor."""
        prefix = f"blk.{layer}."
        return max(t.offset + t.size_bytes for t in self.tensors if t.name.startswith(prefix))


def check_shape(shape: ModelShape) -> None:
    """Refuse a model that the kernels do not take (ModelFileError)."""
    problem: tuple[str, object, object] | None = None
    if shape.head_dim not in HEAD_DIMS:
        problem = ("heads of this width have no kernel", shape.head_dim, HEAD_DIMS)
    for name, width in (("embedding", shape.embed), ("feed-forward", shape.ffn)):
        if width % ROW_MULTIPLE:
            problem = (f"the {name} width", width, f"a multiple of {ROW_MULTIPLE}")
    if shape.embed > MAX_HIDDEN:
        problem = ("the embedding width", shape.embed, f"at most {MAX_HIDDEN}")
    if problem:
        what, got, allowed = problem
        raise ModelFileError(
            f"the CUDA backend cannot run this model: {what}: got {got}, allowed {allowed}",
            reason="BACKEND_UNSUPPORTED",
            got=got,
            allowed=allowed,
        )


def plan_layout(shape: ModelShape) -> WeightLayout:
    """Place every tensor that a pass reads; see `CudaWeights` for the names."""
    tensors: list[PlacedTensor] = []
    end = 0

    def place(name: str, dtype: str, *dims: int) -> None:
        nonlocal end
        tensors.append(PlacedTensor(name, dtype, dims, end))
        end += -(-tensors[-1].size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    q_width = shape.heads * shape.head_dim
    qkv_width = q_width + 2 * shape.kv_heads * shape.head_dim
    place("token_embd", "BF16", shape.vocab_size, shape.embed)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        place(block + "attn_norm", "F32", shape.embed)
        place(block + "qkv", "BF16", qkv_width, shape.embed)
        if shape.qkv_bias:
            place(block + "qkv_bias", "F32", qkv_width)
        if shape.qk_norm:
            place(block + "q_norm", "F32", shape.head_dim)
            place(block + "k_norm", "F32", shape.head_dim)
        place(block + "attn_output", "BF16", shape.embed, q_width)
        place(block + "ffn_norm", "F32", shape.embed)
        place(block + "gate_up", "BF16", 2 * shape.ffn, shape.embed)
        place(block + "down", "BF16", shape.embed, shape.ffn)
    size = -(-end // REGION_MULTIPLE_BYTES) * REGION_MULTIPLE_BYTES
    return WeightLayout(tuple(tensors), size)


@dataclass(frozen=True)
class LayerAddresses:
    """Device addresses of one layer; 0 where the model has no such tensor.

    bf16 [outputs, inputs]: `qkv` (query, key, then value rows), `attention_output`, `gate_up` (gate
    rows, then up rows), `down`. float32: the norms and `qkv_bias`.
    """

    attention_norm: int
    qkv: int
    qkv_bias: int
    q_norm: int
    k_norm: int
    attention_output: int
    mlp_norm: int
    gate_up: int
    down: int


class CudaWeights:
    """A drafter whose weights lie in one region on a device.

    Attributes:
        shape, layout: of the model and of the region.
        embedding: address of bf16 [vocab_size, embed].
        layers: addresses of each layer.
        frequency_divisors: Llama 3's table, on the host, or None.
    """

    def __init__(self, shape: ModelShape, base_address: int) -> None:
        """Describe weights that lie, or will lie, at `base_address`.

        Raises:
            ModelFileError: see `check_shape`.
        """
        check_shape(shape)
        self.shape = shape
        self.layout = plan_layout(shape)
        self._memory: Memory | None = None
        factors = shape.rope.freq_factors
        self.frequency_divisors = None if factors is None else np.asarray(factors, np.float32)
        self.rebase(base_address)

    @classmethod
    def load(cls, device: Device, file: GgufFile, base_address: int | None = None) -> CudaWeights:
        """Fill a region from a model file.

        Args:
            base_address: of a region of the layout's size, 256-byte aligned, that the caller owns;
                None: one is allocated here.

        Raises:
            ModelFileError: see `ModelShape.from_gguf` and `check_shape`.
            OutOfMemory: the region does not fit.
        """
        shape = ModelShape.from_gguf(file)
        weights = cls(shape, base_address or 0)
        if base_address is None:
            weights._memory = device.allocate(weights.layout.size_bytes)
            weights.rebase(weights._memory.address)
        try:
            fill_region(device, file, weights)
        except BaseException:
            weights.close()
            raise
        return weights

    def rebase(self, base_address: int) -> None:
        """Take every address anew: the region lies at `base_address` now."""
        at = {t.name: base_address + t.offset for t in self.layout.tensors}
        self.base_address, self.addresses = base_address, at
        self.embedding = at["token_embd"]
        self.layers = tuple(
            LayerAddresses(
                attention_norm=at[block + "attn_norm"],
                qkv=at[block + "qkv"],
                qkv_bias=at.get(block + "qkv_bias", 0),
                q_norm=at.get(block + "q_norm", 0),
                k_norm=at.get(block + "k_norm", 0),
                attention_output=at[block + "attn_output"],
                mlp_norm=at[block + "ffn_norm"],
                gate_up=at[block + "gate_up"],
                down=at[block + "down"],
            )
            for block in (f"blk.{layer}." for layer in range(self.shape.layers))
        )

    def describe(self) -> DrafterModel:
        """Summarise for `GetDrafter`."""
        shape = self.shape
        return DrafterModel(
            architecture=shape.arch,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            hidden_size=shape.embed,
            vocab_size=shape.vocab_size,
            trained_context_tokens=shape.context_length,
            num_parameters=sum(int(np.prod(t.shape)) for t in self.layout.tensors),
            weight_bytes=self.layout.size_bytes,
        )

    def close(self) -> None:
        """Give the region back if it was allocated here; idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def fill_region(device: Device, file: GgufFile, weights: CudaWeights) -> None:
    """Queue every upload and dequantisation, and wait for them."""
    staging = device.allocate(STAGING_BYTES)
    try:
        for placed in weights.layout.tensors:
            address = weights.addresses[placed.name]
            for name in source_names(placed.name):
                if placed.dtype == "F32":
                    values = _vector(file, weights.shape, name)
                    device.upload(address, values)
                    address += values.nbytes
                else:
                    address += _upload_matrix(device, file, weights.shape, name, address, staging)
        device.synchronize()
    finally:
        staging.close()


def source_names(placed: str) -> tuple[str, ...]:
    """The file's tensors that make up a tensor of the region, in order."""
    block, _, part = placed.rpartition(".")
    parts = {
        "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
        "qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
        "q_norm": ("attn_q_norm.weight",),
        "k_norm": ("attn_k_norm.weight",),
        "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
        "down": ("ffn_down.weight",),
    }.get(part, (f"{part}.weight",))
    return tuple(f"{block}.{part}" if block else part for part in parts)


def _heads_to_reorder(shape: ModelShape, name: str) -> int:
    """Heads whose rows come in interleaved pairs and must be split into halves; 0: none."""
    if shape.rope.pairing != "interleaved":
        return 0
    part = name.split(".")[2] if name.count(".") > 2 else ""
    counts = {"attn_q": shape.heads, "attn_k": shape.kv_heads, "attn_q_norm": 1, "attn_k_norm": 1}
    return counts.get(part, 0)


def _vector(file: GgufFile, shape: ModelShape, name: str) -> NDArray[np.float32]:
    values = file.tensor(name)
    heads = _heads_to_reorder(shape, name)
    return halves(values, heads) if heads else np.ascontiguousarray(values)


def _raw_rows(file: GgufFile, shape: ModelShape, name: str) -> tuple[str, NDArray[np.uint8]]:
    """A matrix as bytes: (type, uint8 [rows, bytes a row]).

    Rows are whole blocks of their type, so heads are reordered without touching a value. A type
    that the GPU does not read is dequantised here.
    """
    info = file.info(name)
    dtype = info.dtype
    if dtype in DEQUANT_TYPES:
        raw = np.frombuffer(file.tensor_bytes(name), np.uint8).reshape(info.shape[0], -1)
    else:
        dtype, raw = "F32", np.ascontiguousarray(file.tensor(name)).view(np.uint8)
    heads = _heads_to_reorder(shape, name)
    if heads:
        pairs = raw.reshape(heads, -1, 2, raw.shape[1])
        raw = np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(raw.shape)
    return dtype, raw


def _pieces(raw: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    rows = max(1, STAGING_BYTES // raw.shape[1])
    for begin in range(0, raw.shape[0], rows):
        yield raw[begin : begin + rows]


def _upload_matrix(
    device: Device, file: GgufFile, shape: ModelShape, name: str, address: int, staging: Memory
) -> int:
    """Put a matrix at `address` as bf16; return how many bytes it takes there."""
    dtype, raw = _raw_rows(file, shape, name)
    columns = file.info(name).shape[1]
    start = address
    for piece in _pieces(raw):
        if dtype == "BF16":
            device.upload(address, piece)
        else:
            device.upload(staging.address, piece)
            dequant(device, dtype, staging.address, address, piece.shape[0] * columns)
        address += piece.shape[0] * columns * 2
    return address - start
