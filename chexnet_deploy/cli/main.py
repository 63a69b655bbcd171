"""The command line's commands in one program, and its exit codes.

Heavy dependencies are imported lazily, inside the command that uses them; terminal.py has the exit codes.
"""

from typing import Annotated

import typer

from chexnet_deploy import __version__
from chexnet_deploy.cli import card, export, inspect, measure, on_site, predict, serve, signing
from chexnet_deploy.terminal import run_program

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for part in (export, measure, on_site, predict, inspect, card, signing, serve):
    app.add_typer(part.app)
app.add_typer(serve.node_app, name="node")
app.add_typer(serve.audit_app, name="audit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chexnet-deploy {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: chexnet-deploy doctor")
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost."""


def main() -> None:
    """Run the command line."""
    run_program(app)
