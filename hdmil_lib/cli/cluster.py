"""Commands for runs that several processes share: status."""

from pathlib import Path
from typing import Annotated

import typer

from hdmil_lib.cli.app import app


@app.command()
def status(
    out: Annotated[
        Path, typer.Argument(help="Folder of bags, or table of predictions, that is being written.")
    ],
    csv: Annotated[
        Path | None, typer.Option("--csv", help="CSV file to write, with a row per slide.")
    ] = None,
) -> None:
    """Show what all processes that write OUT have done, do now, and could not do."""
    from hdmil_lib.progress import progress_of
    from hdmil_lib.storage import check_output, write_table
    from hdmil_lib.terminal import print_progress

    if csv is not None:
        check_output(csv)
    progress = progress_of(out)
    print_progress(out, progress)
    if csv is not None:
        write_table(csv, progress.slides)
