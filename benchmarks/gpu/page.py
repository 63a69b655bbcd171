"""One HTML page of the GPU benchmark's results, by a template alone: `python -m benchmarks.gpu.page RESULTS.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import ChainableUndefined, Environment

from chexnet_deploy.files import write_file
from chexnet_deploy.terminal import run_program

app = typer.Typer(add_completion=False)


@app.command()
def main(results: Annotated[Path, typer.Argument(help="JSON that benchmarks.gpu wrote.")]) -> None:
    """Write the page beside the results."""
    page = results.with_suffix(".html")
    write_page(page, json.loads(results.read_text()))
    typer.echo(str(page))


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the .html file.
        results: what benchmarks.gpu measured.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=ChainableUndefined)
    timings = [
        {
            "row": name,
            "batch": size,
            "variant": variant,
            "entry": timing,
            "whole": entry,
            "parity": row.get("parity", {}),
        }
        for name, row in results["rows"].items()
        for size, entry in row.get("batches", {}).items()
        for variant, timing in entry["variants"].items()
    ]
    fastest = max((timing["entry"]["images_per_s"] for timing in timings), default=1.0)
    page = environment.from_string(_TEMPLATE)
    write_file(path, page.render(results=results, timings=timings, fastest=fastest).encode())


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>chexnet-deploy on a GPU</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: .6rem 0 1.4rem } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd;
text-align: left; white-space: nowrap; font-variant-numeric: tabular-nums }
.bad { color: #b00020 } .small { color: #555; font-size: 13px }
.bar { background: #3b6ea8; height: .7rem } td.bars { width: 12rem }
</style></head><body>
<h1>chexnet-deploy on {{ results.gpu.name if results.gpu else "a CPU (dry run)" }}</h1>
<p class="small">{% if results.gpu %}Driver {{ results.gpu.driver_version }}, {{ results.gpu["memory.total"] }}, power limit
{{ results.gpu["power.limit"] }}. {% endif %}{{ results.machine.processor }}, {{ results.machine.cores }} cores,
Python {{ results.python }}. Parity on {{ results.n_images }} labelled images
{%- if results.n_more_images %} and {{ results.n_more_images }} without labels{% endif %}, against
fp32 in ONNX Runtime on the CPU.</p>
<table>{% for name, value in results.summary.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Speed</h2>
<p class="small">Variants of one row were timed in turns. graphs: CUDA graphs; plain: without; bare: the least that runs the
plan. One lane: array in, arrays out, copies included. In flight: the row's first variant from two and three threads. GPU ms:
medians by CUDA events. p99 from 100 runs on. PyTorch draws no maps.</p>
<table><tr><th>row</th><th>batch</th><th>variant</th><th>p50 ms</th><th>p90 ms</th><th>p99 ms</th><th>images/s</th><th></th>
<th>GPU ms: upload / compute / download</th><th>in flight, images/s</th><th>after idle, ms</th><th>mJ/image</th><th>W, at rest</th>
<th>MiB</th><th>SM MHz</th><th>valid</th></tr>
{% for t in timings %}
<tr><td>{{ t.row }}</td><td>{{ t.batch }}</td><td>{{ t.variant }}</td>
<td>{{ "%.3f"|format(t.entry.p50_ms) }}</td><td>{{ "%.3f"|format(t.entry.p90_ms) }}</td>
<td>{{ "%.3f"|format(t.entry.p99_ms) if t.entry.p99_ms is number else "-" }}</td>
<td>{{ "%.0f"|format(t.entry.images_per_s) }}</td>
<td class="bars"><div class="bar" style="width: {{ "%.1f"|format(100 * t.entry.images_per_s / fastest) }}%"></div></td>
<td>{% for ms in t.entry.stages_ms.values() %}{{ "%.3f"|format(ms) }}{{ " / " if not loop.last }}{% endfor %}</td>
{% if loop.changed(t.row ~ t.batch) %}
<td>{% for n, speed in t.whole.in_flight_images_per_s.items() %}{{ n }}: {{ "%.0f"|format(speed) }} {% endfor %}</td>
<td>{% if t.whole.after_idle_ms %}{{ "%.2f"|format(t.whole.after_idle_ms[t.variant]) }}{% endif %}</td>
{% set held = t.whole.sustained %}
<td>{% if held.mj_per_image is number %}{{ "%.1f"|format(held.mj_per_image) }}{% endif %}</td>
<td>{% if held.power_w is number %}{{ "%.0f"|format(held.power_w) }}{% endif %}
{% if held.idle_w is number %}, {{ "%.0f"|format(held.idle_w) }}{% endif %}</td>
<td>{% if t.whole.clocks.memory_mib %}{{ "%.0f"|format(t.whole.clocks.memory_mib) }}{% endif %}</td>
<td>{{ (t.whole.clocks.sm_mhz or [])|join(" to ") }}</td>
<td class="{{ "bad" if t.whole.clocks.invalid }}">{{ t.whole.clocks.invalid or t.whole.clocks.note or "yes" }}</td>
{% else %}<td></td><td></td><td></td><td></td><td></td><td></td><td></td>{% endif %}</tr>
{% endfor %}</table>
<h2>Parity and engines</h2>
<table><tr><th>row</th><th>parity</th><th>max |Δp|</th><th>flips</th><th>unlabelled: max |Δp|</th><th>convolutions</th>
<th>kernels</th><th>reformats</th><th>MB an image</th><th>fell back</th><th>plan MiB</th><th>built in s</th><th></th></tr>
{% for name, row in results.rows.items() %}
<tr><td>{{ name }}</td><td>{{ row.parity.summary or row.parity.error }}</td>
{% set gap = row.parity.max_abs_probability_difference %}
<td>{% if gap is number %}{{ "%.4f"|format(gap) }}{% endif %}</td><td>{{ row.parity.n_flips }}</td>
{% set gap = row.parity.more_images.max_abs_probability_difference %}
<td>{% if gap is number %}{{ "%.4f"|format(gap) }}{% endif %}</td>
{% if row.engine %}<td>{% for kind, n in row.engine.conv_types.items() %}{{ n }} {{ kind }} {% endfor %}</td>
<td>{{ row.engine.n_kernels }}</td><td>{{ row.engine.n_reformats }}</td>
<td>{% if row.engine.bytes_per_image %}{{ "%.1f"|format(row.engine.bytes_per_image / 1e6) }}{% endif %}</td>
<td>{{ row.engine.fallbacks|join(", ") }}</td>
<td>{{ "%.1f"|format(row.engine.plan_bytes / 1048576) }}</td><td>{{ "%.1f"|format(row.engine.build_s) }}</td>
{% else %}<td></td><td></td><td></td><td></td><td></td><td></td><td></td>{% endif %}
<td class="bad">{{ row.error or row.skipped }}</td></tr>
{% endfor %}</table>
<h2>Invariance and memory</h2>
<table><tr><th>row</th><th>slots, neighbours, threads: max |Δlogit|</th><th>growth over runs</th></tr>
{% for name, row in results.rows.items() if row.invariance %}
<tr><td>{{ name }}</td><td>{{ "%.2g, %.2g, %.2g"|format(row.invariance.slots.max_abs_logit_difference,
row.invariance.neighbours.max_abs_logit_difference, row.invariance.threads.max_abs_logit_difference) }}</td>
<td>{% if row.growth %}host {{ "%.1f"|format(row.growth.host_mib) }} MiB, device {{ "%.1f"|format(row.growth.device_mib) }} MiB
over {{ row.growth.n_runs }}{% endif %}</td></tr>
{% endfor %}</table>
<p class="small">Not a medical device. Figures hold for this machine alone.</p>
</body></html>
"""


if __name__ == "__main__":
    run_program(app)
