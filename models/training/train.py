"""Train one of the bundled models on one GPU in a fixed number of seconds.

`python -m models.training.train MODEL --seconds N --out DIR --corpus DIR [--resume DIR]`. Lengths
grow by stage (1,024 to 33,024 tokens); the first stage, on plain needles, ends early once its
digits are learnt. A checkpoint is written every two minutes and at the end, after the rounded
weights were tested.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import load_checkpoint, save_checkpoint
from models.shapes import SHAPES
from models.training.data import Batch, Batches, Stage, batch_loader
from models.training.model import Qwen3
from models.training.pool import build_pools
from models.training.probe import Question, build_questions, exact_share, recall_and_density
from models.training.samples import ANSWER, FILLER, Mix
from models.training.tokenizer import load_tokenizer

LONG = 33_024  # 32,768 and room for the answer, a multiple of 128
PEAK_RATE, RESUMED_RATE, FLOOR = 2e-3, 6e-4, 0.03
CHECKPOINT_EVERY_S, REPORT_EVERY_S, PROBE_EVERY_S = 120.0, 10.0, 75.0
LEARNT, STUCK = 0.97, 0.5

STAGES = (
    Stage(1024, 0.28, Mix((4, 8), 5, False), 0.7, 0.1),
    Stage(1024, 0.06, Mix((3, 8), 5, True), 0.6, 0.1),
    Stage(2048, 0.13, Mix((4, 14), 8, True), 0.5, 0.1),
    Stage(8192, 0.21, Mix((4, 32), 14, True), 0.55, 0.06),
    Stage(LONG, 0.32, Mix((4, 64), 32, True), 0.55, 0.04),
)
RESUMED_SHARES = (0.0, 0.06, 0.10, 0.24, 0.60)
SMOKE = (
    Stage(256, 0.5, Mix((1, 2), 2, False), 1.0, 0.1),
    Stage(640, 0.5, Mix((1, 3), 2, True), 0.5, 0.1),
)


def attention_loss(q: Tensor, k: Tensor, batch: Batch) -> Tensor:
    """Teach one head to look from the question at its whole needle.

    Returns the mean cross-entropy between a uniform distribution over the needle's tokens and the
    first head's attention, over every asking position. q, k: [rows, heads, tokens, head_dim].
    """
    row, positions = batch.asking[:, 0].long(), batch.asking[:, 1:].long()
    asked = q[row[:, None], 0, positions.clamp(min=0)]
    everything = torch.einsum("naw,ntw->nat", asked, k[:, 0][row]) / q.shape[-1] ** 0.5
    place = torch.arange(k.shape[2], device=k.device)
    scores = everything.float().masked_fill(place > positions[..., None], float("-inf"))
    begin, end = batch.gold[:, :1], batch.gold[:, 1:]
    inside = ((place >= begin) & (place < end))[:, None]
    mean = scores.masked_fill(~inside, 0.0).sum(-1) / (end - begin)
    losses = scores.logsumexp(-1) - mean
    valid = positions >= 0
    return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)


class Trainer:
    """The state of one run: model, optimiser, clock and what was seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began = time.monotonic() - options.already
        self.options, self.shape = options, SHAPES[options.model]
        self.device = torch.device(options.device)
        self.tokenizer = load_tokenizer(self.shape)
        self.pools = build_pools(self.tokenizer, options.corpus)
        self.stages = SMOKE if options.smoke else STAGES
        self.questions = _start_questions(options)
        cuda = self.device.type == "cuda"
        torch.manual_seed(options.seed)
        self.model = Qwen3(self.shape, torch.bfloat16 if cuda else torch.float32)
        self.peak = PEAK_RATE
        if options.resume and (options.resume / f"{options.model}.npz").is_file():
            self.model.load_arrays(load_checkpoint(options.resume / f"{options.model}.npz")[1])
            self.peak = RESUMED_RATE
        self.model.to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        norms = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.95), fused=cuda)
        self.steps = self.tokens = 0
        self.digits = 0.0
        self.notes: dict[str, Any] = {}
        self.final_s = 0.0 if options.smoke else 25.0

    def elapsed(self) -> float:
        """Return seconds since the process was asked to start."""
        return time.monotonic() - self.began

    def run(self) -> None:
        """Train through all stages, then round, test and write the result."""
        resumed = self.peak == RESUMED_RATE and not self.options.smoke
        shares = RESUMED_SHARES if resumed else tuple(s.share for s in self.stages)
        begin, end = self.elapsed(), self.options.seconds - self.final_s
        self._say(f"{self.shape.name} on {self.device}: ready, {end - begin:.0f} s of training")
        self._choose_kernels()
        loaders = self._loaders(shares)
        at = begin
        for index, stage in enumerate(self.stages):
            rest = sum(shares[index:])
            if not shares[index]:
                continue
            at = self.elapsed()
            until = at + (end - at) * shares[index] / rest
            first = index == 0 and not resumed
            self._stage(stage, loaders[index](), (begin, end), until, first)
        self._finish()

    def _loaders(self, shares: tuple[float, ...]) -> list[Callable[[], Iterator[Batch]]]:
        def opener(stage: Stage) -> Callable[[], Iterator[Batch]]:
            data = Batches(
                self.tokenizer, self.pools, stage, self.options.batch_tokens, self.options.seed
            )
            return lambda: batch_loader(data, self.options.workers)

        return [opener(stage) for stage in self.stages]

    def _stage(
        self,
        stage: Stage,
        batches: Iterator[Batch],
        span: tuple[float, float],
        until: float,
        first: bool,
    ) -> None:
        self._say(f"stage {stage.tokens} until {until:.0f} s")
        began, told, waited = self.elapsed(), self.elapsed(), 0.0
        tokens_then, probed, saved = self.tokens, self.elapsed(), self.elapsed()
        self.digits = 0.0
        while True:
            now = self.elapsed()
            stuck = first and self.digits < STUCK and now < span[0] + 0.6 * (span[1] - span[0])
            if now >= span[1] or (now >= until and not stuck):
                break
            if first and self.digits > LEARNT and now - began > 10:
                break
            batch = _to_device(next(batches), self.device)
            waited += self.elapsed() - now
            self._set_rate(now, span)
            loss = self._step_safely(stage, batch)
            if now - told > (1.0 if self.options.smoke else REPORT_EVERY_S):
                rate = (self.tokens - tokens_then) / (self.elapsed() - told) / 1e6
                self._say(
                    f"step {self.steps} loss {float(loss):.3f} digits {self.digits:.4f} "
                    f"{rate:.2f} Mtok/s waiting {waited / (now - told):.0%}"
                )
                told, tokens_then, waited = self.elapsed(), self.tokens, 0.0
            if now - probed > PROBE_EVERY_S:
                self._probe()
                probed = told = self.elapsed()
                tokens_then = self.tokens
            if now - saved > CHECKPOINT_EVERY_S:
                self._save()
                saved = self.elapsed()
        del batches

    def _set_rate(self, now: float, span: tuple[float, float]) -> None:
        progress = min(1.0, (now - span[0]) / (span[1] - span[0]))
        cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
        warm = min(1.0, (self.steps + 1) / 100)
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * warm * cosine

    def _step_safely(self, stage: Stage, batch: Batch) -> Tensor:
        """Take a step; a compiler that fails on this stage's shape is switched off for good."""
        try:
            return self._step(stage, batch)
        except Exception as error:
            if not self.options.compile or self.device.type != "cuda":
                raise
            self._say(f"running eagerly: {type(error).__name__}: {str(error)[:200]}")
            self.options.compile = False
            self.model.use_compiled(False)
            self.optimiser.zero_grad(set_to_none=True)
            return self._step(stage, batch)

    def _step(self, stage: Stage, batch: Batch) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []
        # The drafter looks in its last layer; the target needs one more layer to use what it found.
        # (A run that taught a middle layer too ended denser; seeds differ as much: BENCHMARKS.md.)
        wanted = self.shape.layers - (2 if self.shape.name == "target" else 1)

        def watch(layer: int, q: Tensor, k: Tensor) -> None:
            if layer == wanted:
                seen.append((q, k))

        ids = batch.ids.long()
        targets, codes = ids.roll(-1, 1), batch.codes.roll(-1, 1)
        codes[:, -1] = 0  # nothing follows the last token of a row
        x = self.model(ids, watch)
        weights = torch.where(codes == ANSWER, 1.0, 0.0) + (codes == FILLER) * stage.filler_weight
        losses = self.model.losses(x, targets).view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        total = loss
        if len(batch.asking):
            total = loss + self.options.attention_weight * attention_loss(*seen[0], batch)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += ids.numel()
        if self.steps % 5 == 0:
            with torch.no_grad():
                right = self.model.logits(x[codes == ANSWER]).argmax(-1) == targets[codes == ANSWER]
                share = float(right.float().mean()) if len(right) else 0.0
                self.digits = 0.7 * self.digits + 0.3 * share
        return loss.detach()

    def _choose_kernels(self) -> None:
        if self.device.type != "cuda" or not self.options.compile:
            return
        try:
            self.model.use_compiled(True)
            ids = torch.randint(0, 1000, (4, 1024), device=self.device)
            self.model.losses(self.model(ids), ids).mean().backward()
            torch.cuda.synchronize()
            self._say("compiled")
        except Exception as error:  # any failure of the compiler only costs speed
            self._say(f"running eagerly: {type(error).__name__}: {str(error)[:200]}")
            self.model.use_compiled(False)
            self.options.compile = False
        self.optimiser.zero_grad(set_to_none=True)

    def _probe(self, final: bool = False) -> dict[str, float]:
        """Test what is ready of the held-out questions; the final pass uses all of them."""
        self.model.use_compiled(False)
        results: dict[str, float] = {}
        for (task, tokens, wording), future in self.questions.items():
            if not future.done():
                continue
            if final and self.elapsed() > self.options.seconds - 4:
                self._say(f"no time left for {task} at {tokens}")
                break
            questions = future.result() if final else future.result()[:16]
            name = f"{task}/{tokens}/{wording}"
            results[name] = exact_share(self.model, questions, self.device)
            if self.shape.name != "target":
                some = questions if final else questions[:8]
                for part, value in zip(
                    ("gold", "values", "density"),
                    recall_and_density(self.model, some, self.device, 0.1),
                    strict=True,
                ):
                    results[f"{name}/{part}"] = value
        self._say("held out: " + " ".join(f"{k}={v:.3f}" for k, v in results.items()))
        if self.device.type == "cuda" and self.options.compile:
            self.model.use_compiled(True)
        return results

    def _save(self) -> None:
        notes = {"steps": self.steps, "tokens": self.tokens, "seconds": round(self.elapsed(), 1)}
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / f"{self.shape.name}.npz"
        save_checkpoint(path, self.shape, self.model.to_arrays(), notes | self.notes)

    def _finish(self) -> None:
        self.model.load_arrays(self.model.to_arrays())  # test the numbers that ship
        self._save()
        self.notes["held_out"] = self._probe(final=True)
        self._save()
        stored = {
            "model": self.shape.name,
            "steps": self.steps,
            "tokens": self.tokens,
            **self.notes,
        }
        print("RESULT " + json.dumps(stored), flush=True)

    def _say(self, text: str) -> None:
        print(f"[{self.shape.name} {self.elapsed():6.1f}s] {text}", flush=True)


def _start_questions(
    options: argparse.Namespace,
) -> dict[tuple[str, int, str], Future[list[Question]]]:
    """Build the held-out questions in two processes beside the training."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    executor = ProcessPoolExecutor(1 if options.smoke else 3, mp_context=get_context("fork"))
    count = 4 if options.smoke else 64
    cells = [("niah_multikey", 1024 if options.smoke else 2048, "plain")]
    if not options.smoke:
        for wording in ("plain", "recall"):
            cells += [("niah_multikey", n, wording) for n in (8192, 16384, 32768)]
        cells += [("niah_single", n, "riddle") for n in (16384, 32768)]
    return {
        cell: executor.submit(_questions, options.model, *cell, count if i < 4 else 100)
        for i, cell in enumerate(cells)
    }


def _questions(model: str, task: str, tokens: int, wording: str, count: int) -> list[Question]:
    return build_questions(load_tokenizer(SHAPES[model]), task, tokens, count, wording, 10_000)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    parts = (batch.ids, batch.codes, batch.asking, batch.gold)
    return Batch(*(part.to(device, non_blocking=True) for part in parts))


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument(
        "--seconds", type=float, required=True, help="all of it, start and end included"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of .txt files")
    parser.add_argument("--resume", type=Path, help="directory with MODEL.npz to go on from")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, default=132_096)
    parser.add_argument("--attention-weight", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--already", type=float, default=0.0, help="seconds spent before this start"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--smoke", action="store_true", help="tiny stages, for a test on a CPU")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    Trainer(options).run()


if __name__ == "__main__":
    main()
