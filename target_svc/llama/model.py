"""One loaded model file and the facts the service asks about.

Opened once by the engine, before its contexts; closed after them. Refuses a file that llama.cpp
does not take (cut short, corrupt, unknown architecture) with what llama.cpp said about it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from skim.errors import ModelFileError
from target_svc.llama.library import Library
from target_svc.messages import Int32s

ROPE_TYPES = {-1: "none", 0: "norm", 2: "neox", 8: "mrope", 24: "vision", 40: "imrope"}
# llama.cpp lets a sequence's positions jump where a token has several of them (M-RoPE).
GAP_ROPES = ("mrope", "imrope", "vision")


class Model:
    """A llama_model.

    Raises:
        ModelFileError: llama.cpp cannot load the file.
    """

    def __init__(self, library: Library, path: str, gpu_layers: int) -> None:
        api = library.api
        self.library = library
        self.handle: Any = None
        if not Path(path).is_file():
            raise ModelFileError(f"there is no model file at {path}", reason="MODEL_FILE_MISSING")
        params = api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        library.take_errors()
        self.handle = api.llama_model_load_from_file(path.encode(), params)
        if not self.handle:
            said = library.take_errors() or "no reason given"
            raise ModelFileError(f"llama.cpp cannot load {Path(path).name}: {said}")
        self.gpu = library.has_gpu and gpu_layers != 0
        self.vocab = api.llama_model_get_vocab(self.handle)
        self.n_vocab = int(api.llama_vocab_n_tokens(self.vocab))
        self.rope_type = ROPE_TYPES.get(int(api.llama_model_rope_type(self.handle)), "unknown")
        self.allows_gaps = self.rope_type in GAP_ROPES
        self.recurrent = bool(
            api.llama_model_is_recurrent(self.handle) or api.llama_model_is_hybrid(self.handle)
        )
        self.n_ctx_train = int(api.llama_model_n_ctx_train(self.handle))
        self.n_layer = int(api.llama_model_n_layer(self.handle))
        self.n_embd = int(api.llama_model_n_embd(self.handle))
        self.size_bytes = int(api.llama_model_size(self.handle))
        self.parameters = int(api.llama_model_n_params(self.handle))

    @property
    def architecture(self) -> str:
        """`general.architecture` of the file."""
        return self._text(
            lambda buffer, size: self.library.api.llama_model_meta_val_str(
                self.handle, b"general.architecture", buffer, size
            )
        )

    @property
    def description(self) -> str:
        """llama.cpp's own words: architecture, size, quantisation."""
        return self._text(
            lambda buffer, size: self.library.api.llama_model_desc(self.handle, buffer, size)
        )

    def eog_ids(self) -> Int32s:
        """Every token that ends an answer: eos, eot and their kin."""
        is_eog = self.library.api.llama_vocab_is_eog
        return np.array([i for i in range(self.n_vocab) if is_eog(self.vocab, i)], np.int32)

    def close(self) -> None:
        """Free the weights; every context on them must be closed before. Idempotent."""
        if self.handle:
            self.library.api.llama_model_free(self.handle)
            self.handle = None

    @staticmethod
    def _text(read: Any) -> str:
        buffer = ctypes.create_string_buffer(256)
        length = read(buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else ""
