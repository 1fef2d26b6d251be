"""One layer near half depth, and no layer after it: half the cost of `specprefill`."""

from __future__ import annotations


class MidLayer:
    """Reads layer n // 2 alone."""

    name = "mid_layer"

    def scored_layers(self, num_layers: int) -> range:
        """The middle layer; the pass ends with its queries and keys."""
        return range(num_layers // 2, num_layers // 2 + 1)
