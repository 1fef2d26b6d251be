"""`skim models` and `skim tokens`: what a gateway serves, and how it counts."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from skim.cli.gateway import GatewayOptions, open_gateway
from skim.cli.output import Output


def run_models(output: Output, gateway: GatewayOptions) -> int:
    """List the target and the drafters."""
    with open_gateway(output, gateway) as client:
        found = client.models()
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "serving", "longest prompt", "chat", "digest", ""):
        table.add_column(heading, header_style="dim")
    for model in found.models:
        longest = f"{model.max_prompt_tokens:,} tokens" if model.max_prompt_tokens else "-"
        chat = {True: "yes", False: "no"}[model.chat] if model.kind == "target" else "-"
        serving = "[green]yes[/]" if model.serving else "[red]no[/]"
        row = (model.name, model.kind, serving, longest, chat, model.model_digest[:12])
        table.add_row(*row, model.detail)
    output.console.print(table)
    output.console.print(
        f"Prompts under {found.skim_min_tokens:,} tokens are prefilled whole.", style="dim"
    )
    models = [asdict(model) for model in found.models]
    output.json_line({"models": models, "skim_min_tokens": found.skim_min_tokens})
    return 0


def run_tokens(output: Output, gateway: GatewayOptions, document: str) -> int:
    """Count a document in the target's tokenizer."""
    with open_gateway(output, gateway) as client:
        tokens = client.count_tokens(document)
    size_bytes = len(document.encode())
    output.console.print(f"{tokens:,} tokens in {size_bytes:,} bytes")
    output.json_line({"prompt_tokens": tokens, "size_bytes": size_bytes})
    return 0
