"""What the scored layers add up to on the GPU: chunk scores and the coverage panel.

The twin of `scorers.tally`: each layer raises a running maximum and adds to its group's panel rows;
at the end only the chunks' means and the panel come to the host. Refuses scores that are not finite
(EngineFault): a selection made of them would be arbitrary.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from drafter_svc.cuda_workspace import PassSize, Workspace
from drafter_svc.scorers.tally import layer_groups
from kernels.device import Device
from kernels.ops.chunk_reduce import chunk_reduce
from kernels.ops.tail_score import tail_score
from modelfile.hparams import ModelShape
from skim.errors import EngineFault


class CudaScoring:
    """The scoring of one pass.

    Args:
        workspace: prepared for a pass of `size`.
        positions: int64 [num_queries], see `attention_rows`.
        num_layers: scored layers that will come.
    """

    def __init__(
        self,
        device: Device,
        shape: ModelShape,
        workspace: Workspace,
        size: PassSize,
        positions: NDArray[np.int64],
        num_layers: int,
        *,
        pool_kernel: int,
    ) -> None:
        self._device, self._shape, self._size = device, shape, size
        self._at, self._plan = workspace.at, workspace.plan
        self._pool_kernel = pool_kernel
        self._groups = layer_groups(num_layers)
        self._added = 0
        device.upload(self._at("positions"), positions.astype(np.int32))
        device.upload(self._at("query_rows"), np.arange(positions.size, dtype=np.int32))
        for name in ("running_max", "panel"):
            device.fill(self._at(name), self._plan.sizes[name])

    def add_layer(self, q: int, q_row_stride: int, q_rows: int, k: int, k_row_stride: int) -> None:
        """Add one layer.

        Args:
            q, k: bf16 rows of the rotated queries and keys, so many elements apart.
            q_rows: int32 [num_queries], the row of `q` of each query.
        """
        size, shape = self._size, self._shape
        group = int(self._groups[self._added])
        tail_score(
            self._device,
            q=q,
            q_row_stride=q_row_stride,
            q_rows=q_rows,
            k=k,
            k_row_stride=k_row_stride,
            positions=self._at("positions"),
            running_max=self._at("running_max"),
            panel=self._at("panel") + 4 * group * size.num_queries * size.num_chunks,
            scratch=self._at("tail_scratch"),
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            num_queries=size.num_queries,
            num_prompt=size.num_tokens,
            chunk_tokens=size.chunk_tokens,
            pool_kernel=self._pool_kernel,
            scale=1.0 / math.sqrt(shape.head_dim),
        )
        self._added += 1

    def reduce(self) -> None:
        """Queue what makes chunk scores of the running maximum."""
        chunk_reduce(
            self._device,
            running_max=self._at("running_max"),
            out=self._at("chunk_scores"),
            num_queries=self._size.num_queries,
            num_prompt=self._size.num_tokens,
            chunk_tokens=self._size.chunk_tokens,
        )

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the pass; give the chunk scores and the panel, as `scorers.tally` does.

        Raises:
            EngineFault: a score is not finite.
        """
        size = self._size
        scores = np.empty(size.num_chunks, dtype=np.float32)
        panel = np.empty((size.num_groups, size.num_queries, size.num_chunks), dtype=np.float32)
        self._device.download(self._at("chunk_scores"), scores)
        self._device.download(self._at("panel"), panel)
        if not np.isfinite(scores).all():
            raise EngineFault("the drafter's attention is not finite", reason="SCORES_NOT_FINITE")
        panel /= np.bincount(self._groups)[:, None, None].astype(np.float32)
        return scores, panel.reshape(-1, size.num_chunks)
