"""card: a model card, and the dossier of a change."""

from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.cli.options import BundleArgument, TrustOption, read_trust

app = typer.Typer()


@app.command(epilog="Example: chexnet-deploy card bundles/int8 --since released/int8")
def card(
    bundle: BundleArgument,
    since: Annotated[
        Path | None, typer.Option(help="The bundle that it replaces: the dossier of the change follows.")
    ] = None,
    trust: TrustOption = None,
) -> None:
    """Print a model card in Markdown, of what manifest, attestation, site file and spec say; the same files, the same bytes.

    With --since also what changed, by which protocol, and with what impact: the three parts of FDA's change control plan.
    """
    from chexnet_deploy.bundle.bundle import Bundle
    from chexnet_deploy.evaluation.card import write_card

    trusted = read_trust(trust)
    before = None if since is None else Bundle.open(since, trust=None if trusted is None else trusted.without_floor())
    typer.echo(write_card(Bundle.open(bundle, trust=trusted), before), nl=False)
