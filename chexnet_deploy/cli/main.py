"""The command line's commands in one program, and its exit codes.

Heavy dependencies are imported lazily, inside the command that uses them; terminal.py has the exit codes.
"""

import typer

from chexnet_deploy.cli import export, inspect, measure, on_site, predict, serve, signing
from chexnet_deploy.terminal import run_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost.",
)
for part in (export, measure, on_site, predict, inspect, signing, serve):
    app.add_typer(part.app)
app.add_typer(serve.node_app, name="node")
app.add_typer(serve.audit_app, name="audit")


def main() -> None:
    """Run the command line."""
    run_program(app)
