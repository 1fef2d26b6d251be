"""Where the time of a pass went, by marks on the device: nothing waits for them while it runs."""

from __future__ import annotations

from kernels.device import Device, Mark

STAGES = ("embed", "project", "find", "attend", "mlp", "score")


class StageMarks:
    """Marks between the stages of one pass; stages come in any order and again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Mark]] = [("", device.record())]

    def end(self, stage: str) -> None:
        """Queue the end of a stage that began where the one before it ended."""
        self._marks.append((stage, self._device.record()))

    def seconds(self) -> dict[str, float]:
        """Device seconds by stage; waits for the last mark."""
        seconds = dict.fromkeys(STAGES, 0.0)
        earlier = self._marks[0][1]
        for stage, mark in self._marks[1:]:
            seconds[stage] += mark.seconds_since(earlier)
            earlier = mark
        return seconds
