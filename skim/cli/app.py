"""The commands and their options. What a command does stands in the module of the same name.

Reads the command line, builds the value objects, calls; nothing else. Which values are allowed is
checked where they are used, so that every caller hears the same words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skim.cli.admin import run_drain, run_swap
from skim.cli.ask import run_ask
from skim.cli.demo import DemoOptions, run_demo
from skim.cli.doctor import run_doctor
from skim.cli.document import read_document
from skim.cli.gateway import DEFAULT_ADDRESS, LOCAL_GRACE_S, GatewayOptions
from skim.cli.memory import run_park, run_regions, run_unpark, run_watch
from skim.cli.models import run_models, run_tokens
from skim.cli.output import run_command
from skim.cli.ports import DEFAULT_BASE_PORT, SERVICES, plan_ports
from skim.cli.stack_plan import StackOptions
from skim.cli.up import run_up
from skim.client_types import ModeName, Options
from skim.errors import InvalidRequest

app = typer.Typer(
    help="Ask questions over very long prompts: a small model skims, a large one answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
drafters = typer.Typer(help="Look after the drafters.", no_args_is_help=True)
app.add_typer(drafters, name="drafters")
memory = typer.Typer(
    help="Look at the GPU memory of drafters beside a target, and park it.", no_args_is_help=True
)
app.add_typer(memory, name="memory")

TARGET_ADMIN = f"127.0.0.1:{plan_ports(DEFAULT_BASE_PORT)['target'][1]}"

# Options that several commands share.
Json = Annotated[bool, typer.Option("--json", help="The last line is one JSON object.")]
Address = Annotated[
    str, typer.Option("--gateway", envvar="SKIM_ADDRESS", help="host:port of the gateway.")
]
Token = Annotated[
    str | None, typer.Option("--token", envvar="SKIM_TOKEN", help="The gateway's bearer token.")
]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds; default: no limit.")]
Local = Annotated[
    bool, typer.Option("--local", help="Start services of its own, and stop them at the end.")
]
Files = Annotated[
    list[str], typer.Option("--file", "-f", help="A text file; - is standard input. Repeatable.")
]
Target = Annotated[Path | None, typer.Option("--target", help="GGUF; default: the bundled one.")]
Drafters = Annotated[
    list[Path] | None,
    typer.Option("--drafter", help="GGUF; the first is the default. Repeatable."),
]
Settings = Annotated[
    Path | None, typer.Option("--settings", help="TOML with [gateway], [drafter] and [target].")
]
LogDir = Annotated[Path | None, typer.Option("--log-dir", help="Where the services log.")]
Grace = Annotated[float, typer.Option(min=0.0, help="Seconds that running requests get.")]
TargetAdmin = Annotated[str, typer.Option("--admin", help="host:port of the target's admin port.")]
Region = Annotated[str, typer.Argument(help="Name of the drafter's model.")]
Generation = Annotated[
    int, typer.Option("--expect", min=0, help="Generation that you saw; another is refused.")
]
Keep = Annotated[float | None, typer.Option("--keep", help="Share of the tokens kept, (0, 1].")]


@app.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(
            help="The gateway's; drafter and target follow, admin ports lie ten above. "
            f"0: free ports. Default {DEFAULT_BASE_PORT}."
        ),
    ] = None,
    target: Target = None,
    drafter: Drafters = None,
    settings: Settings = None,
    log_dir: LogDir = None,
    grace: Grace = 30.0,
    json: Json = False,
) -> None:
    """Start and supervise the three services on this machine; ctrl-C drains, twice kills."""
    run_command(
        json,
        lambda output: run_up(
            output,
            StackOptions(
                target=target,
                drafters=tuple(drafter or ()),
                settings=settings,
                base_port=port,
                log_dir=log_dir,
                grace_s=grace,
            ),
        ),
    )


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    file: Files,
    gateway: Address = DEFAULT_ADDRESS,
    full: Annotated[bool, typer.Option("--full", help="Prefill the whole prompt.")] = False,
    skim: Annotated[bool, typer.Option("--skim", help="Skim, however short it is.")] = False,
    keep: Keep = None,
    coverage: Annotated[
        float | None, typer.Option(help="Keep what covers this share of the attention, (0, 1].")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="specprefill, mid_layer, lexical, ends or random.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="A name that `skim models` lists.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, the default, is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0: off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="(0, 1]; 1: off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="[0, 1]; 0: off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text. Repeatable.")
    ] = None,
    local: Local = False,
    token: Token = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Answer QUESTION over a document; ctrl-C cancels the request."""
    options = given(
        mode=_mode(full, skim),
        keep_ratio=keep,
        coverage=coverage,
        scorer=scorer,
        drafter=drafter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop or None,
    )
    where = GatewayOptions(gateway, token, timeout, local)
    run_command(json, lambda output: run_ask(output, where, question, read_document(file), options))


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16_384,
    keep: Annotated[
        float | None, typer.Option(help="Share of the tokens kept, (0, 1]; default 0.05.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of key, number and place.")] = 0,
    scorer: Annotated[str | None, typer.Option(help="Default: specprefill.")] = None,
    target: Target = None,
    drafter: Drafters = None,
    settings: Settings = None,
    log_dir: LogDir = None,
    json: Json = False,
) -> None:
    """Hide a number in a long document; ask for it with skimming and without, side by side."""
    stack = StackOptions(
        target=target,
        drafters=tuple(drafter or ()),
        settings=settings,
        base_port=0,
        log_dir=log_dir,
        grace_s=LOCAL_GRACE_S,
    )
    options = DemoOptions(tokens, keep, seed, scorer)
    run_command(json, lambda output: run_demo(output, options, stack))


@app.command()
def doctor(
    target: Target = None,
    drafter: Annotated[Path | None, typer.Option("--drafter", help="GGUF to check.")] = None,
    port: Annotated[int, typer.Option(help="The gateway's.")] = DEFAULT_BASE_PORT,
    json: Json = False,
) -> None:
    """Check models, ports, versions and GPU, and say what to do."""
    models = {"target": target, "drafter": drafter}
    run_command(json, lambda output: run_doctor(output, models, port))


@app.command()
def models(
    gateway: Address = DEFAULT_ADDRESS,
    token: Token = None,
    timeout: Timeout = 10.0,
    json: Json = False,
) -> None:
    """List the target and the drafters that a gateway uses."""
    where = GatewayOptions(gateway, token, timeout)
    run_command(json, lambda output: run_models(output, where))


@app.command()
def tokens(
    file: Files,
    gateway: Address = DEFAULT_ADDRESS,
    local: Local = False,
    token: Token = None,
    timeout: Timeout = 60.0,
    json: Json = False,
) -> None:
    """Count a document in the target's tokens."""
    where = GatewayOptions(gateway, token, timeout, local)
    run_command(json, lambda output: run_tokens(output, where, read_document(file)))


@app.command()
def drain(
    service: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join(SERVICES)}; default: all, in order.")
    ] = None,
    port: Annotated[int, typer.Option(help="The gateway's.")] = DEFAULT_BASE_PORT,
    host: Annotated[str, typer.Option(help="Where the admin ports are.")] = "127.0.0.1",
    grace: Grace = 30.0,
    json: Json = False,
) -> None:
    """Make services refuse new work and finish what runs."""

    def body(output: Any) -> int:
        ports = plan_ports(port)
        for name in service or ():
            if name not in ports:
                raise InvalidRequest.field_value("service", name, f"one of {', '.join(ports)}")
        addresses = {name: f"{host}:{ports[name][1]}" for name in service or SERVICES}
        return run_drain(output, addresses, grace)

    run_command(json, body)


@drafters.command()
def swap(
    name: Annotated[str, typer.Argument(help="The model to score with from now on.")],
    admin: Annotated[
        str, typer.Option(help="host:port of the drafter's admin port.")
    ] = f"127.0.0.1:{plan_ports(DEFAULT_BASE_PORT)['drafter'][1]}",
    json: Json = False,
) -> None:
    """Swap a drafter service's model."""
    run_command(json, lambda output: run_swap(output, admin, name))


@memory.command("list")
def list_regions(admin: TargetAdmin = TARGET_ADMIN, json: Json = False) -> None:
    """List the drafters whose weights the target keeps, and where they are."""
    run_command(json, lambda output: run_regions(output, admin))


@memory.command()
def park(
    name: Region,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for the drafter to let go, (0, 60].")
    ] = None,
    expect: Generation = 0,
    admin: TargetAdmin = TARGET_ADMIN,
    json: Json = False,
) -> None:
    """Free a drafter's GPU memory until it has to score."""
    run_command(json, lambda output: run_park(output, admin, name, expect, timeout))


@memory.command()
def unpark(
    name: Region, expect: Generation = 0, admin: TargetAdmin = TARGET_ADMIN, json: Json = False
) -> None:
    """Bring a drafter's weights back."""
    run_command(json, lambda output: run_unpark(output, admin, name, expect))


@memory.command()
def watch(name: Region, admin: TargetAdmin = TARGET_ADMIN, json: Json = False) -> None:
    """Print a drafter's state now, and at each change; ctrl-C ends it."""
    run_command(json, lambda output: run_watch(output, admin, name))


def given(**values: Any) -> Options:
    """The options that were given; the rest is the server's default."""
    options: Options = {name: value for name, value in values.items() if value is not None}  # type: ignore[assignment]
    return options


def _mode(full: bool, skim: bool) -> ModeName:
    if full and skim:
        raise typer.BadParameter("--full and --skim exclude each other")
    return "full" if full else "skim" if skim else "auto"
