"""`skim demo`: a needle in a long document, asked twice: skimmed, and read whole.

Starts its own three services with the bundled pair, builds a document from the standard library's
docstrings, hides a number in it outside the ranges that are always kept, warms both paths up, asks
both ways and shows them side by side. Times are taken at the client's socket: from the first byte
sent to the first token received.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text as RichText

from skim.cli.ask import STRIP_CELLS, client_timings, kept_ratio, show_strip, summary
from skim.cli.bars import StageBars
from skim.cli.gateway import gather, local_gateway
from skim.cli.output import EXIT_FAILED, Output
from skim.cli.stack_plan import StackOptions
from skim.cli.tables import timing_table
from skim.client import Client
from skim.client_types import Answer, ModeName, Options, Progress
from skim.demo_document import DemoDocument, build_demo
from skim.errors import InvalidRequest

# Below 4,096 tokens a tenth of the document, where the needle may lie, reaches the forced ranges
# (its first 32 and last 256 tokens).
MIN_TOKENS, MAX_TOKENS = 4_096, 1_048_576
WARM_UP_TOKENS = 2_048
# Room for the chat template's own tokens and the lines between document and question.
TEMPLATE_TOKENS = 16
ANSWER_TOKENS = 32
MODES: tuple[ModeName, ...] = ("skim", "full")
TITLES = {"skim": "skim", "full": "full prefill"}
SHOWN_ANSWER_CHARS = 24
# Kept by default. Short documents need more: the ranges that are always kept are 288 tokens.
KEEP_RATIO, SHORT_KEEP_RATIO, SHORT_TOKENS = 0.05, 0.1, 8_192


@dataclass(frozen=True)
class DemoOptions:
    """What to show.

    Attributes:
        tokens: of the prompt, template included.
        keep: fraction of it that is kept; None: by its length.
        seed: of key, number and place.
        scorer: None: the drafter's default.
    """

    tokens: int = 16_384
    keep: float | None = None
    seed: int = 0
    scorer: str | None = None

    @property
    def keep_ratio(self) -> float:
        """Fraction that is kept."""
        if self.keep is not None:
            return self.keep
        return KEEP_RATIO if self.tokens >= SHORT_TOKENS else SHORT_KEEP_RATIO


def run_demo(output: Output, options: DemoOptions, stack: StackOptions) -> int:
    """Run both ways and show them; exit code 1 when the skimmed answer is wrong."""
    if not MIN_TOKENS <= options.tokens <= MAX_TOKENS:
        raise InvalidRequest.field_value(
            "tokens", options.tokens, f"{MIN_TOKENS:,} to {MAX_TOKENS:,}"
        )
    # The full prefill that skimming is compared with runs at its fastest: its chunks never shrink.
    fastest = {"SKIM_TARGET_DEAF_MAX_S": "0", **stack.environment}
    stack = replace(stack, environment=fastest)
    with local_gateway(output, stack) as (address, _), Client(address) as client:
        _warm_up(output, client, options)
        demo = _build(client, options.tokens, options.seed)
        _introduce(output, demo)
        answers = {mode: _ask(output, client, demo, mode, options) for mode in MODES}
    _show(output, demo, answers)
    result = demo_object(options, demo, answers)
    output.json_line(result)
    return 0 if result["correct"] else EXIT_FAILED


def _build(client: Client, tokens: int, seed: int) -> DemoDocument:
    return build_demo(tokens - TEMPLATE_TOKENS, client.count_tokens, seed)


def _warm_up(output: Output, client: Client, options: DemoOptions) -> None:
    demo = _build(client, WARM_UP_TOKENS, options.seed)
    for mode in MODES:
        _ask(output, client, demo, mode, options)


def _ask(
    output: Output, client: Client, demo: DemoDocument, mode: ModeName, options: DemoOptions
) -> Answer:
    asked: Options = {
        "mode": mode,
        "keep_ratio": options.keep_ratio,
        "max_tokens": ANSWER_TOKENS,
        "want_spans": True,
    }
    if options.scorer:
        asked["scorer"] = options.scorer
    with StageBars(output.console, shown=output.lively) as bars:

        def on_event(event: object) -> None:
            if isinstance(event, Progress):
                bars.update(event.stage, event.done, event.total)

        with client.ask(demo.question, demo.text, stream=True, **asked) as stream:
            return gather(stream, on_event)


def _introduce(output: Output, demo: DemoDocument) -> None:
    console, size = output.console, len(demo.text.encode())
    needle = demo.text.encode()[demo.needle_begin : demo.needle_end].decode()
    console.print(f"A document of {size:,} bytes: docstrings of Python's standard library.")
    for line in (f"Hidden at {demo.needle_begin / size:.0%} of it: {needle}", demo.question, ""):
        console.print(line, markup=False, soft_wrap=True)


def _show(output: Output, demo: DemoDocument, answers: dict[ModeName, Answer]) -> None:
    console, size = output.console, len(demo.text.encode())
    usages = [answer.finish.usage for answer in answers.values()]
    above: list[list[RenderableType]] = [
        ["answer", *(_said(demo, answer) for answer in answers.values())],
        ["tokens prefilled", *(f"{u.kept_tokens:,} of {u.prompt_tokens:,}" for u in usages)],
    ]
    times = {TITLES[mode]: client_timings(answer) for mode, answer in answers.items()}
    console.print(timing_table(times, above))
    console.print(f"\nSpeedup to the first token: {speedup(answers):.1f} times\n", style="bold")
    show_strip(output, answers["skim"].plan, size)
    cells = min(STRIP_CELLS, console.width)
    console.print(" " * (demo.needle_begin * cells // size) + "^ the needle")
    for answer in answers.values():
        console.print(summary(answer), markup=False, soft_wrap=True)
        if answer.plan.detail:
            console.print(answer.plan.detail, style="yellow", markup=False, soft_wrap=True)
    layers = ", ".join(f"{density:.3f}" for density in answers["skim"].plan.layer_density)
    console.print(f"density of the drafter's attention by layer: {layers}", soft_wrap=True)


def _said(demo: DemoDocument, answer: Answer) -> RichText:
    said = " ".join(answer.text.split()) or "(nothing)"
    if len(said) > SHOWN_ANSWER_CHARS:
        said = said[:SHOWN_ANSWER_CHARS] + "…"
    right = is_correct(demo, answer)
    verdict = ("right", "green") if right else ("wrong", "red")
    return RichText.assemble(said, " ", verdict)


def is_correct(demo: DemoDocument, answer: Answer) -> bool:
    """Whether the hidden number stands in the answer."""
    return demo.answer in answer.text


def speedup(answers: dict[ModeName, Answer]) -> float:
    """Time to the first token of the full prefill over that of the skimmed run."""
    return answers["full"].finish.ttft_s / max(1e-9, answers["skim"].finish.ttft_s)


def demo_object(
    options: DemoOptions, demo: DemoDocument, answers: dict[ModeName, Answer]
) -> dict[str, Any]:
    """What `--json` prints. Counts and answer are the skimmed run's unless they say `full`."""
    skim, full = answers["skim"], answers["full"]
    return {
        "prompt_tokens": skim.finish.usage.prompt_tokens,
        "kept_tokens": skim.finish.usage.kept_tokens,
        "keep_ratio": kept_ratio(skim),
        "coverage": skim.plan.coverage,
        "density": skim.plan.density,
        "layer_density": list(skim.plan.layer_density),
        "answer": skim.text,
        "expected": demo.answer,
        "correct": is_correct(demo, skim),
        "answer_full": full.text,
        "correct_full": is_correct(demo, full),
        "ttft_skim_s": skim.finish.ttft_s,
        "ttft_full_s": full.finish.ttft_s,
        "speedup": round(speedup(answers), 3),
        "keep_ratio_asked": options.keep_ratio,
        "seed": options.seed,
        "needle_depth": round(demo.needle_begin / len(demo.text.encode()), 4),
        "skimmed": skim.plan.skimmed,
        "detail": skim.plan.detail,
        "stages": {mode: client_timings(answer) for mode, answer in answers.items()},
    }
