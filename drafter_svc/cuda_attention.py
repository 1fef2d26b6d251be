"""One layer's attention on the GPU: find the blocks, then attend over them.

Means of every block, their scores for each query tile, and the selection, as one step; then the
sparse kernel over the lists, on the Hopper path where the GPU and the sizes allow it and on the
portable one elsewhere. A dense pass skips the finding. The buffers are the same for every layer, so
what depends on their addresses is made once a pass.
"""

from __future__ import annotations

import math

from drafter_svc.backend import AttentionConfig
from drafter_svc.cuda_lists import PassLists
from drafter_svc.cuda_workspace import BLOCK_TOKENS, PassSize, Workspace
from kernels.device import Device
from kernels.ops.attention_sm90 import Tensors
from kernels.ops.block_mean import block_mean
from kernels.ops.block_score import block_score, most_blocks
from kernels.ops.block_select import MAX_BLOCKS, block_select
from kernels.ops.sparse_attention import attention_on
from modelfile.hparams import ModelShape

BF16 = 2  # bytes


def most_sparse_rows(arch: str, head_dim: int) -> int:
    """Tokens of the longest sequence whose blocks a GPU can score and select."""
    return BLOCK_TOKENS * min(most_blocks(arch, head_dim), MAX_BLOCKS)


class CudaAttention:
    """The attention of one pass.

    Args:
        workspace: prepared for a pass of `size`.
        config: what the request asks for.
        lists: of the pass; they say where the selection writes and what attention reads.
    """

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        workspace: Workspace,
        size: PassSize,
        config: AttentionConfig,
        lists: PassLists,
    ) -> None:
        self._device, self._shape, self._size, self._lists = device, shape, size, lists
        self._at = workspace.at
        self._scale = 1.0 / math.sqrt(shape.head_dim)
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._stride = q_width + 2 * kv_width
        self._q = workspace.at("qkv")
        self._k = self._q + BF16 * q_width
        self._v = self._k + BF16 * kv_width
        correct = size.sparse and config.mean_correction
        tensors = Tensors(
            q=self._q,
            k=self._k,
            v=self._v,
            row_stride=self._stride,
            k_mean=workspace.at("k_mean") if correct else 0,
            v_mean=workspace.at("v_mean") if correct else 0,
            num_tokens=size.num_rows,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        self._attention = attention_on(
            device,
            tensors,
            scratch=workspace.at("attention_scratch"),
            full_tiles=config.last_full_blocks,
            scale=self._scale,
        )

    def find(self, index: int) -> None:
        """Choose the blocks of a layer whose queries, keys and values are in place."""
        if not self._size.sparse:
            return
        shape, num_rows = self._shape, self._size.num_rows
        block_mean(
            self._device,
            k=self._k,
            v=self._v,
            row_stride=self._stride,
            k_mean=self._at("k_mean"),
            v_mean=self._at("v_mean"),
            num_tokens=num_rows,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        block_score(
            self._device,
            q=self._q,
            row_stride=self._stride,
            k_mean=self._at("k_mean"),
            mass=self._at("mass"),
            num_tokens=num_rows,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=self._scale,
        )
        indices, counts, cut = self._lists.selected(index)
        block_select(
            self._device,
            mass=self._at("mass"),
            indices=indices,
            counts=counts,
            cut=cut,
            num_heads=shape.heads,
            num_blocks=self._size.num_blocks,
            rule=self._lists.rule,
        )

    def attend(self, index: int) -> None:
        """Attend over the layer's lists; the output replaces the queries."""
        read = self._lists.to_read(index)
        indices, counts = (read.indices, read.counts) if read else (0, 0)
        self._attention.launch(indices=indices, counts=counts)
