"""The drafter's forward pass on a GPU: what is queued for each layer, and in which order.

Layer-streaming like `cpu_forward`: the whole sequence goes through one layer, then the next, and
only one layer's queries, keys and values exist. Wide activations (normed rows, the feed-forward's
two halves) exist for a chunk of rows at a time. Nothing here waits for the GPU but `pause`.

The residual is float32, everything that enters a matrix product or the attention is bf16. Queries,
keys and values of a token stand side by side in one row of `qkv`; positions turn them in place, and
the attention writes its output over the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from drafter_svc.cuda_attention import CudaAttention
from drafter_svc.cuda_marks import StageMarks
from drafter_svc.cuda_scoring import CudaScoring
from drafter_svc.cuda_weights import CudaWeights
from drafter_svc.cuda_workspace import PassSize, Workspace
from kernels.device import Device
from kernels.ops.embed import embed
from kernels.ops.qk_norm_rope import frequency_turns, qk_norm_rope
from kernels.ops.rmsnorm import rmsnorm
from kernels.ops.silu_mul import silu_mul
from kernels.reference import RopeScaling
from kernels.reference.rope import rope_frequencies

F32, BF16 = 4, 2  # bytes


class CudaForward:
    """One pass over one sequence.

    Args:
        workspace: prepared for a pass of `size`.
        scaling: how positions past the trained context are mapped back into it.
        marks: told at the end of each stage.
        pause: called inside a layer, around its attention and between chunks of rows; may hold
            the host up.
    """

    def __init__(
        self,
        device: Device,
        weights: CudaWeights,
        workspace: Workspace,
        size: PassSize,
        scaling: RopeScaling,
        marks: StageMarks,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._device, self._weights, self._size, self._marks = device, weights, size, marks
        self._pause = pause
        self._at = workspace.at
        shape = self._shape = weights.shape
        self._q_width = shape.heads * shape.head_dim
        self._kv_width = shape.kv_heads * shape.head_dim
        self._stride = self._q_width + 2 * self._kv_width  # elements of a row of `qkv`
        self._x, self._qkv = workspace.at("x"), workspace.at("qkv")
        self._keys = self._qkv + BF16 * self._q_width
        frequencies, self._magnitude = rope_frequencies(
            shape.head_dim, shape.rope.freq_base, scaling, weights.frequency_divisors
        )
        device.upload(workspace.at("turns"), frequency_turns(frequencies))

    def embed(self, ids: NDArray[np.int32]) -> None:
        """Start the residual: the embedding of every token that runs."""
        self._device.upload(self._at("ids"), ids)
        embed(
            self._device,
            table=self._weights.embedding,
            ids=self._at("ids"),
            out=self._x,
            num_tokens=self._size.num_rows,
            hidden=self._shape.embed,
            vocab_size=self._shape.vocab_size,
        )
        self._marks.end("embed")

    def project(self, index: int) -> None:
        """Fill `qkv` with every token's queries, keys and values of a layer."""
        shape, layer = self._shape, self._weights.layers[index]
        for begin, rows in self._chunks(self._size.num_rows):
            self._norm(layer.attention_norm, begin, rows)
            out = self._qkv + BF16 * begin * self._stride
            self._product(self._at("normed"), layer.qkv, out, rows, self._stride, shape.embed)
            self._turn(
                out, rows, index, shape.heads, shape.kv_heads, shape.kv_heads, first_position=begin
            )
        self._marks.end("project")

    def project_last(self, index: int) -> None:
        """Of the last scored layer: the prompt's keys into `qkv`, the asking queries beside it."""
        shape, layer = self._shape, self._weights.layers[index]
        key_rows = layer.qkv + BF16 * self._q_width * shape.embed
        for begin, rows in self._chunks(self._size.num_tokens):
            self._norm(layer.attention_norm, begin, rows)
            out = self._keys + BF16 * begin * self._stride
            self._product(self._at("normed"), key_rows, out, rows, self._kv_width, shape.embed)
            self._turn(out, rows, index, 0, shape.kv_heads, 0, first_position=begin)
        num_queries, queries = self._size.num_queries, self._at("queries")
        self._norm(layer.attention_norm, 0, num_queries, rows_of=self._at("positions"))
        self._product(
            self._at("normed"),
            layer.qkv,
            queries,
            num_queries,
            self._q_width,
            shape.embed,
            out_stride=self._q_width,
        )
        self._turn(
            queries,
            num_queries,
            index,
            shape.heads,
            0,
            0,
            positions=self._at("positions"),
            row_stride=self._q_width,
        )
        self._marks.end("project")

    def score(self, scoring: CudaScoring, *, last: bool) -> None:
        """Add what the asking queries of the projected layer look at."""
        if last:
            scoring.add_layer(
                self._at("queries"), self._q_width, self._at("query_rows"), self._keys, self._stride
            )
        else:
            scoring.add_layer(
                self._qkv, self._stride, self._at("positions"), self._keys, self._stride
            )
        self._marks.end("score")

    def finish(self, index: int, attention: CudaAttention) -> None:
        """Attend, and add the attention's output and the feed-forward to the residual."""
        attention.find(index)
        self._marks.end("find")
        self._pause()
        attention.attend(index)
        self._marks.end("attend")
        self._pause()
        shape, layer = self._shape, self._weights.layers[index]
        self._device.gemm(
            x=self._qkv,
            w=layer.attention_output,
            y=self._x,
            m=self._size.num_rows,
            n=shape.embed,
            k=self._q_width,
            ldx=self._stride,
            ldy=shape.embed,
            accumulate_f32=True,
        )
        gate_up = self._at("gate_up")
        for begin, rows in self._chunks(self._size.num_rows):
            self._norm(layer.mlp_norm, begin, rows)
            self._product(
                self._at("normed"),
                layer.gate_up,
                gate_up,
                rows,
                2 * shape.ffn,
                shape.embed,
                out_stride=2 * shape.ffn,
            )
            silu_mul(self._device, gate_up=gate_up, num_rows=rows, ffn=shape.ffn)
            self._device.gemm(
                x=gate_up,
                w=layer.down,
                y=self._x + F32 * begin * shape.embed,
                m=rows,
                n=shape.embed,
                k=shape.ffn,
                ldx=2 * shape.ffn,
                ldy=shape.embed,
                accumulate_f32=True,
            )
        self._marks.end("mlp")

    def _chunks(self, num_rows: int) -> Iterator[tuple[int, int]]:
        step = self._size.chunk_rows
        for begin in range(0, num_rows, step):
            if begin:
                self._pause()
            yield begin, min(step, num_rows - begin)

    def _norm(self, weight: int, begin: int, rows: int, *, rows_of: int = 0) -> None:
        rmsnorm(
            self._device,
            x=self._x + F32 * begin * self._shape.embed,
            weight=weight,
            out=self._at("normed"),
            num_rows=rows,
            hidden=self._shape.embed,
            epsilon=self._shape.rms_eps,
            rows=rows_of,
        )

    def _product(
        self, x: int, w: int, y: int, m: int, n: int, k: int, *, out_stride: int = 0
    ) -> None:
        """Y = X W^T in bf16; rows of Y are those of `qkv` unless a stride is given."""
        stride = out_stride or self._stride
        self._device.gemm(x=x, w=w, y=y, m=m, n=n, k=k, ldx=k, ldy=stride)

    def _turn(
        self,
        heads: int,
        rows: int,
        index: int,
        num_q: int,
        num_k: int,
        num_v: int,
        *,
        first_position: int = 0,
        positions: int = 0,
        row_stride: int = 0,
    ) -> None:
        """Add the bias, normalise and rotate the heads of some rows, in place."""
        layer, head_dim = self._weights.layers[index], self._shape.head_dim
        bias = layer.qkv_bias
        if bias and not num_q:  # keys alone: their part of the bias
            bias += F32 * self._q_width
        qk_norm_rope(
            self._device,
            qkv=heads,
            row_stride=row_stride or self._stride,
            num_rows=rows,
            head_dim=head_dim,
            num_q=num_q,
            num_k=num_k,
            num_v=num_v,
            turns=self._at("turns"),
            magnitude=self._magnitude,
            first_position=first_position,
            positions=positions,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            bias=bias,
            epsilon=self._shape.rms_eps,
        )
