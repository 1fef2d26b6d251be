"""Batches for the trainer, made ahead of the GPU by worker processes.

A batch is one stage's shape: ids, loss codes, and the question rows with their gold ranges
(padded to the longest list in the batch). Workers are forked after the filler was tokenised, so
they share it.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.training.pool import Pools
from models.training.samples import QUERY_ROWS, Assembler, Mix


@dataclass(frozen=True)
class Stage:
    """One part of the run: sequence length, share of the time, and how hard its samples are."""

    tokens: int
    share: float
    mix: Mix
    whole: float
    filler_weight: float

    def batch(self, tokens_per_batch: int) -> int:
        """Return the rows of one batch."""
        return max(1, tokens_per_batch // self.tokens)


@dataclass(frozen=True)
class Batch:
    """ids and codes [rows, tokens]; asking [questions, 1 + QUERY_ROWS]: row, then positions or -1;
    gold [questions, 2]: the needle's [begin, end) in that row."""

    ids: Tensor
    codes: Tensor
    asking: Tensor
    gold: Tensor


class Batches(IterableDataset[Batch]):
    """An endless stream of batches of one stage."""

    def __init__(
        self, tokenizer: Tokenizer, pools: Pools, stage: Stage, tokens_per_batch: int, seed: int
    ) -> None:
        self._tokenizer, self._pools, self._stage = tokenizer, pools, stage
        self._rows, self._seed = stage.batch(tokens_per_batch), seed

    def __iter__(self) -> Iterator[Batch]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        info = get_worker_info()
        rng = random.Random(f"{self._seed}/{self._stage.tokens}/{info.id if info else 0}")
        assembler = Assembler(self._tokenizer, self._pools, rng)
        while True:
            yield self._batch(assembler)

    def _batch(self, assembler: Assembler) -> Batch:
        stage = self._stage
        rows = [assembler.row(stage.tokens, stage.mix, stage.whole) for _ in range(self._rows)]
        asking = [[i, *positions] for i, row in enumerate(rows) for positions in row.rows]
        gold = [span for row in rows for span in row.gold]
        return Batch(
            torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int32)),
            torch.from_numpy(np.stack([row.codes for row in rows])),
            torch.tensor(asking, dtype=torch.int32).reshape(-1, 1 + QUERY_ROWS),
            torch.tensor(gold, dtype=torch.int32).reshape(-1, 2),
        )


def batch_loader(dataset: Batches, workers: int) -> Iterator[Batch]:
    """Return an iterator that workers keep filled (six batches each)."""
    options = {"prefetch_factor": 6} if workers else {}
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))
