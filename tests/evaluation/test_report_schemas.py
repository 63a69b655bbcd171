"""The published schemas of report.json are those of the code; `python -m tests.evaluation.test_report_schemas` writes them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from chexnet_deploy.evaluation.bench_report import BenchReport
from chexnet_deploy.evaluation.parity import ParityReport, compare
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.evaluation.spec import read_spec

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
REPORTS: dict[str, type[BaseModel]] = {"bench": BenchReport, "evaluation": Evaluation}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(mode="serialization"),
    }


def write_schemas() -> None:
    for name, model in REPORTS.items():
        (SCHEMAS / f"{name}.json").write_text(json.dumps(schema_of(model), indent=1) + "\n")


@pytest.mark.parametrize("name", REPORTS)
def test_the_published_schema_is_current(name: str) -> None:
    published = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert published == schema_of(REPORTS[name]), "run python -m tests.evaluation.test_report_schemas"
    jsonschema.Draft202012Validator.check_schema(published)


def test_an_answer_that_is_not_finite_keeps_to_the_schema_and_is_read_again() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(12, 1)
    bad = logits.copy()
    bad[3] = np.inf
    truth, patients = logits > 6, np.arange(12, dtype=np.int64)
    report = compare(logits, bad, truth, patients, ("Mass",), {"Mass": 0.5}, read_spec("int8").gate)
    content = report.model_dump_json()
    assert json.loads(content)["max_abs_logit_difference"] == "Infinity"
    jsonschema.validate(json.loads(content), schema_of(ParityReport))
    assert ParityReport.model_validate_json(content) == report


if __name__ == "__main__":
    write_schemas()
