"""The default scorer: what the asking tokens look at, in every layer and head.

Source: SpecPrefill (arXiv:2502.02789). Its queries are the prompt's last token and generated ones;
ours are the last tokens of the question, wherever it stands (see `queries`).
"""

from __future__ import annotations


class SpecPrefill:
    """Reads every layer."""

    name = "specprefill"

    def scored_layers(self, num_layers: int) -> range:
        """All layers."""
        return range(num_layers)
