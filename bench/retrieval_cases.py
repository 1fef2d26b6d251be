"""The cells of the retrieval table, and the prompts that fill them.

A case is one prompt as the target would receive it from the gateway: chat template around document
and question, control ranges, the range that asks, and the bytes that must survive. Used by
`bench.retrieval` in its scoring workers and in its answering parent alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.ruler import RulerSample, RulerSpec, build_sample
from bench.wordings import NO_SHARED_WORD
from modelfile.chat_template import ChatTemplate
from modelfile.gguf_file import GgufFile
from modelfile.tokenizer import Tokenizer
from skim.errors import PreconditionFailed
from skim.spans import Span

FORCED_HEAD_TOKENS = 64  # needles stay out of what is kept anyway: the first chunk and its template
FORCED_TAIL_TOKENS = (
    480  # the last 256 tokens of the question's turn, the last chunks, the question
)


@dataclass(frozen=True)
class Cell:
    """One row's input: a task at a size, with the question below or above the document."""

    size: int
    task: str
    question_above: bool

    @property
    def name(self) -> str:
        """Task as printed."""
        return f"{self.task}, question above" if self.question_above else self.task


@dataclass(frozen=True)
class Case:
    """One prompt. Ranges are bytes of `prompt`."""

    prompt: bytes
    control: tuple[Span, ...]
    query: Span
    gold: tuple[Span, ...]
    sample: RulerSample


def open_target(path: Path) -> tuple[Tokenizer, list[str]]:
    """Open a target's tokenizer, and its template's text around one user message."""
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        template = ChatTemplate.from_gguf(file, tokenizer)
    if template is None:
        raise PreconditionFailed(f"{path.name} has no chat template", reason="NO_CHAT_TEMPLATE")
    return tokenizer, list(template.render_streamable(["user"]))


def build_case(cell: Cell, seed: int, tokenizer: Tokenizer, pieces: list[str]) -> Case:
    """Build the seeded prompt of a cell.

    Args:
        tokenizer: of the target; sizes count in its tokens, template included.
        pieces: the chat template's text before and after the one user message.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode(text.encode()).ids)

    before, after = (piece.encode() for piece in pieces)
    spec = RulerSpec(
        task=cell.task,
        haystack="prose",
        wording=NO_SHARED_WORD[seed % len(NO_SHARED_WORD)],
        question_above=cell.question_above,
        depth_range=(FORCED_HEAD_TOKENS / cell.size, 1 - FORCED_TAIL_TOKENS / cell.size),
    )
    sample = build_sample(spec, cell.size, count, seed, reserve_tokens=16)
    content = sample.content.encode()
    shift, end = len(before), len(before) + len(content)
    return Case(
        prompt=before + content + after,
        control=(Span(0, shift), Span(end, end + len(after))),
        query=Span(sample.query[0] + shift, sample.query[1] + shift),
        gold=tuple(Span(a + shift, b + shift) for a, b in sample.gold),
        sample=sample,
    )


def gold_kept(case: Case, spans: list[Span]) -> bool:
    """Tell whether every gold byte lies in a kept span."""
    return all(any(s.begin <= g.begin and g.end <= s.end for s in spans) for g in case.gold)
