"""Turn an evaluation into one self-contained HTML page that is readable on paper. Computes nothing that isn't in its record.

The figures are drawn in figures.py.
"""

from pathlib import Path

from jinja2 import Environment

from chexnet_deploy.evaluation import as_text
from chexnet_deploy.evaluation.localize import BoxedMap, choose_pictures
from chexnet_deploy.evaluation.pages.figures import draw_areas, draw_finding, draw_maps, draw_readers
from chexnet_deploy.evaluation.pages.style import CSS, jpeg, png
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.run import EvaluationRun
from chexnet_deploy.files import write_file

_DPI = 130  # sharp on paper too
_PLACES = {1: ("only",), 2: ("best", "worst"), 3: ("best", "median", "worst")}


def write_html(path: Path, run: EvaluationRun) -> None:
    """Write the page."""
    evaluation = run.evaluation
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TABLE + _TEMPLATE)
    readers = evaluation.readers
    short_names = {} if readers is None else as_text.short_names(readers)
    content = page.render(
        css=CSS + _CSS,
        evaluation=evaluation,
        rows=as_text.summary_rows(evaluation),
        mean=as_text.mean_line(evaluation),
        undefined=as_text.undefined_lines(evaluation),
        areas=png(draw_areas(evaluation), dpi=_DPI),
        figures=_draw_findings(evaluation, short_names),
        readers=None if readers is None else as_text.readers_line(readers),
        short_names=short_names,
        differences=None if readers is None else png(draw_readers(readers), dpi=_DPI),
        studies=[]
        if readers is None
        else [(study, as_text.study_rows(study, short_names)) for study in readers.studies],
        protocols=as_text.PROTOCOLS,
        subgroups=as_text.subgroup_tables(evaluation),
        localization=(
            [] if evaluation.localization is None else as_text.localization_rows(evaluation.localization.summary)
        ),
        not_comparable=as_text.NOT_COMPARABLE,
        paper_auroc=as_text.auroc_rows(evaluation),
        paper_f1=as_text.f1_rows(evaluation),
        boxes=None if evaluation.localization is None else as_text.localization_line(evaluation.localization),
        maps=_draw_maps(run.maps),
    )
    write_file(path, content.encode())


def _draw_findings(evaluation: Evaluation, short_names: dict[str, str]) -> list[tuple[str, str]]:
    """Return each finding with its figure; of readers where they were compared on it."""
    rocs = {} if evaluation.readers is None else {roc.finding: roc for roc in evaluation.readers.roc}
    return [
        (row.finding, png(draw_finding(row, rocs.get(row.finding), short_names), dpi=_DPI))
        for row in evaluation.findings
    ]


def _draw_maps(maps: tuple[BoxedMap, ...]) -> list[tuple[str, str]]:
    return [
        (finding, jpeg(draw_maps(chosen, _PLACES[len(chosen)]), dpi=_DPI))
        for finding, chosen in choose_pictures(maps).items()
    ]


_CSS = """
h2 { margin-top: 2.2rem; border-bottom: 2px solid #0072B2; padding-bottom: .2rem } ul { padding-left: 1.2rem }
td:first-child { white-space: nowrap } .patients-note { border-left: 4px solid #D55E00; padding: .3rem .9rem; background: #fdf6ee }
.finding { display: block; width: 100%; margin: .2rem 0 1rem } .finding img { max-width: min(100%, 1000px) }
.wide { font-size: 13px } .wide td { white-space: nowrap } .wide td, .wide th { padding: .2rem .4rem } .refs { font-size: 13px }
@media print { .wide { font-size: 8pt } .wide td { white-space: normal }
.wide td, .wide th { padding: .15rem .2rem } .refs { font-size: 9pt } .patients-note { background: none } }
"""

_TABLE = """{% macro table(rows, class="") %}
<table class="{{ class }}"><thead><tr>{% for name in rows[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endmacro %}
"""

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>chexnet-deploy evaluate: {{ evaluation.source }}</title>
<style>
{{ css }}</style></head><body>
<h1>Evaluation</h1>
<p><strong>{{ evaluation.source }}</strong> on {{ evaluation.data }}. {{ evaluation.finished_utc }}.</p>
<p><strong>{{ mean }}</strong></p>
<div class="patients-note"><strong>Which patients was this measured on?</strong>
<ul>{% for sentence in evaluation.patients_note + evaluation.notes %}<li>{{ sentence }}</li>{% endfor %}</ul></div>
<h2>Summary</h2>
{{ table(rows, "wide") }}
<p class="small">positives: images that show the finding; positive patients: those with such an image. Intervals are 95 % intervals
clustered by patient. AUPRC depends on how frequent the finding is: its chance level is the share of positives.
{%- if evaluation.thresholds_from %} Decisions are at given thresholds: {{ evaluation.thresholds_from }}.{% endif %}</p>
{% if undefined %}<p>What is undefined, and is in no mean:</p>
<ul>{% for line in undefined %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
<figure class="finding"><img alt="AUROC of every finding with its interval" src="{{ areas }}"></figure>
{% if readers %}
<h2>Beside radiologists</h2>
<p>{{ readers }}</p>
<p class="small">{% for id, name in short_names.items() %}{{ name }}: reader {{ id }}{{ ", " if not loop.last }}{% endfor %}.
positives: images called positive, the least and the most of the readers and their label; model's: by the model. F1 of a reader or
the model is the mean over the labels it is scored against; in brackets the 95 % bootstrap interval.
"-": undefined. "no interval": F1 is undefined in too many resamples, or the same in all.</p>
<figure class="finding"><img alt="F1 of the model minus mean of the readers" src="{{ differences }}"></figure>
{% for study, rows in studies %}
<h3>F1 {{ protocols[study.protocol] }}</h3>
{{ table(rows, "wide") }}
<p class="small">{{ study.n_images }} images of {{ study.n_patients }} patients; {{ "{:,}".format(study.n_resamples) }} resamples of
{{ study.unit }}s, seed {{ study.seed }}. {% if study.mean.left_out %}Not in the mean:
{% for finding, why in study.mean.left_out.items() %}{{ finding }} ({{ why }}){{ "; " if not loop.last }}{% endfor %}.{% endif %}
</p>
{% endfor %}{% endif %}
<h2>Finding by finding</h2>
<p class="small">ROC curve with its pointwise 95 % band, and reliability diagram: on the diagonal, as many images show the finding
as the probability says.{% if readers %} Third: the curve on the expert-read images against the majority of three readers; points
are the other two readers, and the model at its threshold.{% endif %}</p>
{% for finding, figure in figures %}
<figure class="finding"><figcaption><strong>{{ finding }}</strong></figcaption><img alt="{{ finding }}: ROC curve and reliability"
src="{{ figure }}"></figure>
{% endfor %}
{% if subgroups %}
<h2>Subgroups</h2>
<p class="small">AUROC with its 95 % interval; n+: images / patients with the finding. "not assessable": fewer than 20 patients with
the finding or without it.</p>
{% for rows in subgroups %}{{ table(rows, "wide") }}{% endfor %}{% endif %}
{% if localization %}
<h2>Where the model looks</h2>
<p>{{ boxes }}</p>
{{ table(localization, "wide") }}
<p class="small">pointing: share of images where the map's maximum lies in a box or close by; boxes found: regions of the map an
image. Below, the best, the median and the worst map of each finding by IoU. White: the radiologist's box. Dashed: the box
drawn round the map's bright region. Only evidence for the finding is coloured; p is its probability.</p>
{% for finding, figure in maps %}
<figure class="finding"><figcaption><strong>{{ finding }}</strong></figcaption><img alt="{{ finding }}: activation maps with boxes"
src="{{ figure }}"></figure>
{% endfor %}{% endif %}
<h2>Published before: {{ not_comparable }}</h2>
<p class="small">AUROC and pneumonia's F1 as Rajpurkar et al. 2017 print them (arXiv 1711.05225 v3, tables 2 and 1). Their test
patients and their 420 expert-read images are others, and their lists were never released.</p>
{{ table(paper_auroc, "wide") }}
{% if paper_f1 %}{{ table(paper_f1, "wide") }}{% endif %}
<h2>Methods</h2>
{% for line in evaluation.methods if not line.startswith("[") %}<p>{{ line }}</p>{% endfor %}
<div class="refs">{% for line in evaluation.methods if line.startswith("[") %}<p>{{ line }}</p>{% endfor %}</div>
<p class="small">Files read, by SHA-256: {% for name, hash in evaluation.inputs_sha256.items() %}{{ name }}
<code>{{ hash[:16] }}</code>{{ ", " if not loop.last }}{% endfor %}.
Made by {% for name, version in evaluation.tools.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.
Every figure is in report.json beside this page.</p>
<p class="small">Not a medical device. This page is evidence about scores, not about patients.</p>
</body></html>
"""
