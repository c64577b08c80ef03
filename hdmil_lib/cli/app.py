"""The application `hdmil`, whose commands the other modules register."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hdmil_lib.errors import HDMILError
from hdmil_lib.system_errors import in_words
from hdmil_lib.terminal import print_error


class _OneLineErrors(TyperGroup):
    """Prints errors that the user can fix as one red line on stderr, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `hdmil ... | head` has read enough; click ends without a word
            raise
        except (HDMILError, OSError) as error:
            print_error(in_words(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print_error("interrupted; what is finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_OneLineErrors,
    help="HDMIL: fast and accurate classification of gigapixel pathology slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hdmil_lib.version import __version__

        typer.echo(f"hdmil {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """HDMIL: fast and accurate classification of gigapixel pathology slides."""
