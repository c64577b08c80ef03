"""The command `hdmil`, with one module per group of commands."""

import io
import signal
import sys

from hdmil_lib.cli import (  # importing a module registers its commands
    checking,
    cluster,
    cohorts,
    exchange,
    features,
    models,
    prediction,
    public,
    quality,
)
from hdmil_lib.cli.app import app
from hdmil_lib.config import slow_bars

__all__ = [
    "app",
    "checking",
    "cluster",
    "cohorts",
    "exchange",
    "features",
    "main",
    "models",
    "prediction",
    "public",
    "quality",
]


def main() -> None:
    """Entry point of the command `hdmil`."""
    if not sys.stderr.isatty():  # a bar that is drawn ten times a second fills the log of a batch job
        slow_bars()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no dagger shows a question mark
            stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):  # a time limit or a closed terminal ends as Ctrl-C does
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    app()
