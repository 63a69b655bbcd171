"""Where a single int8 image spends its time on OpenVINO, by type of layer: ours beside NNCF's, and both beside the arithmetic.

    python -m benchmarks.cpu.layers WORK      writes results/layers-cpu.json
    python -m benchmarks.cpu.layers --table   prints it as docs/measurements.md shows it

WORK is the folder that `benchmarks.cpu.peers --work` keeps. Both run in turns, timed as there; then in turns with OpenVINO's
counters. Each set of instructions is a process of its own, as oneDNN reads it once. The limit is what the convolutions'
multiplications would take if all ran as fast as the fastest tenth of them, by time, does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import numpy as np
import openvino
import typer

from benchmarks.common import RESULTS, write_results
from benchmarks.int8.accuracy import cores
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.terminal import run_program

OUT = RESULTS / "layers-cpu.json"
ISAS: Final = ("DEFAULT", "AVX512_CORE_VNNI", "AVX2")
OURS, NNCF = "ours, int8", "OpenVINO, NNCF int8 (PERFORMANCE)"
_CHILD: Final = "CHEXNET_LAYERS"
_KINDS: Final = ("Convolution", "Subgraph", "Concat", "FakeQuantize", "AvgPool")
_PROFILES = 30

app = typer.Typer(add_completion=False)


@app.command()
def main(
    work: Annotated[Path | None, typer.Argument(help="Folder of peers.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of each batch size.")] = 40,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = OUT,
    table: Annotated[bool, typer.Option("--table", help="Print the committed results and stop.")] = False,
) -> None:
    """Measure by each set of instructions, print and write."""
    if table:
        typer.echo(markdown_table(json.loads(OUT.read_text())))
        return
    if work is None:
        raise typer.BadParameter("give the folder that peers keeps")
    if _CHILD in os.environ:
        typer.echo(json.dumps(measure(work, rounds)))
        return
    results: dict[str, Any] = {}
    for isa in ISAS:
        environment = {**os.environ, _CHILD: "1", "ONEDNN_MAX_CPU_ISA": isa}
        command = [sys.executable, "-m", "benchmarks.cpu.layers", str(work), "--rounds", str(rounds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[isa] = json.loads(done.stdout)
    typer.echo(write_results(out, {"threads": cores(), "rounds": rounds, "isas": results}))


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Return medians of both engines, the median of the ratios, and the profiles."""
    # Here, as the table is printed without torch.
    from benchmarks.cpu.peers_engines import Engine, _openvino_peer, _session, time_in_turns
    from benchmarks.cpu.peers_models import Models, Prepared, peer_model

    bundle = Bundle.open(work / "bundles" / "int8-cpu")
    pixels = bundle.read_probe().pixels
    unknown = Prepared(
        n_calibration_images=0, n_test_images=0, fp32_mean_auroc=0.0, accuracy={}, nncf_with_open_batch=0.0
    )
    models = Models(None, work, pixels, unknown)  # type: ignore[arg-type]  # torch doesn't run here
    engines: list[Engine] = [_session(models, OURS), _openvino_peer(models, NNCF)]
    samples = time_in_turns(engines, pixels, {1: rounds, 16: max(3, rounds // 2)})
    own, peer = samples
    requests = {
        name: _profiled(model, pixels.shape[-1])
        for name, model in ((OURS, openvino.Core().read_model(bundle.read_model())), (NNCF, peer_model(work, NNCF)))
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in requests}
    for i in range(_PROFILES):
        for name, request in requests.items():
            request.infer({0: pixels[i % len(pixels)][None]})  # the other's weights leave the cache
            request.infer({0: pixels[i % len(pixels)][None]})
            runs[name].append(_by_node(request))
    return {
        "ms_per_image": {
            name: {str(batch): median(times) for batch, times in each.items()}
            for name, each in zip((OURS, NNCF), samples, strict=True)
        },
        "ours_is_faster": {
            str(batch): median(b / a for a, b in zip(own[batch], peer[batch], strict=True)) for batch in own
        },
        "profiles": {name: _summary(requests[name], runs[name]) for name in requests},
    }


def markdown_table(found: Mapping[str, Any]) -> str:
    """Return the results as a table for people."""
    lines = [
        f"| instructions | engine | batch 1 | batch 16 | {' | '.join(_KINDS)} | others | arithmetic limit |",
        f"|---|---|---|---|{'---|' * len(_KINDS)}---|---|",
    ]
    for isa, each in found["isas"].items():
        for name, profile in each["profiles"].items():
            times, gain = each["ms_per_image"][name], each["ours_is_faster"]
            shown = [f"{times[b]:.1f} ms" + (f", {gain[b]:.2f} x" if name == OURS else "") for b in ("1", "16")]
            ms = profile["ms"]
            parts = [f"{ms[kind]:.2f} ({profile['layers'][kind]})" if kind in ms else "" for kind in _KINDS]
            parts.append(f"{sum(took for kind, took in ms.items() if kind not in _KINDS):.2f}")
            limit = f"{profile['limit_ms']:.1f} ms for {profile['gmac']:.2f} GMAC"
            lines.append(f"| {isa} | {name} | {' | '.join(shown)} | {' | '.join(parts)} | {limit} |")
    machine = found["machine"]
    lines += [
        "",
        f"ms of a single image by type of layer, with how many of them; {found['threads']} threads; {machine['processor']}, "
        f"OpenVINO {machine['packages']['openvino']}. x: ours is faster, median of {found['rounds']} rounds' ratios.",
    ]
    return "\n".join(lines)


def _profiled(model: Any, side_px: int) -> Any:
    model.reshape([1, 1, side_px, side_px])
    settings = {
        "INFERENCE_NUM_THREADS": cores(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": True,
    }
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def _by_node(request: Any) -> dict[str, float]:
    """Return ms of each layer that ran."""
    return {info.node_name: info.real_time.total_seconds() * 1e3 for info in request.profiling_info}


def _summary(request: Any, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return ms and number of layers by type, and how long the multiplications would take at the fastest rate."""
    ms = {name: median(run[name] for run in runs) for name in runs[0]}
    by_kind: dict[str, float] = {}
    layers: dict[str, int] = {}
    for info in request.profiling_info:
        if ms[info.node_name]:
            by_kind[info.node_type] = by_kind.get(info.node_type, 0.0) + ms[info.node_name]
            layers[info.node_type] = layers.get(info.node_type, 0) + 1
    macs = _macs(request)
    timed = sorted((macs[name] / ms[name], ms[name], macs[name]) for name in macs if ms.get(name))
    total, spent, rates = sum(took for _, took, _ in timed), 0.0, []
    for rate, took, _ in reversed(timed):
        rates.append(rate)
        spent += took
        if spent >= total / 10:
            break
    gmac = sum(macs.values()) / 1e9
    return {"ms": by_kind, "layers": layers, "gmac": gmac, "limit_ms": gmac * 1e9 / float(np.mean(rates))}


def _macs(request: Any) -> dict[str, float]:
    """Return the multiplications of each convolution in the graph that OpenVINO compiled."""
    found = {}
    for node in request.get_compiled_model().get_runtime_model().get_ops():
        if str(node.get_rt_info()["layerType"].astype(str)) == "Convolution" and node.get_input_size() > 1:
            per_output = np.prod(list(node.input(1).get_shape())[1:])
            found[node.get_friendly_name()] = float(np.prod(list(node.output(0).get_shape())) * per_output)
    return found


if __name__ == "__main__":
    run_program(app)
