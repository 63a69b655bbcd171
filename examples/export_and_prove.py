"""Weights become fp32 and int8 bundles, and what int8 costs is measured on the test patients.

python examples/export_and_prove.py best.safetensors ROOT OUT
"""

import sys
from pathlib import Path

from chexnet_deploy import Precision
from chexnet_deploy.evaluation import bench
from chexnet_deploy.evaluation.bench_report import print_bench
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.export import export_bundles
from chexnet_deploy.terminal import progress

checkpoint, root, out = map(Path, sys.argv[1:])
with progress() as on_phase:
    fp32, int8 = export_bundles(
        checkpoint,
        out / "bundles",
        (Precision.FP32, Precision.INT8),
        data_root=root,  # calibration images come from its training patients, the measurement from its test patients
        calibration_list=None,
        n_calibration_images=100,
        dialects=("typed",),
        on_phase=on_phase,
    )
    report = bench(
        [int8.path], fp32.path, root, "test", None, None, out / "bench",
        effort=Effort(min_runs=20, min_duration_s=0.5), threads=None, provider="cpu", with_html=True, on_phase=on_phase,
    )  # fmt: skip
print_bench(report, out / "bench" / "report.html")
