"""Plans built and run on the GPU at hand, by every TensorRT that is installed. Not run, and said so, without a GPU."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.plan_checks import memory_growth
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PLAN_MODEL
from chexnet_deploy.errors import BundleError, SessionError
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.export.tensorrt.build import build_tensorrt_plan, is_buildable
from chexnet_deploy.runtime.sessions.base import sigmoid
from chexnet_deploy.runtime.sessions.trt import TrtSession
from chexnet_deploy.runtime.sessions.trt_versions import open_tensorrt

CHECKOUT = Path(__file__).parents[3]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def plans(
    gpu_backends: list[str], bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("plans")
    made = {}
    for backend in gpu_backends:
        _, family = open_tensorrt(backend)  # type: ignore[arg-type]
        for name, bundle in bundles.items():
            if not is_buildable(bundle.manifest, family):
                continue
            out, spec = folder / f"{backend}-{name}", read_spec(bundle.manifest.precision.value)
            made[out.name] = build_tensorrt_plan(bundle, spec, out, backend=backend)  # type: ignore[arg-type]
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


def test_graphs_change_nothing_and_stages_are_timed(plans: dict[str, Bundle]) -> None:
    for name, plan in plans.items():
        pixels = plan.read_probe().pixels[:16]
        replayed, plain = TrtSession.open(plan), TrtSession.open(plan, with_graphs=False)
        assert (replayed.graph_batches, replayed.why_no_graphs) == ((1, 16), None), name
        assert plain.graph_batches == ()
        for n in (1, 3, 16):  # 3 is not captured
            np.testing.assert_array_equal(replayed.run(pixels[:n])[0], plain.run(pixels[:n])[0], err_msg=f"{name} {n}")
            stages = replayed.stage_times_ms(pixels[:n])
            assert list(stages) == ["upload", "compute", "download"]
            assert all(0 < ms < 1000 for ms in stages.values()), stages
        replayed.close()
        plain.close()


def test_ten_thousand_runs_leak_nothing(plans: dict[str, Bundle]) -> None:
    for name, plan in plans.items():
        growth = memory_growth(plan, n_runs=10_000)
        assert growth["host_mib"] < 16, (name, growth)
        assert growth["device_mib"] < 1, (name, growth)


def test_torch_and_the_runtime_live_in_one_process(plans: dict[str, Bundle]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("NOT RUN beside torch: this torch has no CUDA")
    plan = next(iter(plans.values()))
    matrix = torch.eye(512, device="cuda")
    session = TrtSession.open(plan)
    pixels = plan.read_probe().pixels[:4]
    before = session.run(pixels)[0]
    product = (matrix @ matrix).sum().item()
    after = session.run(pixels)[0]
    session.close()
    assert product == 512.0
    np.testing.assert_array_equal(before, after)
    assert (matrix @ matrix).sum().item() == 512.0  # closing the session took nothing from torch


def test_a_session_nobody_closed_ends_with_its_process(plans: dict[str, Bundle]) -> None:
    for plan in plans.values():
        code = (
            "import sys; from pathlib import Path; from chexnet_deploy.bundle.bundle import Bundle; "
            "from chexnet_deploy.runtime.sessions.trt import TrtSession; plan = Bundle.open(Path(sys.argv[1])); "
            "TrtSession.open(plan).run(plan.read_probe().pixels[:1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(plan.path)], capture_output=True, text=True, cwd=CHECKOUT
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_after_a_fork_it_refuses(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    session = TrtSession.open(plan)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            session.run(plan.read_probe().pixels[:1])
            answer = "it ran"
        except SessionError as err:
            answer = str(err)
        os.write(writing, answer.encode())
        os._exit(0)  # the parent's atexit is not the child's
    os.waitpid(child, 0)
    assert "before a fork" in os.read(reading, 1000).decode()
    session.close()


def test_a_plan_that_is_cut_short_is_refused_by_tensorrt_too(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    assert plan.manifest.target is not None
    with pytest.raises(SessionError, match="refuses this plan"):
        TrtSession(
            plan.read_model()[: 1 << 16],
            backend=plan.manifest.target.backend,
            resize_px=plan.manifest.preprocessing.resize_px,
            conv_types={},
        )


def test_a_flipped_byte_never_reaches_tensorrt(plans: dict[str, Bundle]) -> None:
    plan = next(iter(plans.values()))
    path: Path = plan.path / PLAN_MODEL
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its manifest"):
        Bundle.open(plan.path)
