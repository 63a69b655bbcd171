"""calibrate: operating points for a site, with a guarantee."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy.cli.measure import SplitName
from chexnet_deploy.cli.options import (
    BundleArgument,
    ImagesOption,
    JsonFlag,
    OnProvider,
    ProviderName,
    Threads,
    TrustOption,
    read_trust,
)
from chexnet_deploy.cli.printing import print_record
from chexnet_deploy.terminal import print_table, progress

if TYPE_CHECKING:
    from chexnet_deploy.bundle.site import Rate, Site, SitePoint

app = typer.Typer()


@app.command(epilog="Example: chexnet-deploy calibrate bundles/int8 --data ROOT --sensitivity 0.95")
def calibrate(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Option(help="Labelled images of the site, as `evaluate` takes them.")],
    sensitivity: Annotated[float | None, typer.Option(help="Of images with the finding, called present.")] = None,
    specificity: Annotated[float | None, typer.Option(help="Of images without it, called absent.")] = None,
    ppv: Annotated[float | None, typer.Option(help="Of images called present, with the finding.")] = None,
    npv: Annotated[float | None, typer.Option(help="Of images called absent, without it.")] = None,
    confidence: Annotated[float, typer.Option(help="That each rate holds for new patients.")] = 0.95,
    split: Annotated[SplitName, typer.Option(help="Whose images.")] = SplitName.TEST,
    images: ImagesOption = None,
    trust: TrustOption = None,
    threads: Threads = None,
    provider: OnProvider = ProviderName.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Choose operating points on a site's own patients, such that a rate holds for its new patients; write BUNDLE.site.json.

    `predict`, `serve` and `node` then decide by it. --sensitivity or --specificity has one threshold; --ppv and --npv have one
    each, between which nothing is said.
    """
    from chexnet_deploy.bundle.site import site_path
    from chexnet_deploy.evaluation.on_site import SiteRequest
    from chexnet_deploy.evaluation.on_site import calibrate as run

    given: dict[Rate, float | None] = {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": ppv,
        "npv": npv,
    }
    request = SiteRequest(
        bundle=bundle,
        data=data,
        split=split.value,
        images=images,
        rates={rate: value for rate, value in given.items() if value is not None},
        confidence=confidence,
        threads=threads,
        provider=provider.value,
        trust=read_trust(trust),
    )
    with progress() as on_phase:
        site = run(request, on_phase=on_phase)
    if as_json:
        print_record(site, path=str(site_path(bundle)), id=site.id)
        return
    _print_site(site)
    typer.echo(f"{site_path(bundle)}  id {site.id[:12]}")


def _print_site(site: "Site") -> None:
    """Print a row a finding with a point, a line for each without, and whose images these are."""
    print_table([{"finding": finding, **_cells(point)} for finding, point in site.points.items()])
    for finding, point in site.points.items():
        for reason in point.not_guaranteed.values():
            typer.echo(f"{finding} has one of two: {reason}")
    for finding, reason in site.without.items():
        typer.echo(f"{finding} has no operating point: {reason}")
    typer.echo(f"{site.in_words}, of each finding by itself")
    refused = f"; {site.n_refused:,} more images that predict refuses" if site.n_refused else ""
    typer.echo(f"{site.data}{refused}")
    for line in site.patients_note:
        typer.echo(line)


def _cells(point: "SitePoint") -> dict[str, str]:
    from chexnet_deploy.bundle.site import rate_name

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rests_on = (
        f"{rate_name(rate)}: {each.n_patients:,} patients, {each.n_wrong:,} wrong"
        for rate, each in point.guaranteed.items()
    )
    return {
        "present at": number(point.present_at, 4),
        "absent below": number(point.absent_below, 4),
        "guaranteed by": "; ".join(rests_on),
        "sensitivity here": number(point.sensitivity, 3),
        "specificity here": number(point.specificity, 3),
        "undetermined": number(point.undetermined, 3),
    }
