"""The command line: parse, call one function, print.

Rooms with heavy libraries are opened inside the one command that needs them; terminal.py has the exit codes.
"""

import json
import os
import secrets
import sys
from enum import Enum
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy import cli_serving, cli_signing
from chexnet_deploy.cli_options import JsonFlag, OnProvider, ProviderName, Threads, TrustOption, read_trust
from chexnet_deploy.errors import MissingPackageError, SpecError, TableError
from chexnet_deploy.terminal import (
    cancellation,
    going_on,
    print_answers,
    print_bench,
    print_evaluation,
    print_json,
    print_json_answers,
    print_repository,
    progress,
    run_program,
)

if TYPE_CHECKING:
    from types import ModuleType

    from chexnet_deploy.signing.release import Release

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost.",
)

EXIT_QUARANTINED = 3  # done, but not for all: as a verdict that is neither PASS nor FAIL

DataOption = Annotated[Path | None, typer.Option("--data", help="ChestX-ray14: tables, split lists and images.")]
ImagesOption = Annotated[Path | None, typer.Option("--images", help="Only the images this list names, one a line.")]


class ExecutorName(str, Enum):
    """What carries many images into a table."""

    LOCAL = "local"
    RAY = "ray"


class TritonDevice(str, Enum):
    """What runs ONNX bundles in Triton."""

    CPU = "cpu"
    GPU = "gpu"


class SplitName(str, Enum):
    """Which patients."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@app.command()
def export(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT | BUNDLE...",
            help="A .safetensors file written by python -m training, or by import; or bundles, for --triton.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the bundles; each precision gets one in it.")] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, fp16, int8. fp32 is always made.")] = "fp32",
    calibration: Annotated[
        Path | None, typer.Option(help="Image names for int8, one a line; default: chosen, and written to OUT.")
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="How many to choose, where no list is given.")] = 256,
    data: DataOption = None,
    dialect: Annotated[
        str,
        typer.Option(
            help="Comma-separated forms of int8: typed or mixed (TensorRT 10 and later), trt8 (TensorRT 8.6), cpu."
        ),
    ] = "typed",
    scope: Annotated[
        Path | None, typer.Option(help="TOML: modalities, body parts, views and ages the model is meant for.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Build a TensorRT plan of each too, on the GPU here.")
    ] = False,
    line: Annotated[str | None, typer.Option(help="The model line this is a release of, e.g. chexnet-adult.")] = None,
    release: Annotated[
        int | None, typer.Option(min=1, help="Its number, greater than every one before; needs --line.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="New folder: a model repository of the bundles for NVIDIA Triton.")
    ] = None,
    triton_device: Annotated[
        TritonDevice | None,
        typer.Option(help="What runs ONNX bundles in Triton; default: cpu. Plans run on their GPU."),
    ] = None,
    trust: TrustOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make fp32, fp16 and int8 bundles of a checkpoint; each is kept only if it answers as the one before.

    With --triton also a model repository of them; or of bundles that are there, ONNX or plans, where those are named.
    """
    from chexnet_deploy.bundle import Bundle
    from chexnet_deploy.pipeline import build_bundle, export_bundles, parse_dialects, parse_precisions, require_tensorrt
    from chexnet_deploy.spec import read_scope

    are_bundles = all(source.is_dir() for source in sources)
    _check_export(context, are_bundles=are_bundles, n_sources=len(sources), out=out, triton=triton)
    if are_bundles:
        bundles = [Bundle.open(source, trust=read_trust(trust)) for source in sources]
    else:
        assert out is not None  # _check_export
        policy = None if scope is None else read_scope(scope)
        if engine:
            require_tensorrt("tensorrt")
        with progress() as on_phase:
            bundles = export_bundles(
                sources[0],
                out,
                parse_precisions(precision),
                data_root=data,
                calibration_list=calibration,
                n_calibration_images=calibration_images,
                dialects=parse_dialects(dialect),
                release=_release(line, release),
                on_phase=on_phase,
                scope=policy,
            )
            if engine:
                with cancellation() as cancelled:
                    bundles += [
                        build_bundle(b.path, out / f"{b.path.name}-plan", None, cancelled=cancelled, on_phase=on_phase)
                        for b in bundles
                    ]
    if triton is not None:
        from chexnet_deploy.serving.triton import write_repository

        models = write_repository(triton, bundles, device=None if triton_device is None else triton_device.value)
    if as_json:
        print_json({b.path.name: {"path": str(b.path), "id": b.id} for b in bundles})
        return
    for bundle in bundles:
        typer.echo(f"{bundle.path}  {bundle.manifest.precision.value}  id {bundle.id[:12]}")
        for check in () if are_bundles else bundle.manifest.checks:
            typer.echo(f"  {check.name}: {check.value:.3g} (limit {check.limit:g})")
    if triton is not None:
        print_repository(triton, models)


def _check_export(
    context: typer.Context, *, are_bundles: bool, n_sources: int, out: Path | None, triton: Path | None
) -> None:
    """Refuse options that don't go together, before any work.

    Raises:
        SpecError: says which, and what to leave away or to give.
    """
    given = {
        name.replace("_", "-")
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    if are_bundles:
        if triton is None:
            raise SpecError(
                "found bundles and no --triton; export makes bundles of a checkpoint. Give a .safetensors file."
            )
        if makes := sorted(given - {"sources", "triton", "triton-device", "trust", "as-json"}):
            raise SpecError(f"--{', --'.join(makes)}: for a checkpoint, and bundles are there already. Leave it away.")
        return
    if n_sources != 1:
        raise SpecError(f"found {n_sources} paths that are not all bundles; needed one checkpoint, or bundles alone.")
    if out is None:
        raise SpecError("found no --out, needed a folder for the bundles. Give it.")
    if "trust" in given:
        raise SpecError("checkpoints aren't signed, and --trust is for bundles. Leave it away.")
    if triton is None and "triton-device" in given:
        raise SpecError("--triton-device is for a model repository. Give --triton, or leave it away.")
    if triton is not None and triton.exists():
        raise SpecError(f"{triton} is there already. Choose another --triton, or delete it first.")


@app.command("import")
def import_legacy_file(
    file: Annotated[Path, typer.Argument(help="A CheXNet file of PyTorch, e.g. model.pth.tar; no code in it is run.")],
    out: Annotated[Path, typer.Option(help="New .safetensors file, for export.")],
    form: Annotated[
        str | None, typer.Option(help="Where it comes from: arnoweng, zoogzog, jrzech or torchxrayvision-all.")
    ] = None,
    findings: Annotated[
        Path | None, typer.Option(help="Where no form fits: names of the model's outputs in order, one a line.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a circulating CheXNet file into a checkpoint; what doesn't fit exactly is refused."""
    from chexnet_deploy.pipeline import import_legacy_file as run

    made = run(file, out, form, findings)
    for note in made.notes:
        typer.echo(f"warning: {note}", err=True)
    if as_json:
        print_json({"path": str(out), "sha256": made.checkpoint.sha256, "notes": made.notes})
        return
    typer.echo(f"{out}  {len(made.checkpoint.manifest.findings)} findings  sha256 {made.checkpoint.sha256[:12]}")


class BackendName(str, Enum):
    """Which TensorRT."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="An fp32, fp16 or int8 bundle that export wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the plan's bundle.")],
    spec: Annotated[str | None, typer.Option(help="A spec's name or .toml; default: that of the precision.")] = None,
    backend: Annotated[BackendName, typer.Option(help="Which TensorRT builds it.")] = BackendName.TENSORRT,
    device: Annotated[int, typer.Option(min=0, help="The GPU's number.")] = 0,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A file that makes the same build quicker next time.")
    ] = None,
    trust: TrustOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Build a TensorRT plan of a bundle on the GPU it will run on; kept only if it gives the known answers."""
    from chexnet_deploy.pipeline import build_bundle

    with progress() as on_phase, cancellation() as cancelled:
        made = build_bundle(
            bundle,
            out,
            spec,
            backend=backend.value,
            device=device,
            timing_cache=timing_cache,
            trust=read_trust(trust),
            cancelled=cancelled,
            on_phase=on_phase,
        )
    if as_json:
        typer.echo(made.manifest.model_dump_json())
        return
    card = made.manifest.engine
    assert card is not None  # a plan's manifest has one
    typer.echo(f"{made.path}  {made.manifest.precision.value}  id {made.id[:12]}  built in {card.build_s:.1f} s")
    typer.echo(f"  convolutions: {', '.join(f'{n} in {kind}' for kind, n in card.conv_types.items())}")
    traffic = "unknown" if card.bytes_per_image is None else f"{card.bytes_per_image / 1e6:.2f} MB an image"
    typer.echo(f"  {card.n_kernels} kernels; activations they read and write: {traffic}")
    for warning in card.warnings:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def bench(
    engine: Annotated[list[Path], typer.Option(help="A bundle; give the option again to measure several in turns.")],
    reference: Annotated[
        Path | None, typer.Option(help="Its fp32 ancestor; default: found beside the first engine.")
    ] = None,
    data: DataOption = None,
    split: Annotated[SplitName, typer.Option(help="Whose images.")] = SplitName.TEST,
    images: ImagesOption = None,
    spec: Annotated[str | None, typer.Option(help="A spec's name or .toml; default: that of the precision.")] = None,
    out: Annotated[Path, typer.Option(help="New folder for report.json, report.html and the logits.")] = Path("bench"),
    html: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
    min_runs: Annotated[int, typer.Option(min=1, help="Rounds at the least.")] = 100,
    min_duration_s: Annotated[float, typer.Option(min=0.0, help="Seconds for each engine and scenario.")] = 3.0,
    trust: TrustOption = None,
    threads: Threads = None,
    provider: OnProvider = ProviderName.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Prove an engine on this machine: accuracy beside its fp32 model, and latency; PASS, FAIL or INCONCLUSIVE."""
    from chexnet_deploy.bench import Effort
    from chexnet_deploy.parity import EXIT_CODES
    from chexnet_deploy.pipeline import bench_bundles

    with progress() as on_phase:
        report = bench_bundles(
            engine,
            reference,
            data,
            split.value,
            images,
            spec,
            out,
            effort=Effort(min_runs, min_duration_s),
            trust=read_trust(trust),
            threads=threads,
            provider=provider.value,
            with_html=html,
            on_phase=on_phase,
        )
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        print_bench(report, out / ("report.html" if html else "report.json"))
    raise typer.Exit(EXIT_CODES[report.verdict])


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    images: Annotated[
        list[Path], typer.Argument(help="PNG or JPEG radiographs, folders of them, or .txt lists of paths.")
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
    from chexnet_deploy.bundle import Bundle
    from chexnet_deploy.image_files import find_images
    from chexnet_deploy.pipeline import open_predictor, predict_images, predict_table, report_images

    if sum(place is not None for place in (out, cam, dicom_out)) > 1:
        raise TableError(
            "--out writes a table, --cam pictures and --dicom-out DICOM files beside printed answers. Run them apart."
        )
    opened, found = Bundle.open(bundle, trust=read_trust(trust)), find_images(images)
    elsewhere = None
    if executor is ExecutorName.RAY:
        if out is None or found.is_one_file:
            raise TableError(
                "--executor ray carries many images into a table. Give --out and several images, or leave it away."
            )
        if cluster is None:
            # Ray reads its key when it is imported, and from the environment alone; one that runs has its own.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        elsewhere = _open_ray_room().Cluster(cluster, workers=workers, trust=read_trust(trust)).rows
    elif workers is not None or cluster is not None:
        raise TableError("--workers and --cluster are for --executor ray. Give it, or leave them away.")
    if found.n_others:
        typer.echo(f"entries of the folders that are no images by name, left out: {found.n_others:,}", err=True)
    if out is not None:
        with progress() as on_phase, going_on(out):
            n_images, n_quarantined = predict_table(
                opened,
                found,
                out,
                threads=threads,
                provider=provider.value,
                on_phase=on_phase,
                elsewhere=elsewhere,
            )
        counts = {"table": str(out), "bundle": opened.id, "n_images": n_images, "n_quarantined": n_quarantined}
        if as_json:
            print_json(counts)
        else:
            typer.echo(f"{out}  {n_images:,} images, {n_quarantined:,} quarantined  bundle {opened.id[:12]}")
    else:
        n_images, show = len(found.names), print_json_answers if as_json else print_answers
        if dicom_out is not None:
            answers = report_images(
                opened, found, dicom_out, serial_number or gethostname(), threads=threads, provider=provider.value
            )
            n_quarantined = show(answers, opened.manifest.operating_points)
        else:
            with open_predictor(opened, found, threads=threads, provider=provider.value) as predictor:
                n_quarantined = show(predict_images(predictor, found, cam), predictor.operating_points)
    if n_quarantined:
        where = "its rows say why" if out is not None else "each says why"
        typer.echo(f"{n_quarantined:,} of {n_images:,} images can't be read and are quarantined; {where}", err=True)
        raise typer.Exit(EXIT_QUARANTINED)


@app.command()
def evaluate(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle to run; or give --predictions.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Anyone's CSV: Image Index and a column a finding, or image, finding, score.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Of the predictions: NIH's table, or a CSV of 0 and 1; default: that in --data.")
    ] = None,
    data: DataOption = None,
    split: Annotated[
        SplitName | None, typer.Option(help="Whose images; default: test of a bundle, all of predictions.")
    ] = None,
    images: ImagesOption = None,
    readers: Annotated[
        Path | None, typer.Option(help="Folder of expert labels: compare with radiologists by F1, in three protocols.")
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            help="JSON, finding to probability; default: a bundle's own, or by F1 on patients who are not tested on."
        ),
    ] = None,
    localization: Annotated[
        bool, typer.Option("--localization", help="Score activation maps against BBox_List_2017.csv.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="New folder for report.json and report.html.")] = None,
    html: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
    trust: TrustOption = None,
    threads: Threads = None,
    provider: OnProvider = ProviderName.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Measure a bundle, or anyone's predictions, on labelled images: AUROC with intervals clustered by patient.

    Beside it AUPRC, calibration, decisions and subgroups; with --readers the reader study of the CheXNet paper.
    """
    from chexnet_deploy.evaluation.request import EvaluationRequest
    from chexnet_deploy.pipeline import evaluate as run

    request = EvaluationRequest(
        bundle=bundle,
        predictions=predictions,
        labels=labels,
        data=data,
        split=None if split is None else split.value,
        images=images,
        readers=readers,
        thresholds=thresholds,
        has_localization=localization,
        threads=threads,
        provider=provider.value,
        trust=read_trust(trust),
    )
    with progress() as on_phase:
        result = run(request, out, with_html=html, on_phase=on_phase)
    if as_json:
        typer.echo(result.model_dump_json())
        return
    print_evaluation(result)
    if out is not None:
        typer.echo(str(out / ("report.html" if html else "report.json")))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A bundle, a .safetensors checkpoint, or a model repository for Triton.")
    ],
    trust: TrustOption = None,
) -> None:
    """Verify a bundle, a checkpoint or a Triton model repository and print what it is as JSON."""
    if path.suffix == ".safetensors":
        if trust is not None:
            raise SpecError("checkpoints aren't signed, and --trust is for bundles. Leave it away.")
        from chexnet_deploy.pipeline import open_torch_room

        typer.echo(open_torch_room().read_checkpoint(path).manifest.model_dump_json(indent=2))
        return
    from chexnet_deploy.bundle import Bundle
    from chexnet_deploy.serving.triton import check_repository, is_repository

    if is_repository(path):
        models = check_repository(path, trust=read_trust(trust))
        print_json({m.name: {"device": m.device, "versions": {v: b.id for v, b in m.versions.items()}} for m in models})
        return
    bundle = Bundle.open(path, trust=read_trust(trust))
    print_json({"id": bundle.id, **json.loads(bundle.manifest.model_dump_json())})


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine can run, and what to install for the rest."""
    from dataclasses import asdict

    from chexnet_deploy.doctor import examine

    abilities = examine()
    if as_json:
        print_json([asdict(ability) for ability in abilities])
        return
    for ability in abilities:
        typer.echo(f"{'yes' if ability.is_ready else 'no ':3}  {ability.name}: {ability.found}")
        if ability.next_step:
            typer.echo(f"     {ability.next_step}")


app.add_typer(cli_signing.app)
app.add_typer(cli_serving.app)


@app.command()
def node(
    config: Annotated[Path, typer.Argument(help="The node's TOML file.")],
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print a hardened systemd unit for it, and do nothing else.")
    ] = False,
) -> None:
    """Run a DICOM node: radiographs in by C-STORE, results out by C-STORE, until SIGTERM."""
    try:
        from chexnet_deploy.node import program
    except ModuleNotFoundError as err:
        raise MissingPackageError(f"{err.name} is not installed. Run: pip install 'chexnet-deploy[node]'") from err

    if print_unit:
        typer.echo(program.print_unit(config, Path(sys.argv[0]).absolute()), nl=False)
        return
    raise typer.Exit(program.run(config))


audit_app = typer.Typer(no_args_is_help=True, help="Check a node's audit log.")
app.add_typer(audit_app, name="audit")


@audit_app.command("verify")
def verify_audit(
    file: Annotated[Path, typer.Argument(help="The log, audit.jsonl in the node's folder.")],
    head: Annotated[
        str | None, typer.Option(help="The hash that its last line must have, as noted elsewhere; default: FILE.head.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Detect every edit, deletion, changed order and, by its head, lines cut from the end; print the head."""
    from chexnet_deploy.node.audit import verify_file

    found = verify_file(file, head)
    if as_json:
        print_json({"lines": found.seq, "head": found.hash})
        return
    typer.echo(f"{file}  {found.seq} lines  head {found.hash}")


def main() -> None:
    """Run the command line."""
    run_program(app)


def _release(line: str | None, number: int | None) -> "Release | None":
    """Return the release that two options name, or none."""
    from pydantic import ValidationError

    from chexnet_deploy.signing.release import Release

    if line is None and number is None:
        return None
    if line is None or number is None:
        raise SpecError("found one of --line and --release, needed both or neither. Give the other too.")
    try:
        return Release(line=line, number=number)
    except ValidationError as err:
        first = err.errors()[0]
        raise SpecError(f"--{'line' if 'line' in first['loc'] else 'release'}: {first['msg']}. Correct it.") from err


def _open_ray_room() -> "ModuleType":
    try:
        from chexnet_deploy.serving import ray_cluster
    except ModuleNotFoundError as err:
        raise MissingPackageError(f"{err.name} is not installed. Run: pip install 'chexnet-deploy[ray]'") from err
    return ray_cluster
