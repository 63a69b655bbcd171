"""predict: on the screen, as maps, as DICOM, or into a table."""

import os
import secrets
from enum import Enum
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy.cli.options import JsonFlag, OnProvider, ProviderName, TrustOption, read_trust
from chexnet_deploy.cli.printing import print_answers, print_json_answers, print_site
from chexnet_deploy.errors import TableError, require
from chexnet_deploy.terminal import going_on, print_json, progress

if TYPE_CHECKING:
    from types import ModuleType


app = typer.Typer()


EXIT_QUARANTINED = 3  # done, but not for all: as a verdict that is neither PASS nor FAIL


class ExecutorName(str, Enum):
    """What carries many images into a table."""

    LOCAL = "local"
    RAY = "ray"


@app.command(epilog="Example: chexnet-deploy predict bundles/int8 radiographs/ --out findings.csv")
def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    images: Annotated[
        list[Path], typer.Argument(help="PNG, JPEG or DICOM radiographs, folders of them, or .txt lists of paths.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .parquet for all answers; a run that was stopped goes on with it.")
    ] = None,
    executor: Annotated[
        ExecutorName, typer.Option(help="What carries the images into --out: this process, or a Ray cluster.")
    ] = ExecutorName.LOCAL,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers, a model in each; default: one a machine, or one a GPU.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A Ray cluster that runs, e.g. auto; default: one is started here for the work.")
    ] = None,
    cam: Annotated[Path | None, typer.Option(help="New folder for pictures of where the model looked.")] = None,
    dicom_out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for DICOM results of DICOM radiographs: a report and Secondary Captures of each."
        ),
    ] = None,
    serial_number: Annotated[
        str, typer.Option(help="Of this installation, for DICOM results; default: the machine's name.")
    ] = "",
    trust: TrustOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads for one call; default: 1, and all cores for one image.")
    ] = None,
    provider: OnProvider = ProviderName.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Name the findings in radiographs, with probabilities and operating points.

    A file that can't be read without guessing stops nothing: it is quarantined, with the reason, and the exit code is 3.
    """
    from chexnet_deploy.bundle.bundle import Bundle
    from chexnet_deploy.bundle.site import OperatingPoints
    from chexnet_deploy.dicom.results.folder import report_images
    from chexnet_deploy.images.listing import find_images, one_line
    from chexnet_deploy.inputs import name_some
    from chexnet_deploy.runtime.predict_files import open_predictor, predict_images, predict_table

    if sum(place is not None for place in (out, cam, dicom_out)) > 1:
        raise TableError(
            "--out writes a table, --cam pictures and --dicom-out DICOM files beside printed answers. Run them apart."
        )
    opened, found = Bundle.open(bundle, trust=read_trust(trust)), find_images(images)
    elsewhere = None
    if executor is ExecutorName.RAY:
        if out is None or found.is_one_file:
            raise TableError(
                "--executor ray carries many images into a table. Give --out and several images, or omit it."
            )
        if cluster is None:
            # Ray reads its key when it is imported, and from the environment alone; one that runs has its own.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        elsewhere = _import_ray_cluster().Cluster(cluster, workers=workers, trust=read_trust(trust)).rows
    elif workers is not None or cluster is not None:
        raise TableError("--workers and --cluster are for --executor ray. Give it, or omit them.")
    if found.others:
        names = one_line(name_some(found.others))
        typer.echo(f"entries of the folders that are no images, left out: {len(found.others):,}: {names}", err=True)
    if out is not None:
        with progress() as on_phase, going_on(out):
            run = predict_table(
                opened,
                found,
                out,
                threads=threads,
                provider=provider.value,
                on_phase=on_phase,
                elsewhere=elsewhere,
            )
        n_images, n_quarantined = run.n_images, run.n_quarantined
        if run.changed:
            why = "files that changed, or could not be read before, were done again"
            typer.echo(f"{len(run.changed):,} {why}: {one_line(name_some(run.changed))}", err=True)
        if as_json:
            counts = {"n_images": n_images, "n_quarantined": n_quarantined, "n_done_again": len(run.changed)}
            print_json({"table": str(out), "bundle": opened.id, "operating_points_from": run.points_from, **counts})
        else:
            already = "already complete: " if run.was_whole else ""
            typer.echo(f"{out}  {already}{n_images:,} images, {n_quarantined:,} quarantined  bundle {opened.id[:12]}")
            print_site(run.points_from)
    else:
        n_images, show = len(found.names), print_json_answers if as_json else print_answers
        if dicom_out is not None:
            answers = report_images(
                opened, found, dicom_out, serial_number or gethostname(), threads=threads, provider=provider.value
            )
            n_quarantined = show(answers, OperatingPoints.of(opened.manifest, opened.read_site()))
        else:
            with open_predictor(opened, found, threads=threads, provider=provider.value) as predictor:
                n_quarantined = show(predict_images(predictor, found, cam), predictor.points)
    if n_quarantined:
        where = "its rows say why" if out is not None else "each says why"
        typer.echo(f"{n_quarantined:,} of {n_images:,} images can't be read and are quarantined; {where}", err=True)
        raise typer.Exit(EXIT_QUARANTINED)


def _import_ray_cluster() -> "ModuleType":
    with require("ray"):
        from chexnet_deploy.serving.ray import cluster as ray_cluster
    return ray_cluster
