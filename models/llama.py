"""Run a GGUF through llama.cpp for the checks: logits of a token sequence, nothing else.

Used by `models.checks` and the tests only; the product's engine lives in target_svc/llama. CPU.
"""

import ctypes
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    return None


class LlamaModel:
    """A loaded model with one context; use it in a `with` block."""

    def __init__(
        self, path: Path, tokens: int, exact: bool = False, ubatch: int = 512, threads: int = 2
    ) -> None:
        """Load `path` for up to `tokens` tokens; `exact`: flash attention off, float32 KV."""
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, ubatch, ubatch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0 if exact else 1
        kind = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
        params.type_k = params.type_v = kind
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._ubatch = ubatch
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokenise(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`; no beginning token is added."""
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), ids, room, False, parse_special
        )
        return list(ids[:count])

    def logits(self, ids: list[int], wanted: int) -> Logits:
        """Return the last `wanted` positions' logits, [wanted, vocabulary], from an empty cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        first = len(ids) - wanted
        rows: list[Logits] = []
        for begin in range(0, len(ids), self._ubatch):
            part = ids[begin : begin + self._ubatch]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, begin + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = begin + i >= first
            code = llama_cpp.llama_decode(self._context, batch)
            llama_cpp.llama_batch_free(batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code}")
            for i in range(max(0, first - begin), len(part)):
                row = llama_cpp.llama_get_logits_ith(self._context, i)
                rows.append(np.ctypeslib.as_array(row, (self.vocabulary,)).copy())
        return np.stack(rows)
