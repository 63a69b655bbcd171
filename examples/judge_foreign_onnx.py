"""Anyone's ONNX file beside a bundle on the same patients: what it gains or loses in each finding that both know.

python examples/judge_foreign_onnx.py theirs.onnx contract.toml BUNDLE ROOT OUT

The contract says what the file takes and answers, see docs/foreign-models.md.
"""

import sys
from pathlib import Path

from chexnet_deploy.evaluation import bench
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.terminal import progress

model, contract, bundle, root, out = sys.argv[1:]
with progress() as on_phase:
    report = bench(
        [model], bundle, Path(root), "test", None, "fp32", Path(out), contract=Path(contract),
        effort=Effort(min_runs=20, min_duration_s=0.5), threads=None, provider="cpu", with_html=False, on_phase=on_phase,
    )  # fmt: skip
parity = report.engines[0].parity
assert parity is not None  # data were given
print("finding,positive patients,AUROC of the bundle,AUROC of theirs,95 % from,to,verdict")
for row in parity.findings:
    cells = (row.auroc_reference, row.auroc_candidate, row.difference_low, row.difference_high)
    numbers = ",".join("" if value is None else f"{value:.4f}" for value in cells)
    print(f"{row.finding},{row.n_positive_patients},{numbers},{row.verdict}")
