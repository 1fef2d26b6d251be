"""Which tokens ask: where in the run the scoring queries stand.

The queries are the last 8 tokens of the request's `query` and the prompt's last token. A question
far above the end was read before the document that it asks about, so its own queries cannot look at
the document: a copy of its last 64 tokens then runs after the prompt, and the queries are taken
there. The copy's keys are never scored, and no token of the prompt sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUERY_TOKENS = 8
COPIED_TOKENS = 64
# A question this near to the end has read the document; past it the copy is worth its 64 tokens.
NEAR_END_TOKENS = 1024


@dataclass(frozen=True)
class QueryPlan:
    """Where the queries stand.

    Attributes:
        positions: int64 [num_queries], ascending, in the run: the prompt, then the copy.
        copied: token range of the prompt that runs again after it, or None.
    """

    positions: NDArray[np.int64]
    copied: tuple[int, int] | None

    @property
    def copied_tokens(self) -> int:
        """Tokens that run after the prompt."""
        return 0 if self.copied is None else self.copied[1] - self.copied[0]


def plan_queries(
    num_tokens: int, query_tokens: tuple[int, int] | None, last_token_query: bool
) -> QueryPlan:
    """Place the queries of a prompt.

    Args:
        query_tokens: half-open, within [0, num_tokens), not empty; None: the prompt's end asks.
        last_token_query: the prompt's last token asks too.
    """
    begin, end = query_tokens or (0, num_tokens)
    copied = None
    if num_tokens - end > NEAR_END_TOKENS:
        copied = (max(begin, end - COPIED_TOKENS), end)
        begin, end = num_tokens, num_tokens + copied[1] - copied[0]
    positions = set(range(max(begin, end - QUERY_TOKENS), end))
    if last_token_query:
        positions.add(num_tokens - 1)
    return QueryPlan(np.array(sorted(positions), dtype=np.int64), copied)
