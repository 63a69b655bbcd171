"""Plans built and run on the GPU at hand, by every TensorRT that is installed. Not run, and said so, without a GPU."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.builder.engine import build_engine
from chexnet_deploy.bundle import PLAN_MODEL, Bundle
from chexnet_deploy.errors import BundleError, SessionError
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.sessions.trt import TrtSession
from chexnet_deploy.spec import read_spec

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def plans(
    gpu_backends: list[str], bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("plans")
    made = {}
    for backend in gpu_backends:
        for name, bundle in bundles.items():
            out = folder / f"{backend}-{name}"
            made[out.name] = build_engine(bundle, read_spec(name), out, backend=backend)  # type: ignore[arg-type]
    return made


def test_each_plan_answers_as_its_fp32_model(plans: dict[str, Bundle]) -> None:
    for name, plan in plans.items():
        limit = read_spec(plan.manifest.precision.value).gate.max_abs_probability_difference
        session = TrtSession.open(plan)
        probe = plan.read_probe()
        logits = np.concatenate([session.run(probe.pixels[i : i + 16])[0] for i in (0, 16)])
        session.close()
        assert float(np.abs(sigmoid(logits) - sigmoid(probe.logits)).max()) <= limit, name


def test_slot_batch_and_thread_change_nothing(plans: dict[str, Bundle]) -> None:
    for name, plan in plans.items():
        pixels = plan.read_probe().pixels[:16]
        session = TrtSession.open(plan, lanes=2)
        alone = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(16)])
        with ThreadPoolExecutor(4) as pool:
            threaded = [logits for logits, _ in pool.map(session.run, [pixels[i : i + 1] for i in range(16)] * 8)]
        reversed_batch = session.run(pixels[::-1].copy())[0][::-1]
        session.close()
        # One image of the same batch size is the same arithmetic; another batch size may take another kernel.
        np.testing.assert_array_equal(np.concatenate(threaded), np.concatenate([alone] * 8), err_msg=name)
        assert float(np.abs(sigmoid(reversed_batch) - sigmoid(alone)).max()) < 0.02, name


def test_after_close_it_refuses_and_closing_twice_is_nothing(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    session = TrtSession.open(plan)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(plan.read_probe().pixels[:1])


def test_a_batch_outside_the_profile_is_refused(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    session = TrtSession.open(plan)
    with pytest.raises(SessionError, match="this session takes 1 to 16"):
        session.run(plan.read_probe().pixels[:17])
    session.close()


def test_a_flipped_byte_never_reaches_tensorrt(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    path: Path = plan.path / PLAN_MODEL
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its manifest"):
        Bundle.open(plan.path)
