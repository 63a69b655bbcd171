"""Run a node with a given worker: python -m benchmarks.rigs.node_run CONFIG WORKER ARGUMENT..."""

import sys
from pathlib import Path

from chexnet_deploy.dicom.node.config import read_config
from chexnet_deploy.dicom.node.service import run_node

if __name__ == "__main__":
    sys.exit(run_node(read_config(Path(sys.argv[1])), sys.argv[2:]))
