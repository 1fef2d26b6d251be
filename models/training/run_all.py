"""Train all three models with one command, inside a hard time limit.

`python -m models.training.run_all --seconds N --out DIR --corpus DIR`. With two GPUs the target
takes the first for the whole time while the drafter and then the drafter with the other tokenizer
share the second; with one device everything runs in turn. Every child is killed at the hard stop.
Afterwards DIR holds a checkpoint and a log per model, and `python -m models.export DIR` writes
GGUFs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

TAIL_S = 6.0  # left after the children's own limit, before the hard stop


@dataclass
class Lane:
    """One device and the models it trains in turn, each with its share of the time."""

    device: str
    shares: dict[str, float]
    workers: int
    queue: list[str] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None


def plan(devices: int, cores: int, only: list[str]) -> list[Lane]:
    """Return the lanes: cuda:0 for the target, cuda:1 for both drafters; or one lane for all."""
    if devices >= 2:
        lanes = [
            Lane("cuda:0", {"target": 1.0}, max(2, cores // 4)),
            Lane("cuda:1", {"drafter": 0.52, "drafter-cross": 0.48}, max(2, cores // 2)),
        ]
    else:
        shares = {"target": 0.5, "drafter": 0.25, "drafter-cross": 0.25}
        lanes = [Lane("cuda:0" if devices else "cpu", shares, max(0, cores // 2) if devices else 0)]
    for lane in lanes:
        chosen = {m: s for m, s in lane.shares.items() if m in only}
        lane.shares = {m: s / sum(chosen.values()) for m, s in chosen.items()}
        lane.queue = list(lane.shares)
    return [lane for lane in lanes if lane.queue]


def start_next(lane: Lane, options: argparse.Namespace, left_s: float) -> None:
    """Start the lane's next model with its part of the time that is left."""
    model = lane.queue.pop(0)
    later = sum(lane.shares[m] for m in lane.queue)
    seconds = left_s * lane.shares[model] / (lane.shares[model] + later)
    command = [sys.executable, "-u", "-m", "models.training.train", model]
    command += ["--seconds", f"{seconds:.0f}", "--out", str(options.out)]
    command += ["--corpus", str(options.corpus), "--device", lane.device]
    command += ["--workers", str(lane.workers)] + (["--smoke"] if options.smoke else [])
    command += ["--batch-tokens", "2048"] if options.smoke else []
    command += ["--resume", str(options.resume)] if options.resume else []
    lane.log = (options.out / f"{model}.log").open("wb")
    lane.child = subprocess.Popen(
        command, stdout=lane.log, stderr=subprocess.STDOUT, start_new_session=True
    )
    print(f"{model} on {lane.device}: {seconds:.0f} s, {lane.workers} workers", flush=True)


def supervise(lanes: list[Lane], options: argparse.Namespace, began: float) -> None:
    """Run every lane to its end, echo the logs' news, and kill what outlives the hard stop."""
    hard = began + options.seconds
    offsets: dict[str, int] = {}
    try:
        while time.monotonic() < hard:
            for lane in lanes:
                done = not _running(lane)
                left = hard - TAIL_S - time.monotonic()
                if done and lane.queue and left > 20:
                    start_next(lane, options, left)
                elif done and lane.queue:
                    print(f"no time left for {', '.join(lane.queue)}", flush=True)
                    lane.queue.clear()
            _echo(options.out, offsets)
            if all(not lane.queue and not _running(lane) for lane in lanes):
                break
            time.sleep(1.0)
    finally:
        for lane in lanes:
            if lane.child and _running(lane):
                os.killpg(lane.child.pid, signal.SIGKILL)
                print(f"stopped at the limit: {lane.device}", flush=True)
        _echo(options.out, offsets)


def _running(lane: Lane) -> bool:
    return lane.child is not None and lane.child.poll() is None


def _echo(out: Path, offsets: dict[str, int]) -> None:
    for path in sorted(out.glob("*.log")):
        with path.open("rb") as log:
            log.seek(offsets.get(path.name, 0))
            news = log.read()
        whole = news.rfind(b"\n") + 1
        offsets[path.name] = offsets.get(path.name, 0) + whole
        if whole:
            print(news[:whole].decode(errors="replace"), end="", flush=True)


def table(out: Path) -> list[dict[str, object]]:
    """Return and print what each finished model says of itself."""
    rows = []
    for path in sorted(out.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("RESULT "):
                rows.append(json.loads(line[7:]))
    for row in rows:
        print(f"\n{row['model']}: {row['steps']} steps, {row['tokens'] / 1e6:.0f}M tokens")
        for name, value in row["held_out"].items():
            print(f"  {name:44s} {value:.3f}")
    return rows


def main() -> None:
    """Train, stop in time, print the table."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True, help="hard limit for everything")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of .txt files")
    parser.add_argument("--resume", type=Path, help="directory of checkpoints to go on from")
    parser.add_argument("--only", default="target,drafter,drafter-cross")
    parser.add_argument("--smoke", action="store_true", help="tiny stages, for a test on a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    devices = _gpus()
    lanes = plan(devices, os.cpu_count() or 2, options.only.split(","))
    print(f"{devices} GPUs, {os.cpu_count()} cores", flush=True)
    supervise(lanes, options, began)
    rows = table(options.out)
    print(json.dumps({"seconds": round(time.monotonic() - began, 1), "models": rows}))


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


if __name__ == "__main__":
    main()
