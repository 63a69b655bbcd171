"""The API's description is true: what it names exists, and nothing drawn from it makes the service fail."""

import json

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.running import Running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_everything_described_answers_as_described(service: Running) -> None:
    description = json.loads(service.ask("GET", "/openapi.json")[2])
    schema = schemathesis.openapi.from_dict(description)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)

        @settings(
            max_examples=15,
            database=None,
            derandomize=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=f"http://127.0.0.1:{service.port}", checks=CHECKS)

        check()
    assert seen == set(description["paths"])
    assert service.process.poll() is None
