"""The command `hdmil`, with one module per group of commands."""

import io
import sys

from hdmil_lib.cli import checking, cohorts, features, models, prediction  # registers their commands
from hdmil_lib.cli.app import app

__all__ = ["app", "checking", "cohorts", "features", "main", "models", "prediction"]


def main() -> None:
    """Entry point of the command `hdmil`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no dagger shows a question mark
            stream.reconfigure(errors="replace")
    app()
