"""Turn a bench run into one self-contained HTML page: verdicts, tables, ROC curves, latency histogram, CAM pictures.

The matplotlib room. Computes nothing that isn't in the report or read off its scores.
"""

import base64
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image

from chexnet_deploy.bench import REFERENCE, BenchReport, BenchRun, summary_rows
from chexnet_deploy.files import write_file
from chexnet_deploy.images import read_image
from chexnet_deploy.metrics.auroc import roc_curve
from chexnet_deploy.predictor import Predictor, draw_cam, sigmoid

N_CAM_PICTURES = 6
_CAM_SIDE_PX = 320
_DASHES = ("-", "--", ":", "-.")


def write_html(path: Path, run: BenchRun, predictor: Predictor) -> None:
    """Write the page.

    Args:
        path: of the .html file.
        run: what to show.
        predictor: of the engine whose activation maps are shown.
    """
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    write_file(
        path,
        page.render(
            report=run.report,
            rows=summary_rows(run.report),
            roc=_png(_draw_roc(run)) if run.images is not None else None,
            latency=_png(_draw_latency(run.report)),
            cams=_draw_cams(run, predictor),
        ).encode(),
    )


def _draw_roc(run: BenchRun) -> Figure:
    assert run.images is not None
    findings = run.report.findings
    columns = min(5, len(findings))
    rows = -(-len(findings) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.7 * rows), layout="constrained")
    names = [REFERENCE, *(engine.name for engine in run.report.engines)]
    for c, finding in enumerate(findings):
        axes = figure.add_subplot(rows, columns, c + 1)
        truth = run.images.truth[:, c]
        axes.set_title(f"{finding} (n+ = {int(truth.sum())})", fontsize=8)
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        if truth.any() and not truth.all():
            for i, name in enumerate(names):
                x, y = roc_curve(sigmoid(run.logits[name][:, c]), truth)
                axes.plot(x, y, _DASHES[i % len(_DASHES)], label=name, linewidth=1.2)
        else:
            axes.text(0.5, 0.5, "undefined", ha="center")
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1], aspect="equal")
    figure.axes[0].legend(fontsize=6, loc="lower right")
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    return figure


def _draw_latency(report: BenchReport) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.add_subplot()
    everything = np.concatenate([engine.single_stream.samples_ms for engine in report.engines])
    # Up to the 99th percentile: one slow run would squeeze the rest into a single bar. The table has the tail.
    bins = np.linspace(everything.min() * 0.98, np.percentile(everything, 99), 60).tolist()
    for engine in report.engines:
        label = f"{engine.name} (emulated)" if engine.is_emulated else engine.name
        axes.hist(engine.single_stream.samples_ms, bins=bins, alpha=0.55, label=label)
    axes.set(xlabel="ms for one image, batch 1 (slowest 1 % not drawn)", ylabel="runs")
    axes.legend(fontsize=8)
    return figure


def _draw_cams(run: BenchRun, predictor: Predictor) -> list[dict[str, str]]:
    """Return pictures of the surest true positives, one a finding, the surest first."""
    if run.images is None:
        return []
    probabilities = sigmoid(run.logits[run.report.engines[-1].name])
    where_true = np.where(run.images.truth, probabilities, -1.0)
    best = [
        (where_true[:, c].max(), int(where_true[:, c].argmax()), name) for c, name in enumerate(run.report.findings)
    ]
    pictures = []
    for probability, row, finding in sorted((b for b in best if b[0] >= 0), reverse=True)[:N_CAM_PICTURES]:
        gray = read_image(run.images.paths[row])
        overlay = draw_cam(gray, predictor.predict(gray).maps[finding])
        pair = np.concatenate([np.repeat(gray[..., None], 3, axis=2), overlay], axis=1)
        picture = Image.fromarray(pair).resize((2 * _CAM_SIDE_PX, _CAM_SIDE_PX), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        caption = f"{finding}: {probability:.2f} ({run.images.names[row]})"
        pictures.append({"caption": caption, "uri": _uri(buffer.getvalue(), "jpeg")})
    return pictures


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": 110}):
        figure.savefig(buffer, format="png")
    return _uri(buffer.getvalue(), "png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>chexnet-deploy bench: {{ report.verdict }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: .6rem 0 1.4rem } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd;
text-align: left; font-variant-numeric: tabular-nums } .PASS, .pass { color: #126b2e } .FAIL, .fail { color: #b00020 }
.INCONCLUSIVE { color: #8a5a00 } img { max-width: 100% } figure { display: inline-block; margin: .4rem; width: 350px }
figcaption { font-size: 13px } code { font-size: 13px } .small { color: #555; font-size: 13px }
</style></head><body>
<h1>Bench: <span class="{{ report.verdict }}">{{ report.verdict }}</span></h1>
<p>{{ report.finished_utc }}. {{ report.data }}{% if report.images_sha256 %} (names' sha256
<code>{{ report.images_sha256[:16] }}</code>){% endif %}.
{{ report.machine.processor }}, {{ report.machine.cores }} cores, {{ report.machine.system }};
{% for name, number in report.machine.packages.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.</p>
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<p class="small">p50 and p99: batch 1, {{ report.engines[0].single_stream.samples_ms|length }} runs each,
{{ report.threads or "all" }} threads. images/s: batch {{ report.engines[0].offline.batch_size }}.
"PASS on k of n": k findings had enough positive patients to be judged. "emulated": the backend
runs this precision's convolutions as float, so the speed says nothing of the precision. max |Δp|: largest probability
difference to the fp32 reference over all images and findings. flips: decisions that differ at the operating points.</p>
{% for engine in report.engines %}
<h2>{{ engine.name }}: <span class="{{ engine.verdict }}">{{ engine.verdict }}</span></h2>
{% for reason in engine.reasons %}<p>{{ reason }}</p>{% endfor %}
<p class="small">bundle <code>{{ engine.bundle_id[:16] }}</code>, model <code>{{ engine.model_sha256[:16] }}</code>;
convolutions run in {% for type, n in engine.conv_types.items() %}{{ type }}: {{ n }} {% endfor %};
known answers within {{ "%.2g"|format(engine.known_answer_error) }} logits.
Had to pass: {{ engine.spec.description }} max |Δp| at most {{ engine.spec.gate.max_abs_probability_difference }}, 99.9 % of
|Δp| at most {{ engine.spec.gate.p999_abs_probability_difference }}, findings with at least
{{ engine.spec.gate.min_positive_patients }} positive patients within their margins; latency: {{ engine.spec.gate.latency }}.
A convolution count above 121 holds BatchNorms that the backend runs as convolutions.</p>
{% if engine.card and engine.target %}
<p class="small">Plan for {{ engine.target.gpu }} (compute capability {{ engine.target.compute_capability }}),
{{ engine.target.backend }} {{ engine.target.tensorrt }}, driver's CUDA {{ engine.target.driver }},
{{ engine.target.platform }}; built in {{ "%.1f"|format(engine.card.build_s) }} s,
{{ "%.1f"|format(engine.card.plan_bytes / 1048576) }} MiB, {{ engine.card.n_layers }} layers,
batch {{ engine.card.batch|join(" / ") }}, {{ engine.card.n_reformats }} reformats,
{{ "%.1f"|format(engine.card.activation_bytes / 1048576) }} MiB of activations a lane.
Not in {{ engine.precision.type_name }}: {{ engine.card.fallbacks|join(", ") or "none" }}.
{%- if engine.stage_times_ms %} One image on the GPU's clock:
{% for name, ms in engine.stage_times_ms.items() %}
{{ name }} {{ "%.3f"|format(ms) }} ms{{ ", " if not loop.last }}{% endfor %}.{% endif %}
{%- for warning in engine.card.warnings %} TensorRT warned: {{ warning }}.{% endfor %}</p>
{% endif %}
{% if engine.parity %}
<table><tr><th>finding</th><th>positives</th><th>positive patients</th>
<th>AUROC fp32</th><th>AUROC {{ engine.name }}</th><th>difference</th>
<th>margin</th><th>flips</th><th>verdict</th></tr>
{% for f in engine.parity.findings %}
<tr><td>{{ f.finding }}</td><td>{{ f.n_positive }}</td><td>{{ f.n_positive_patients }}</td>
<td>{{ "undefined" if f.auroc_reference is none else "%.4f"|format(f.auroc_reference) }}</td>
<td>{{ "undefined" if f.auroc_candidate is none else "%.4f"|format(f.auroc_candidate) }}</td>
<td>{{ "undefined" if f.difference is none else "%+.4f"|format(f.difference) }}</td><td>{{ f.margin }}</td>
<td>{{ "no operating point" if f.n_flips is none else f.n_flips }}</td><td class="{{ f.verdict }}">{{ f.verdict }}</td></tr>
{% endfor %}</table>
<p class="small">{{ engine.parity.n_images }} images of {{ engine.parity.n_patients }} patients.
max |Δlogit| {{ "%.2g"|format(engine.parity.max_abs_logit_difference) }},
99.9 % of |Δp| within {{ "%.4f"|format(engine.parity.p999_abs_probability_difference) }}.
AUROC differences are points without intervals.</p>
{% endif %}{% endfor %}
<h2>Latency</h2><img alt="latency histogram" src="{{ latency }}">
{% if roc %}<h2>ROC curves</h2><img alt="ROC curves" src="{{ roc }}">{% endif %}
{% if cams %}<h2>Where {{ report.engines[-1].name }} looks</h2>
<p class="small">Class activation maps of the surest true positives, one a finding. Only evidence for the finding is coloured.</p>
{% for cam in cams %}<figure><img alt="{{ cam.caption }}" src="{{ cam.uri }}"><figcaption>{{ cam.caption }}</figcaption></figure>
{% endfor %}{% endif %}
<p class="small">Not a medical device. This page is evidence about a model file, not about patients.</p>
</body></html>
"""
