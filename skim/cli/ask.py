"""`skim ask`: one question over a document, the answer as it comes, and what it took.

Below the answer stands a strip that shows which parts of the document were kept, then the table of
timings. With `--json` the last line is one object with all of it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from skim.cli.bars import StageBars
from skim.cli.gateway import GatewayOptions, gather, open_gateway
from skim.cli.output import Output
from skim.cli.strip import draw, kept_shares
from skim.cli.tables import timing_table
from skim.client_types import Answer, Event, Options, Plan, Progress, Text
from skim.errors import InvalidRequest

STRIP_CELLS = 80

# What a full prefill's reason means, in words.
FULL_REASONS = {
    "forced": "as asked",
    "short_prompt": "the prompt is too short for skimming to pay",
    "no_drafter": "no drafter is healthy",
    "drafter_failed": "the drafter failed",
    "drafter_late": "the drafter was late",
    "low_coverage": "the asked coverage was not reached",
    "spans_refused": "the drafter's spans were refused",
}


def run_ask(
    output: Output, gateway: GatewayOptions, question: str, document: str, options: Options
) -> int:
    """Ask, show, return the exit code. Leaving early, by ctrl-C too, cancels the request."""
    if not question.strip():
        raise InvalidRequest.field_value("question", question, "a text")
    asked: Options = {**options, "want_spans": True}
    with open_gateway(output, gateway) as client:
        with client.ask(question, document, stream=True, **asked) as stream:
            with StageBars(output.console, shown=output.lively) as bars:
                answer = gather(stream, lambda event: _show_event(output, bars, event))
    output.console.print()
    _show_rest(output, answer, document)
    output.json_line(answer_object(answer))
    return 0


def _show_event(output: Output, bars: StageBars, event: Event) -> None:
    match event:
        case Progress():
            bars.update(event.stage, event.done, event.total)
        case Text():
            bars.close()
            output.console.print(event.text, end="", markup=False, soft_wrap=True)


def _show_rest(output: Output, answer: Answer, document: str) -> None:
    console = output.console
    console.print()
    show_strip(output, answer.plan, len(document.encode()))
    console.print(summary(answer), markup=False, soft_wrap=True)
    if answer.plan.detail:
        console.print(answer.plan.detail, style="yellow", markup=False, soft_wrap=True)
    console.print()
    console.print(timing_table({"seconds": client_timings(answer)}))


def show_strip(output: Output, plan: Plan, document_bytes: int) -> None:
    """Draw the kept parts of a document that starts at the upload's first byte."""
    if plan.spans is None:
        return
    console = output.console
    cells = min(STRIP_CELLS, console.width)
    plain = console.color_system is None
    console.print(draw(kept_shares(plan.spans, 0, document_bytes, cells), plain=plain))


def client_timings(answer: Answer) -> dict[str, float]:
    """Seconds by stage; first token and total as measured at the client's socket."""
    finish = answer.finish
    return {**asdict(finish.timings), "ttft_s": finish.ttft_s, "total_s": finish.total_s}


def summary(answer: Answer) -> str:
    """One line: how much was read, how it was chosen, how the decoding went."""
    plan, usage = answer.plan, answer.finish.usage
    if plan.skimmed:
        share = usage.kept_tokens / max(1, usage.prompt_tokens)
        facts = [f"kept {usage.kept_tokens:,} of {usage.prompt_tokens:,} tokens ({share:.1%})"]
        if plan.coverage is not None:
            facts.append(f"coverage {plan.coverage:.2f}")
        if plan.density:
            facts.append(f"density {plan.density:.3f}")
        facts.append(f"scorer {plan.scorer}")
    else:
        reason = FULL_REASONS.get(plan.full_reason, plan.full_reason)
        facts = [f"read all {usage.prompt_tokens:,} tokens ({reason})"]
    if plan.degraded:
        facts.append("degraded: a full prefill does not fit")
    if plan.forced_only:
        facts.append("only protected parts fitted the budget")
    decode_s = answer.finish.timings.decode_s
    if usage.completion_tokens > 1 and decode_s > 0:
        rate = (usage.completion_tokens - 1) / decode_s
        facts.append(f"{usage.completion_tokens} tokens out, {rate:.0f} a second")
    return ", ".join(facts)


def answer_object(answer: Answer) -> dict[str, Any]:
    """What `--json` prints of an answer."""
    plan, usage = answer.plan, answer.finish.usage
    return {
        "request_id": answer.admitted.request_id,
        "model": answer.admitted.model,
        "drafter": answer.admitted.drafter,
        "answer": answer.text,
        "finish_reason": answer.finish.reason,
        "skimmed": plan.skimmed,
        "full_reason": plan.full_reason,
        "detail": plan.detail,
        "degraded": plan.degraded,
        "prompt_tokens": usage.prompt_tokens,
        "kept_tokens": usage.kept_tokens,
        "keep_ratio": kept_ratio(answer),
        "coverage": plan.coverage,
        "density": plan.density,
        "layer_density": list(plan.layer_density),
        "scorer": plan.scorer,
        "spans": None if plan.spans is None else [list(span) for span in plan.spans],
        "ttft_s": answer.finish.ttft_s,
        "timings": client_timings(answer),
        "usage": asdict(usage),
        "seed": answer.finish.seed,
    }


def kept_ratio(answer: Answer) -> float:
    """Prefilled share of the prompt, in the target's tokens."""
    usage = answer.finish.usage
    return round(usage.kept_tokens / max(1, usage.prompt_tokens), 6)
