from types import SimpleNamespace
from typing import Any

import pytest

from chexnet_deploy.datasets.data_set import DataSet
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.export.chain import _warn_of_known


@pytest.mark.parametrize(("split", "warnings"), [("test", 1), ("train", 0)])
def test_export_says_at_once_that_bench_will_refuse_patients_the_model_knows(
    split: Any, warnings: int, phantom_data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    known = PatientSet.of(phantom_data.patients_of(split))
    fp32: Any = SimpleNamespace(manifest=SimpleNamespace(trained_on=known))
    _warn_of_known(phantom_data, fp32)
    assert caplog.text.count("bench will refuse the test images. Found ") == warnings
