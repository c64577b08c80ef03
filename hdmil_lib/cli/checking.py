"""The command that checks files: check."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from hdmil_lib.cli.app import app


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of bags, models, trainings or predictions.")],
) -> None:
    """Say whether what hdmil wrote in a folder is whole; exit with 1 if not all of it is."""
    from hdmil_lib.checking import check_files
    from hdmil_lib.terminal import printable

    states: Counter[str] = Counter()
    for found in check_files(folder):
        states[found.state] += 1
        if found.state != "ok" or found.detail:
            line = f"{found.state:10} {found.kind} {found.path}" + (
                f": {found.detail}" if found.detail else ""
            )
            typer.echo(printable(line))
    typer.echo(
        ", ".join(f"{states[state]} {state}" for state in ("ok", "damaged", "unfinished", "unreadable"))
    )
    if not states:
        typer.echo("nothing here that hdmil wrote")
    if states.total() > states["ok"]:
        raise typer.Exit(1)
