"""How long each kernel that moves data takes, at the sizes of a scoring pass: what its header says.

    python -m bench.kernels --tokens 131072

One layer of Qwen3-0.6B's shape (hidden 1,024, 16 heads, 8 KV heads of 128, feed-forward 3,072).
GB/s counts what a kernel must read and write, scratch included; near the memory's own rate
there is nothing left to gain. Medians by events. Attention and its block lists: `bench.attention`.
The last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu_options import aligned, commit, open_cuda
from kernels.device import Device
from kernels.ops.chunk_reduce import chunk_reduce
from kernels.ops.dequant import DEQUANT_TYPES, dequant
from kernels.ops.embed import embed
from kernels.ops.qk_norm_rope import frequency_turns, qk_norm_rope
from kernels.ops.rmsnorm import rmsnorm
from kernels.ops.silu_mul import silu_mul
from kernels.ops.tail_score import scratch_bytes, tail_score

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 1024, 16, 8, 128, 3072
QUERIES, CHUNK_TOKENS, POOL = 9, 32, 13
BF16, FLOAT = 2, 4  # bytes


class Case:
    """The device memory of one run, and the kernels over it: name to (launch, bytes moved)."""

    def __init__(self, device: Device, num_tokens: int, vocab_size: int, stack: ExitStack) -> None:
        self._device, self._n, self._vocab, self._stack = device, num_tokens, vocab_size, stack
        self.work: dict[str, tuple[Callable[[], None], int]] = {}
        self._rows()
        self._heads()
        self._scores()
        self._dequantise()

    def _take(self, num_bytes: int) -> int:
        memory = self._device.allocate(num_bytes)
        self._stack.callback(memory.close)
        self._device.fill(memory.address, num_bytes, 0x3C)  # 0x3c3c is 0.0115 as bf16
        return memory.address

    def _put(self, array: NDArray[Any]) -> int:
        address = self._take(array.nbytes)
        self._device.upload(address, array)
        return address

    def _rows(self) -> None:
        n, device = self._n, self._device
        rng = np.random.default_rng(0)
        table = self._take(self._vocab * HIDDEN * BF16)
        ids = self._put(rng.integers(0, self._vocab, n).astype(np.int32))
        x, normed = self._take(n * HIDDEN * FLOAT), self._take(n * HIDDEN * BF16)
        weight = self._put(np.ones(HIDDEN, np.float32))
        gate_up = self._take(n * 2 * FFN * BF16)
        self.work["embed"] = (
            lambda: embed(
                device,
                table=table,
                ids=ids,
                out=x,
                num_tokens=n,
                hidden=HIDDEN,
                vocab_size=self._vocab,
            ),
            n * HIDDEN * (BF16 + FLOAT),
        )
        self.work["rmsnorm"] = (
            lambda: rmsnorm(
                device,
                x=x,
                weight=weight,
                out=normed,
                num_rows=n,
                hidden=HIDDEN,
                epsilon=1e-6,
            ),
            n * HIDDEN * (FLOAT + BF16),
        )
        self.work["silu_mul"] = (
            lambda: silu_mul(device, gate_up=gate_up, num_rows=n, ffn=FFN),
            n * 3 * FFN * BF16,
        )

    def _heads(self) -> None:
        n, device = self._n, self._device
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self._qkv, self._width = self._take(n * width * BF16), width
        frequencies = 1e6 ** (-np.arange(HEAD_DIM // 2, dtype=np.float64) / (HEAD_DIM // 2))
        turns = self._put(frequency_turns(frequencies))
        norm = self._put(np.ones(HEAD_DIM, np.float32))
        self.work["qk_norm_rope"] = (
            lambda: qk_norm_rope(
                device,
                qkv=self._qkv,
                row_stride=width,
                num_rows=n,
                head_dim=HEAD_DIM,
                num_q=HEADS,
                num_k=KV_HEADS,
                num_v=KV_HEADS,
                turns=turns,
                magnitude=1.0,
                q_norm=norm,
                k_norm=norm,
                epsilon=1e-6,
            ),
            n * (HEADS + KV_HEADS) * HEAD_DIM * BF16 * 2,
        )

    def _scores(self) -> None:
        n, device = self._n, self._device
        positions = self._put(np.arange(n - QUERIES, n, dtype=np.int32))
        running_max = self._take(QUERIES * n * FLOAT)
        chunks = -(-n // CHUNK_TOKENS)
        panel, out = self._take(QUERIES * chunks * FLOAT), self._take(chunks * FLOAT)
        scratch = self._take(scratch_bytes(num_heads=HEADS, num_queries=QUERIES, num_prompt=n))
        self.work["tail_score"] = (
            lambda: tail_score(
                device,
                q=self._qkv,
                q_row_stride=self._width,
                q_rows=positions,
                k=self._qkv + HEADS * HEAD_DIM * BF16,
                k_row_stride=self._width,
                positions=positions,
                running_max=running_max,
                panel=panel,
                scratch=scratch,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                num_queries=QUERIES,
                num_prompt=n,
                chunk_tokens=CHUNK_TOKENS,
                pool_kernel=POOL,
                scale=HEAD_DIM**-0.5,
            ),
            n * (KV_HEADS * HEAD_DIM * BF16 + 3 * HEADS * QUERIES * FLOAT + 2 * QUERIES * FLOAT),
        )
        self.work["chunk_reduce"] = (
            lambda: chunk_reduce(
                device,
                running_max=running_max,
                out=out,
                num_queries=QUERIES,
                num_prompt=n,
                chunk_tokens=CHUNK_TOKENS,
            ),
            QUERIES * n * FLOAT,
        )

    def _dequantise(self) -> None:
        values = self._vocab * HIDDEN
        target = self._take(values * BF16)
        source = self._take(values * FLOAT)
        for name, kind in DEQUANT_TYPES.items():
            read = values // kind.values * kind.num_bytes
            self.work[f"dequant {name}"] = (
                partial(dequant, self._device, name, source, target, values),
                read + values * BF16,
            )


def measure(
    device: Device, num_tokens: int, vocab_size: int, launches: int
) -> list[dict[str, Any]]:
    """Time every kernel, two launches to warm up first."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for name, (launch, moved) in Case(device, num_tokens, vocab_size, stack).work.items():
            marks = [device.record()]
            for _ in range(launches + 2):
                launch()
                marks.append(device.record())
            times = [end.seconds_since(begin) for begin, end in pairwise(marks[2:])]
            seconds = statistics.median(times)
            rows.append(
                {
                    "kernel": name,
                    "seconds": seconds,
                    "fastest_s": min(times),
                    "bytes": moved,
                    "gb_per_s": moved / seconds * 1e-9,
                }
            )
    return rows


def main(
    arguments: Sequence[str] | None = None, open_device: Callable[[], Device] = open_cuda
) -> int:
    """Measure, print the table, then one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--launches", type=int, default=20)
    options = parser.parse_args(arguments)
    if options.tokens < QUERIES or min(options.vocab_size, options.launches) < 1:
        parser.error(f"at least {QUERIES} tokens, one entry and one launch")
    device = open_device()
    try:
        rows = measure(device, options.tokens, options.vocab_size, options.launches)
        gpu = f"{device.name}, {device.arch}"
    finally:
        device.close()
    lines = [["kernel", "ms", "GB/s"]]
    lines += [
        [row["kernel"], f"{row['seconds'] * 1e3:.3f}", f"{row['gb_per_s']:.0f}"] for row in rows
    ]
    print("\n".join([f"{gpu}, {options.tokens:,} tokens, medians", *aligned(lines)]))
    summary = {
        "bench": "kernels",
        "gpu": gpu,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "tokens": options.tokens,
        "launches": options.launches,
        "rows": rows,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
