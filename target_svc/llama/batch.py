"""A llama_batch over NumPy arrays, filled without one ctypes call a token.

Used by `context.py` alone. A token belongs to one sequence. Refuses nothing: the caller checks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Batch:
    """Arrays of `capacity` tokens and the C struct that points into them."""

    def __init__(self, api: Any, capacity: int) -> None:
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._sequence_ids = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._sequence_counts = np.ones(capacity, np.int32)
        # llama_batch.seq_id is an array of pointers, one a token, each to that token's ids.
        stride = np.uint64(self._sequence_ids.itemsize)
        base = np.uint64(self._sequence_ids.ctypes.data)
        self._pointers = base + np.arange(capacity, dtype=np.uint64) * stride
        self.struct = api.llama_batch()
        kinds = dict(api.llama_batch._fields_)
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._sequence_counts),
            ("seq_id", self._pointers),
            ("logits", self._outputs),
        ):
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def fill(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequence_ids: NDArray[np.int32] | int,
        outputs: NDArray[np.bool_],
    ) -> None:
        """Copy [n] tokens in; `outputs` marks the rows whose logits are wanted."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequence_ids[:count] = sequence_ids
        self._outputs[:count] = outputs
        self.struct.n_tokens = count
