"""`skim up`: run the three services on this machine until told to stop.

The first ctrl-C (or SIGTERM) drains, the gateway first; the second kills. Signals only count here
and the loop below acts on them, since a handler may interrupt a thread that holds a lock.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict
from types import FrameType

from rich.live import Live
from rich.table import Table

from skim.cli.output import EXIT_INTERRUPTED, Output
from skim.cli.service_process import ServiceState, Status
from skim.cli.stack import LocalStack
from skim.cli.stack_plan import StackOptions
from skim.errors import Cancelled

POLL_S = 0.1
STYLES = {
    Status.READY: "green",
    Status.RESTARTING: "yellow",
    Status.NOT_READY: "yellow",
    Status.FAILED: "red",
}


class _SignalCount:
    """How often the user asked to stop."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_up(output: Output, options: StackOptions) -> int:
    """Start, show and supervise the services; returns the exit code."""
    lines, code = _Lines(output), 0
    with output.console.status("Looking for a GPU …"):
        stack = LocalStack(options, on_change=lines.on_change)
    signals = _SignalCount()
    output.console.print(f"Starting; logs in {stack.log_dir}", soft_wrap=True)
    if stack.sharing.line:
        output.console.print(stack.sharing.line, soft_wrap=True, markup=False)
    stack.launch()
    try:
        if output.lively:
            with Live(console=output.console, refresh_per_second=4) as live:
                _attend(stack, signals, output, live)
        else:
            _attend(stack, signals, output, None)
        stack.is_up()
    except Cancelled:
        code = EXIT_INTERRUPTED  # told to stop before everything was up
    finally:
        stack.request_stop(hurry=True)
        stack.stop()
    restarts = {state.name: state.restarts for state in stack.states()}
    output.json_line({"event": "stopped", "restarts": restarts})
    return code


def _attend(stack: LocalStack, signals: _SignalCount, output: Output, live: Live | None) -> None:
    announced = False
    while not stack.is_gone():
        if signals.count:
            stack.request_stop(hurry=signals.count > 1)
        elif not announced and stack.is_up():
            announced = True
            _announce(stack, output)
        if live:
            live.update(_table(stack.states()))
        time.sleep(POLL_S)
    if live:
        live.update(_table(stack.states()))


def _announce(stack: LocalStack, output: Output) -> None:
    output.console.print(
        f'Ready. Ask with: skim ask "QUESTION" --file FILE --gateway {stack.gateway_address}',
        soft_wrap=True,
    )
    output.console.print("Ctrl-C drains and stops; a second one kills.", style="dim")
    services = {state.name: asdict(state) for state in stack.states()}
    memory = stack.sharing.line
    output.json_line(
        {"event": "ready", "log_dir": stack.log_dir, "memory": memory, "services": services}
    )


def _table(states: list[ServiceState]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("service", "state", "address", "pid", "restarts", ""):
        table.add_column(heading, header_style="dim")
    for state in states:
        style = STYLES.get(state.status, "")
        pid = str(state.pid or "-")
        status = f"[{style}]{state.status}[/]" if style else state.status
        table.add_row(state.name, status, state.address, pid, str(state.restarts), state.detail)
    return table


class _Lines:
    """One line a change, where there is no terminal to draw a table on."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def on_change(self, state: ServiceState) -> None:
        """Print the change; on a terminal the table shows it."""
        if not self._output.lively:
            detail = f" ({state.detail})" if state.detail else ""
            line = f"{state.name}: {state.status} on {state.address}{detail}"
            self._output.console.print(line, soft_wrap=True, markup=False)
