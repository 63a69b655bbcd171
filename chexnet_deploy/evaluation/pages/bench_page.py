"""Turn a bench run into one self-contained HTML page: verdicts, tables, ROC curves, latency histogram, CAM pictures.

Computes nothing that isn't in the report or read off its scores.
"""

import io
from pathlib import Path

import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image

from chexnet_deploy.evaluation.bench_report import BenchReport, BenchRun, EngineResult, summary_rows
from chexnet_deploy.evaluation.engines import REFERENCE
from chexnet_deploy.evaluation.pages.style import CSS, DASHES, png, uri
from chexnet_deploy.files import write_file
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.metrics.roc import roc_curve
from chexnet_deploy.runtime.predictor import Predictor, draw_cam
from chexnet_deploy.runtime.sessions.base import sigmoid

N_CAM_PICTURES = 6
_CAM_SIDE_PX = 320


def write_html(path: Path, run: BenchRun, predictor: Predictor | None) -> None:
    """Write the page.

    Args:
        path: of the .html file.
        run: what to show.
        predictor: of the last engine, whose activation maps are shown; None where it has none.
    """
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    write_file(
        path,
        page.render(
            css=CSS,
            report=run.report,
            rows=summary_rows(run.report),
            forests=[None if engine.parity is None else png(_draw_forest(engine)) for engine in run.report.engines],
            roc=png(_draw_roc(run)) if run.images is not None else None,
            latency=png(_draw_latency(run.report)),
            cams=[] if predictor is None else _draw_cams(run, predictor),
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
        known = run.images.labelled[:, c]
        truth = run.images.truth[known, c]
        axes.set_title(f"{finding} (n+ = {int(truth.sum())})", fontsize=8)
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        if truth.any() and not truth.all():
            for i, name in enumerate(names):
                x, y = roc_curve(sigmoid(run.logits[name][known, c]), truth)
                axes.plot(x, y, DASHES[i % len(DASHES)], label=name, linewidth=1.2)
        else:
            axes.text(0.5, 0.5, "undefined", ha="center")
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1], aspect="equal")
    drawn = next((axes for axes in figure.axes if axes.get_legend_handles_labels()[0]), None)
    if drawn is not None:  # the first finding's curve may be undefined, and every one's
        drawn.legend(fontsize=6, loc="lower right")
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    return figure


def _draw_forest(engine: EngineResult) -> Figure:
    """Differences with intervals; a finding passes whose interval lies right of its margin's tick."""
    assert engine.parity is not None
    findings = engine.parity.findings
    figure = Figure(figsize=(8, 0.32 * len(findings) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for row, finding in enumerate(findings):
        axes.plot([-finding.margin] * 2, [row - 0.35, row + 0.35], color="black", linewidth=1.6)
        if finding.difference is None or finding.difference_low is None or finding.difference_high is None:
            axes.text(0.0, row, "undefined ", ha="right", va="center", fontsize=8, color="0.4")
            continue
        is_judged = finding.verdict != "not assessable"
        axes.plot([finding.difference_low, finding.difference_high], [row] * 2, color="0.2" if is_judged else "0.7")
        axes.plot(finding.difference, row, "o", color="0.2" if is_judged else "0.7", markersize=5)
    axes.axvline(0.0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(findings)), [finding.finding for finding in findings], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"AUROC {engine.name} - AUROC reference, 95 % interval; tick: minus the margin; gray: not assessable",
        fontsize=8,
    )
    axes.tick_params(axis="x", labelsize=8)
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
        pictures.append({"caption": caption, "uri": uri(buffer.getvalue(), "jpeg")})
    return pictures


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>chexnet-deploy bench: {{ report.verdict }}</title>
<style>
{{ css }}</style></head><body>
<h1>Bench: <span class="{{ report.verdict }}">{{ report.verdict }}</span></h1>
<p>{{ report.finished_utc }}. {{ report.data }}{% if report.images_sha256 %} (names' sha256
<code>{{ report.images_sha256[:16] }}</code>){% endif %}.
{{ report.patients_note }} {% for note in report.notes %}{{ note }} {% endfor %}
{{ report.machine.processor }}, {{ report.machine.cores }} cores, {{ report.machine.system }};
{% for name, number in report.machine.packages.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}{% endfor %}.</p>
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<p class="small">p50 and p99: batch 1, {{ report.engines[0].single_stream.samples_ms|length }} runs each,
{{ report.threads or "all" }} threads. images/s: batch {{ report.engines[0].offline.batch_size }}.
"PASS on k of n": k findings had enough positive patients to be judged. "emulated": the backend
runs this precision's convolutions as float, so the speed says nothing of the precision. max |Δp|: largest probability
difference to the reference over all images and findings. flips: decisions that differ at the operating points.</p>
{% for engine in report.engines %}
<h2>{{ engine.name }}: <span class="{{ engine.verdict }}">{{ engine.verdict }}</span></h2>
{% for reason in engine.reasons %}<p>{{ reason }}</p>{% endfor %}
<p class="small">{{ "contract" if engine.contract else "bundle" }} <code>{{ engine.bundle_id[:16] }}</code>, model
<code>{{ engine.model_sha256[:16] if engine.model_sha256 else "unknown" }}</code>;
convolutions run in {% for type, n in engine.conv_types.items() %}{{ type }}: {{ n }} {% else %}unknown types{% endfor %}
{%- if engine.known_answer_error is not none %};
known answers within {{ "%.2g"|format(engine.known_answer_error) }} logits{% endif %}.
Had to pass: {{ engine.spec.description }} The limits below, findings with at least
{{ engine.spec.gate.min_positive_patients }} positive patients within their margins; latency: {{ engine.spec.gate.latency }}.
{% if not engine.contract %}A convolution count above 121 holds BatchNorms that the backend runs as convolutions.{% endif %}</p>
{% if engine.card and engine.target %}
<p class="small">Plan for {{ engine.target.gpu }} (compute capability {{ engine.target.compute_capability }}),
{{ engine.target.backend }} {{ engine.target.tensorrt }}, driver's CUDA {{ engine.target.driver }},
{{ engine.target.platform }}; built in {{ "%.1f"|format(engine.card.build_s) }} s,
{{ "%.1f"|format(engine.card.plan_bytes / 1048576) }} MiB, {{ engine.card.n_kernels }} kernels,
{% if engine.card.bytes_per_image %}{{ "%.2f"|format(engine.card.bytes_per_image / 1e6) }} MB moved an image,
{% endif %}batch {{ engine.card.batch|join(" / ") }}, {{ engine.card.n_reformats }} reformats,
{{ "%.1f"|format(engine.card.activation_bytes / 1048576) }} MiB of activations a lane.
Not in {{ engine.precision.type_name }}: {{ engine.card.fallbacks|join(", ") or "none" }}.
{%- if engine.stage_times_ms %} One image on the GPU's clock:
{% for name, ms in engine.stage_times_ms.items() %}
{{ name }} {{ "%.3f"|format(ms) }} ms{{ ", " if not loop.last }}{% endfor %}.{% endif %}
{%- for warning in engine.card.warnings %} TensorRT warned: {{ warning }}.{% endfor %}</p>
{% endif %}
{% if engine.parity %}
<table><tr><th>finding</th><th>positives</th><th>positive patients</th>
<th>AUROC reference</th><th>AUROC {{ engine.name }}</th><th>difference (95 % interval)</th><th>p</th>
<th>margin</th><th>verdict</th></tr>
{% for f in engine.parity.findings %}
<tr><td>{{ f.finding }}</td><td>{{ f.n_positive }}</td><td>{{ f.n_positive_patients }}</td>
<td>{{ "undefined" if f.auroc_reference is none else "%.4f"|format(f.auroc_reference) }}</td>
<td>{{ "undefined" if f.auroc_candidate is none else "%.4f"|format(f.auroc_candidate) }}</td>
<td>{{ "undefined" if f.difference is none else "%+.4f"|format(f.difference) }}
{% if f.difference_low is not none %}({{ "%+.4f"|format(f.difference_low) }} to
{{ "%+.4f"|format(f.difference_high) }}){% endif %}</td>
{% set p = f.p_value %}
<td>{% if p is not none %}{{ "<\u00a00.001" if p < 0.001 else "%.3f"|format(p) }}{% endif %}</td>
<td>{{ f.margin }}</td>
<td class="{{ f.verdict }}">{{ f.verdict }}{% if f.why_not_assessable %}: {{ f.why_not_assessable }}{% endif %}</td></tr>
{% endfor %}
<tr><td>mean of {{ engine.parity.n_counted }}</td><td></td><td></td>
{% if engine.parity.mean_auroc_candidate is not none %}
<td>{{ "%.4f"|format(engine.parity.mean_auroc_reference) }}</td><td>{{ "%.4f"|format(engine.parity.mean_auroc_candidate) }}</td>
<td>{{ "%+.4f"|format(engine.parity.mean_auroc_candidate - engine.parity.mean_auroc_reference) }}
{% if engine.parity.mean_difference_low is not none %}({{ "%+.4f"|format(engine.parity.mean_difference_low) }} to
{{ "%+.4f"|format(engine.parity.mean_difference_high) }}){% endif %}</td>
{% else %}<td>undefined</td><td>undefined</td><td></td>{% endif %}
<td></td><td></td><td>{{ "left out: " ~ engine.parity.left_out|join(", ") if engine.parity.left_out }}</td></tr></table>
{% if forests[loop.index0] %}<img alt="AUROC differences with margins" src="{{ forests[loop.index0] }}">{% endif %}
<h3>Limits</h3>
<table><tr><th>gate, and the worst finding</th><th>measured (95 % interval)</th><th>limit</th><th>verdict</th></tr>
{% for g in engine.parity.gates %}
<tr><td>{{ g.gate }}{% if g.finding %}, {{ g.finding }}{% endif %}</td><td>{{ g.measured }}</td>
<td>{{ "none" if g.limit is none else g.limit }}</td><td class="{{ g.verdict }}">{{ g.verdict }}</td></tr>
{% endfor %}</table>
<h3>Image by image</h3>
<table><tr><th>finding</th><th>operating point</th><th>flips: to present / to absent</th><th>McNemar p</th>
<th>ECE reference</th><th>ECE {{ engine.name }}</th><th>calibration error growth
(95 % interval)</th><th>worklist churn</th><th>logit noise / spread</th>
<th>map correlation: median, worst 1 %</th></tr>
{% for f in engine.parity.findings %}
<tr><td>{{ f.finding }}</td>
{% if f.operating_point is none %}<td>none</td><td></td><td></td>{% else %}<td>{{ "%.3f"|format(f.operating_point) }}</td>
<td>{{ f.n_gained }} / {{ f.n_lost }}</td><td>{{ "%.2g"|format(f.mcnemar_p) }}</td>{% endif %}
<td>{{ "undefined" if f.ece_reference is none else "%.4f"|format(f.ece_reference) }}</td>
<td>{{ "undefined" if f.ece_candidate is none else "%.4f"|format(f.ece_candidate) }}</td>
<td>{% if f.calibration_growth is none %}undefined{% else %}{{ "%+.4f"|format(f.calibration_growth) }}
{% if f.calibration_growth_low is not none %}({{ "%+.4f"|format(f.calibration_growth_low) }} to
{{ "%+.4f"|format(f.calibration_growth_high) }}){% endif %}{% endif %}</td>
<td>{{ "undefined" if f.rank_churn is none else "%.2f %%"|format(100 * f.rank_churn) }}</td>
<td>{{ "undefined" if f.noise_share is none else "%.2f %%"|format(100 * f.noise_share) }}</td>
<td>{% if f.map_correlation_median is none %}undefined{% else %}
{{ "%.4f"|format(f.map_correlation_median) }}, {{ "%.3f"|format(f.map_correlation_p01) }}{% endif %}</td></tr>
{% endfor %}</table>
{% if engine.parity.subgroups %}
<h3>Groups of patients</h3>
<table><tr><th>group</th><th>images</th><th>patients</th><th>findings assessable</th><th>mean difference (95 % interval)</th>
<th>worst finding</th><th>max |Δp|</th><th>flips</th></tr>
{% for g in engine.parity.subgroups %}
<tr><td>{{ g.group }}</td><td>{{ g.n_images }}</td><td>{{ g.n_patients }}</td><td>{{ g.n_assessable }}</td>
<td>{% if g.mean_difference is none %}not assessable{% else %}{{ "%+.4f"|format(g.mean_difference) }}
({{ "%+.4f"|format(g.difference_low) }} to {{ "%+.4f"|format(g.difference_high) }}){% endif %}</td>
<td>{% if g.worst_finding %}{{ g.worst_finding }} {{ "%+.4f"|format(g.worst_difference) }}{% endif %}</td>
<td>{{ "%.4f"|format(g.max_abs_probability_difference) }}</td><td>{{ g.n_flips }}</td></tr>
{% endfor %}</table>{% endif %}
<p class="small">{{ engine.parity.n_images }} images of {{ engine.parity.n_patients }} patients.
max |Δlogit| {{ "%.2g"|format(engine.parity.max_abs_logit_difference) }},
99.9 % of |Δp| within {{ "%.4f"|format(engine.parity.p999_abs_probability_difference) }}.</p>
{% endif %}
{% if engine.invariance %}
<p class="small">One image's probability moves by at most
{{ "%.2g"|format(engine.invariance.slots.max_abs_probability_difference) }} over the slots of batches of
{{ engine.invariance.batch_sizes|join(", ") }}, {{ "%.2g"|format(engine.invariance.neighbours.max_abs_probability_difference) }}
with its neighbours and {{ "%.2g"|format(engine.invariance.threads.max_abs_probability_difference) }} over
{{ engine.invariance.n_threads }} threads; limit {{ engine.spec.gate.invariance_abs_probability_difference }}.</p>
{% endif %}{% endfor %}
{% if roc %}<h2>Methods</h2>
<p>Each engine was compared with the reference on the same images. For each finding with at least
{{ report.engines[0].spec.gate.min_positive_patients }} positive patients, the difference of areas under the ROC curve was tested
for non-inferiority with the margin its spec declares, one-sided at 2.5 % (the lower end of the 95 % interval against minus the
margin). Variances and the covariance of the two models are DeLong's (DeLong et al. 1988, in the rank form of Sun and Xu 2014),
clustered by patient (Obuchowski 1997), with Student's t and a correction for few patients that decide an area near 1. All
assessable findings must pass (intersection-union test, Berger 1982), so no correction for multiplicity is made. Findings with
fewer positive patients are not assessable and named. ECE: expected calibration error, 15 bins of equal mass (Nixon et al.
2019). Calibration error growth: of the root mean square calibration error without its bias (Kumar et al. 2019), in bins made
by the reference. Flips and the likeliest finding are shares with Wilson's interval at the effective number of patients (Rao and
Scott 1992). A limit is kept where the whole interval lies within it. McNemar's test of the balance of flips is exact and takes
images as independent. Worklist churn: mean change of place as a share of the list. Logit noise / spread: root mean square logit
difference over the standard deviation of the reference's.</p>
{% endif %}
<h2>Latency</h2><img alt="latency histogram" src="{{ latency }}">
{% if roc %}<h2>ROC curves</h2><img alt="ROC curves" src="{{ roc }}">{% endif %}
{% if cams %}<h2>Where {{ report.engines[-1].name }} looks</h2>
<p class="small">Class activation maps of the surest true positives, one a finding. Only evidence for the finding is coloured.</p>
{% for cam in cams %}<figure><img alt="{{ cam.caption }}" src="{{ cam.uri }}"><figcaption>{{ cam.caption }}</figcaption></figure>
{% endfor %}{% endif %}
<p class="small">Not a medical device. This page is evidence about a model file, not about patients.</p>
</body></html>
"""
