"""A pipeline goes on only with a bundle that is as good as its parent, by a spec that lies in the repository.

python examples/gate_in_ci.py BUNDLE ROOT spec.toml OUT

Each reason why not is a line that GitHub shows beside the commit. Exits 0 for PASS, 1 for FAIL, 3 where nothing is proven.
"""

import sys
from pathlib import Path

from chexnet_deploy.errors import ChexnetError
from chexnet_deploy.evaluation import bench
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.evaluation.parity import EXIT_CODES
from chexnet_deploy.terminal import progress

bundle, root, spec, out = sys.argv[1:]
try:
    with progress() as on_phase:
        report = bench(
            [bundle], None, Path(root), "test", None, spec, Path(out),
            effort=Effort(min_runs=20, min_duration_s=0.5), threads=None, provider="cpu", with_html=False, on_phase=on_phase,
        )  # fmt: skip
except ChexnetError as err:
    print(f"::error::{err}")
    sys.exit(2)
for engine in report.engines:
    for reason in engine.reasons:
        print(f"::{'error' if engine.verdict == 'FAIL' else 'warning'} title={engine.name} {engine.verdict}::{reason}")
print(report.verdict)
sys.exit(EXIT_CODES[report.verdict])
