"""The strip: one line that shows which parts of a document were kept.

Pure. Each cell stands for an equal share of the document's bytes; its height is the share of those
bytes that lies in kept spans. Blocks and colour on a terminal, plain ASCII elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from skim.spans import Span

BLOCKS = "·▁▂▃▄▅▆▇█"
ASCII = ".:-=+*#%@"
# From cold to hot, as dark terminals and bright ones can both show.
COLOURS = ("grey50", "blue", "cyan", "green", "yellow", "bright_red")


def kept_shares(spans: Sequence[Span], begin: int, end: int, cells: int) -> list[float]:
    """Share of each cell's bytes that is kept.

    Args:
        spans: sorted, disjoint byte ranges.
        begin, end: the byte range that the strip shows.
        cells: how many cells; fewer are returned when the range has fewer bytes.
    Returns:
        Shares in [0, 1], from the start of the range to its end.
    """
    cells = min(cells, end - begin)
    shares = []
    index = 0
    for cell in range(cells):
        low = begin + (end - begin) * cell // cells
        high = begin + (end - begin) * (cell + 1) // cells
        while index < len(spans) and spans[index].end <= low:
            index += 1
        kept, at = 0, index
        while at < len(spans) and spans[at].begin < high:
            kept += min(high, spans[at].end) - max(low, spans[at].begin)
            at += 1
        shares.append(kept / (high - low))
    return shares


def draw(shares: Sequence[float], *, plain: bool) -> Text:
    """The strip as text; any kept byte at all makes a cell visible."""
    marks = ASCII if plain else BLOCKS
    text = Text()
    for share in shares:
        text.append(marks[_level(share, len(marks))], None if plain else _colour(share))
    return text


def _level(share: float, levels: int) -> int:
    return 0 if share <= 0 else max(1, min(levels - 1, round(share * (levels - 1))))


def _colour(share: float) -> str:
    return COLOURS[_level(share, len(COLOURS))]
