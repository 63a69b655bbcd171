"""What the bundle of a plan says of its machine and its engine, where no plan is run."""

from chexnet_deploy.bundle.manifest import EngineCard, Target

TARGET = Target(
    gpu="NVIDIA L4",
    compute_capability="8.9",
    backend="tensorrt",
    tensorrt="10.3.0",
    driver="12.4",
    platform="Linux x86_64",
)
CARD = EngineCard(
    build_s=1.0,
    plan_bytes=1,
    batch=(1, 1, 1),
    conv_types={"float32": 1},
    fallbacks=(),
    n_kernels=1,
    n_reformats=0,
    bytes_per_image=None,
    activation_bytes=1,
    warnings=(),
)
