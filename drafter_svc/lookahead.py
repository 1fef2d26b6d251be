"""Look-ahead: the drafter writes the first words of an answer, and those tokens ask too.

Costs what the ordinary pass avoids: every layer's keys and values are kept, and the vocabulary's
matrix is used once per token. So it is allowed only while they fit the workspace. Generated tokens
see the prompt and each other, never the copied question; an end token ends the look-ahead early.

Source: SpecPrefill (arXiv:2502.02789), look-ahead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from drafter_svc.architecture import DrafterWeights, Matrix
from drafter_svc.backend import ScoreInput
from drafter_svc.cpu_forward import CpuForward
from drafter_svc.layer_math import feed_forward, logits, normed, project, rotate
from drafter_svc.scorers import AttentionScorer
from drafter_svc.scorers.queries import QueryPlan
from drafter_svc.scorers.tally import Tally
from kernels.reference import RopeScaling, attention_rows, rope_tables
from modelfile.hparams import ModelShape
from skim.errors import Cancelled, InvalidRequest


def check_workspace(shape: ModelShape, request: ScoreInput, workspace_bytes: int) -> None:
    """Refuse look-ahead whose keys and values do not fit (InvalidRequest with limit and got)."""
    positions = request.num_tokens + request.lookahead_tokens
    needed = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * positions
    if needed > workspace_bytes:
        raise InvalidRequest(
            f"lookahead_tokens keeps {needed} bytes of keys and values for {positions} tokens, "
            f"and the workspace is {workspace_bytes} bytes: ask with lookahead_tokens 0",
            reason="LOOKAHEAD_TOO_LARGE",
            field="lookahead_tokens",
            metadata={"limit": str(workspace_bytes), "got": str(needed)},
        )


class Lookahead:
    """One pass with look-ahead, over a forward pass that has not run yet."""

    def __init__(
        self,
        weights: DrafterWeights,
        forward: CpuForward,
        scaling: RopeScaling,
        request: ScoreInput,
        plan: QueryPlan,
        stop: threading.Event,
    ) -> None:
        self._weights = weights
        self._forward = forward
        self._request = request
        self._plan = plan
        self._stop = stop
        shape = weights.shape
        positions = request.num_tokens + request.lookahead_tokens
        cache = (shape.layers, shape.kv_heads, positions, shape.head_dim)
        self._keys = np.empty(cache, dtype=np.float32)
        self._values = np.empty(cache, dtype=np.float32)
        self._cosine, self._sine = rope_tables(
            np.arange(request.num_tokens, positions),
            shape.head_dim,
            shape.rope.freq_base,
            scaling,
            weights.frequency_divisors,
        )

    def run(self, scorer: AttentionScorer, progress: Callable[[int, int], None]) -> Tally:
        """Run every layer, generate greedily, and score with all the queries.

        Raises:
            Cancelled: the stop flag was set.
        """
        request, forward = self._request, self._forward
        num_layers, num_tokens = self._weights.shape.layers, request.num_tokens
        queries: list[list[Matrix]] = []
        progress(0, num_layers)
        for index in range(num_layers):
            forward.project_layer(index)
            self._keys[index, :, :num_tokens] = forward.buffers.keys()[:, :num_tokens]
            self._values[index, :, :num_tokens] = forward.buffers.values()[:, :num_tokens]
            queries.append([forward.queries_at(index, self._plan.positions)])
            forward.finish_layer(index)
            progress(index + 1, num_layers)
        started = time.perf_counter()
        generated = self._generate(forward.x[num_tokens - 1], queries)
        forward.stage_s["lookahead"] = time.perf_counter() - started
        scored = scorer.scored_layers(num_layers)
        tally = Tally(
            np.concatenate([self._plan.positions, num_tokens + np.arange(generated)]),
            num_tokens,
            len(scored),
            chunk_tokens=request.chunk_tokens,
            pool_kernel=request.pool_kernel,
        )
        started = time.perf_counter()
        for index in scored:
            rows = np.concatenate(queries[index], axis=1)
            tally.add_layer(rows, self._keys[index, :, :num_tokens])
        forward.stage_s["score"] += time.perf_counter() - started
        return tally

    def _generate(self, last: Matrix, queries: list[list[Matrix]]) -> int:
        """Append each generated token's queries to those of its layer; return how many there are.

        Args:
            last: [embed], the output of the last layer at the prompt's last token.
        """
        x = last[None]
        for step in range(self._request.lookahead_tokens):
            if self._stop.is_set():
                raise Cancelled("the scoring pass was stopped")
            token = int(logits(x, self._weights)[0].argmax())
            if token == self._weights.end_id:
                return step
            x = self._weights.embedding[token][None].copy()
            for index in range(len(queries)):
                queries[index].append(self._step(x, index, step))
        return self._request.lookahead_tokens

    def _step(self, x: Matrix, index: int, step: int) -> Matrix:
        """Take one token [1, embed] through one layer in place; return its queries, scaled."""
        shape, layer = self._weights.shape, self._weights.layers[index]
        turned = shape.heads + shape.kv_heads
        heads = project(normed(x, layer, shape), layer, shape, 0, turned + shape.kv_heads)
        at = slice(step, step + 1)
        rotated = rotate(heads[:, :turned], layer, shape, 0, self._cosine[at], self._sine[at])
        queries = rotated[:, : shape.heads].swapaxes(0, 1) / np.float32(shape.head_dim**0.5)
        position = self._request.num_tokens + step
        self._keys[index, :, position] = rotated[0, shape.heads :]
        self._values[index, :, position] = heads[0, turned:]
        weights = attention_rows(
            queries, self._keys[index, :, : position + 1], np.array([position]), scale=1.0
        )
        values = self._values[index, :, : position + 1]
        grouped = weights.reshape(shape.kv_heads, -1, position + 1)
        feed_forward(x, (grouped @ values).reshape(1, -1), layer, shape)
        return queries
