"""bench and evaluate."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.cli.options import (
    ContractOption,
    DataOption,
    ImagesOption,
    JsonFlag,
    OnProvider,
    ProviderName,
    Threads,
    TrustOption,
    read_trust,
)
from chexnet_deploy.cli.printing import print_evaluation, print_record
from chexnet_deploy.errors import require
from chexnet_deploy.terminal import cancellation, progress

app = typer.Typer()


class SplitName(str, Enum):
    """Which patients."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@app.command(epilog="Example: chexnet-deploy bench --engine bundles/int8 --data ROOT --out bench")
def bench(
    engine: Annotated[
        list[str],
        typer.Option(help="A bundle, ONNX file or http://HOST/v2/models/NAME; again to measure several in turns."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="What it is compared with, likewise; default: its fp32 ancestor, found beside the first."),
    ] = None,
    contract: ContractOption = None,
    reference_contract: Annotated[
        Path | None, typer.Option(help="The reference's own contract; default: that of --contract.")
    ] = None,
    data: DataOption = None,
    split: Annotated[SplitName, typer.Option(help="Whose images.")] = SplitName.TEST,
    images: ImagesOption = None,
    dicom: Annotated[
        Path | None,
        typer.Option(help="Folder of DICOM radiographs: time bundles from file to structured report too, by stage."),
    ] = None,
    spec: Annotated[str | None, typer.Option(help="A spec's name or .toml; default: that of the precision.")] = None,
    builds: Annotated[
        int | None,
        typer.Option(min=1, help="Build so many plans of each engine here, into OUT-plans; the worst decides."),
    ] = None,
    out: Annotated[Path, typer.Option(help="New folder for reports, attestations and the logits.")] = Path("bench"),
    html: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
    min_runs: Annotated[int, typer.Option(min=1, help="Rounds at the least.")] = 100,
    min_duration_s: Annotated[float, typer.Option(min=0.0, help="Seconds for each engine and scenario.")] = 3.0,
    trust: TrustOption = None,
    threads: Threads = None,
    provider: OnProvider = ProviderName.AUTO,
    as_json: JsonFlag = False,
) -> None:
    """Prove an engine on this machine: accuracy beside its reference, and latency; PASS, FAIL or INCONCLUSIVE."""
    from chexnet_deploy.evaluation import bench
    from chexnet_deploy.evaluation.engines import Effort
    from chexnet_deploy.evaluation.parity import EXIT_CODES

    measure_dicom = None
    if dicom is not None:
        with require("dicom-out"):
            from chexnet_deploy.dicom.results.measure import DicomFolder
        measure_dicom = DicomFolder.open(dicom).measure
    trusted = read_trust(trust)
    engines = engine
    with progress() as on_phase:
        if builds is not None:
            from chexnet_deploy.bundle import Bundle, find_reference
            from chexnet_deploy.export.chain import build_plans

            before_pass = None if trusted is None else trusted.without_pass()
            if reference is None:
                first = Bundle.open(Path(engine[0]), trust=before_pass)
                reference = str(find_reference(first, trust=before_pass).path)
            elif before_pass is not None:
                Bundle.open(Path(reference), trust=before_pass)
            folder = out.parent / f"{out.name}-plans"
            with cancellation() as cancelled:
                engines = [
                    str(plan.path)
                    for path in engine
                    for plan in build_plans(
                        Path(path), folder, builds, spec, trust=trusted, cancelled=cancelled, on_phase=on_phase
                    )
                ]
            trusted = None  # the reference and what they are built of have shown it; plans are signed after `bench`
        report = bench(
            engines,
            reference,
            data,
            split.value,
            images,
            spec,
            out,
            effort=Effort(min_runs, min_duration_s),
            measure_dicom=measure_dicom,
            contract=contract,
            reference_contract=reference_contract,
            trust=trusted,
            threads=threads,
            provider=provider.value,
            with_html=html,
            on_phase=on_phase,
        )
    if as_json:
        print_record(report)
    else:
        from chexnet_deploy.evaluation.bench_report import print_bench

        print_bench(report, out / ("report.html" if html else "report.json"))
    raise typer.Exit(EXIT_CODES[report.verdict])


@app.command(epilog="Example: chexnet-deploy evaluate bundles/int8 --data ROOT --out evaluation")
def evaluate(
    engine: Annotated[
        str | None,
        typer.Argument(help="A bundle, ONNX file or http://HOST/v2/models/NAME to run; or give --predictions."),
    ] = None,
    contract: ContractOption = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Anyone's CSV: Image Index and a column a finding, or image, finding, score.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Of the predictions: any table that --data takes; default: that in --data.")
    ] = None,
    data: DataOption = None,
    split: Annotated[
        SplitName | None, typer.Option(help="Whose images; default: test of an engine, all of predictions.")
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
    """Measure an engine, or anyone's predictions, on labelled images: AUROC with intervals clustered by patient.

    Beside it AUPRC, calibration, decisions and subgroups; with --readers the reader study of the CheXNet paper.
    """
    from chexnet_deploy.evaluation import evaluate as run
    from chexnet_deploy.evaluation.request import EvaluationRequest

    request = EvaluationRequest(
        engine=engine,
        contract=contract,
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
        print_record(result)
        return
    print_evaluation(result)
    if out is not None:
        typer.echo(str(out / ("report.html" if html else "report.json")))
