"""Plain llama.cpp: how long from a prompt's ids to the first token, whole prompt, no services.

    python -m bench.vanilla MODEL --tokens 131072,65536 --repeats 2

The baseline of `bench.ttft`: the binding's low-level calls, flash attention, batch and ubatch of
2,048, every layer on the GPU where there is one. Ids are handed over ready (no upload, no
tokenising: what it leaves out favours it) and the clock stops at the first token's argmax. One
unmeasured chunk warms it up. One JSON line a run, as it ends, and one about the context before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu_options import integers
from target_svc.llama.context import KV_TYPES
from target_svc.llama.library import Library
from target_svc.llama.model import Model
from target_svc.messages import KvType

WARM_TOKENS = 4_096
SPARE_CELLS = 256


class Vanilla:
    """A model and one context of `cells` cells, used as an example program of llama.cpp would."""

    def __init__(self, path: str, *, cells: int, kv_type: KvType, ubatch: int) -> None:
        library = Library()
        self._api: Any = library.api
        begin_s = time.monotonic()
        self.model = Model(library, path, -1)
        self.load_s = time.monotonic() - begin_s
        self._ubatch = ubatch
        params = self._api.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = ubatch
        params.n_outputs_max = 1  # only the last token's row is read
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.flash_attn_type = 1
        params.type_k = params.type_v = KV_TYPES[kv_type]
        self._context = self._api.llama_init_from_model(self.model.handle, params)
        if not self._context:
            said = library.take_errors() or "no reason given"
            raise RuntimeError(f"llama.cpp cannot create a context of {cells} cells: {said}")

    def first_token(self, ids: NDArray[np.int32]) -> tuple[float, int]:
        """Prefill int32 [n] from nothing; gives the seconds and the likeliest next token."""
        api, context = self._api, self._context
        api.llama_memory_clear(api.llama_get_memory(context), True)
        api.llama_synchronize(context)
        kind = ctypes.POINTER(api.llama_token)
        begin_s = time.perf_counter()
        for begin in range(0, ids.size, self._ubatch):
            chunk = np.ascontiguousarray(ids[begin : begin + self._ubatch])
            batch = api.llama_batch_get_one(chunk.ctypes.data_as(kind), chunk.size)
            if code := api.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode failed with code {code} at token {begin}")
        api.llama_synchronize(context)
        row = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (self.model.n_vocab,))
        token = int(row.argmax())
        return time.perf_counter() - begin_s, token

    def close(self) -> None:
        """Free everything."""
        self._api.llama_free(self._context)
        self.model.close()


def main(arguments: list[str] | None = None) -> int:
    """Run every length as often as asked; each in turn, the first ones first."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vanilla",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--tokens", type=integers, required=True)
    add("--repeats", type=integers, default=[2], help="of each length; one number for all")
    add("--ids", type=Path, help="npz with an array for each length; default: drawn, seed 0")
    add("--kv-type", choices=sorted(KV_TYPES), default="f16")
    add("--ubatch", type=int, default=2_048)
    options = parser.parse_args(arguments)
    repeats = options.repeats * (len(options.tokens) if len(options.repeats) == 1 else 1)
    vanilla = Vanilla(
        str(options.model),
        cells=max(options.tokens) + SPARE_CELLS,
        kv_type=options.kv_type,
        ubatch=options.ubatch,
    )
    _say(kind="vanilla_context", load_s=vanilla.load_s, gpu=vanilla.model.gpu)
    given = np.load(options.ids) if options.ids else {}
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, vanilla.model.n_vocab, max(options.tokens)).astype(np.int32)
    vanilla.first_token(drawn[: min(WARM_TOKENS, drawn.size)])
    for num_tokens, times in zip(options.tokens, repeats, strict=True):
        ids = given[str(num_tokens)] if options.ids else drawn[:num_tokens]
        for _ in range(times):
            seconds, token = vanilla.first_token(ids)
            _say(kind="vanilla", tokens=num_tokens, ttft_s=seconds, first_token=token)
    vanilla.close()
    return 0


def _say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main())
