import importlib.util
import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.runtime.sessions.base import sigmoid
from chexnet_deploy.runtime.sessions.open import open_session, resolve_provider
from chexnet_deploy.runtime.sessions.openvino import PIECE, OpenvinoSession
from chexnet_deploy.runtime.sessions.ort import OrtSession

# One bundle, two backends: what their logits may differ by, as a share of what int8 itself changes; two roundings that have
# nothing to do with each other would give 1.4, and an untrained network comes near it.
BACKENDS_AGREE_TO = 1.5


@pytest.fixture(scope="module")
def session(bundles: dict[str, Bundle]) -> OpenvinoSession:
    return OpenvinoSession.open(bundles["fp32"])


def pixels_of(bundle: Bundle) -> NDArray[np.uint8]:
    return bundle.read_probe().pixels


def test_fp32_answers_as_torch_did(bundles: dict[str, Bundle], session: OpenvinoSession) -> None:
    probe = bundles["fp32"].read_probe()
    logits, maps = session.run(probe.pixels)
    np.testing.assert_allclose(logits, probe.logits, atol=1e-4)
    np.testing.assert_allclose(maps, probe.cam, atol=1e-4)
    assert session.conv_types() == {"float32": 121}


@pytest.mark.parametrize("n", [1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 3, 31])
def test_any_batch_is_cut_into_pieces_in_order(bundles: dict[str, Bundle], session: OpenvinoSession, n: int) -> None:
    pixels = pixels_of(bundles["fp32"])[:n]
    one_by_one = [session.run(pixels[i : i + 1]) for i in range(n)]
    logits, maps = session.run(pixels)
    assert (logits.shape, maps.shape) == ((n, 14), (n, 14, 1, 1))
    np.testing.assert_allclose(logits, np.concatenate([each for each, _ in one_by_one]), atol=1e-4)
    np.testing.assert_allclose(maps, np.concatenate([each for _, each in one_by_one]), atol=1e-4)


def test_an_answer_is_not_overwritten_by_the_next(bundles: dict[str, Bundle], session: OpenvinoSession) -> None:
    pixels = pixels_of(bundles["fp32"])
    first, _ = session.run(pixels[:1])
    kept = first.copy()
    session.run(pixels[1:2])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", ["int8", "int8-cpu"])
def test_one_int8_bundle_answers_alike_on_both(bundles: dict[str, Bundle], name: str) -> None:
    probe = bundles[name].read_probe()
    ours, theirs = OpenvinoSession.open(bundles[name]), OrtSession.open(bundles[name])
    answers = [session.run(probe.pixels)[0] for session in (ours, theirs)]
    by_int8 = max(float(np.sqrt(np.mean((answer - probe.logits) ** 2))) for answer in answers)
    between = float(np.sqrt(np.mean((answers[0] - answers[1]) ** 2)))
    assert between <= BACKENDS_AGREE_TO * by_int8
    assert float(np.abs(sigmoid(answers[0]) - sigmoid(answers[1])).max()) <= 0.05
    types = ours.conv_types()
    assert types["int8"] == 121 - len(bundles[name].manifest.float_convolutions)
    ours.close()


def test_threads_take_turns_and_get_their_own(bundles: dict[str, Bundle], session: OpenvinoSession) -> None:
    pixels = pixels_of(bundles["fp32"])
    expected, _ = session.run(pixels)
    answers: dict[int, NDArray[np.float32]] = {}

    def work(first: int) -> None:
        for _ in range(5):
            answers[first] = session.run(pixels[first : first + 5])[0]

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, logits in answers.items():
        np.testing.assert_allclose(logits, expected[first : first + 5], atol=1e-4)


def test_a_form_is_compiled_when_it_is_first_wanted(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[int, int]] = []
    compile_form = OpenvinoSession._compile

    def count(self: OpenvinoSession, batch: int, threads: int, *, streams: int) -> object:
        compiled.append((batch, streams))
        return compile_form(self, batch, threads, streams=streams)

    monkeypatch.setattr(OpenvinoSession, "_compile", count)
    session = open_session(bundles["fp32"], threads=1, provider="openvino")
    assert [batch for batch, _ in compiled] == [1]
    pixels = pixels_of(bundles["fp32"])
    for n in (PIECE, 2 * PIECE, 1):
        session.run(pixels[:n])
    assert compiled[1:] == [(PIECE, 1)]
    session.run(pixels[: PIECE + 2])
    assert compiled[2:] == [(1, 1)]
    session.close()


def test_what_it_refuses(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(SessionError, match=r"OpenVINO .* refuses this model"):
        OpenvinoSession(b"not a model", 32)
    with pytest.raises(SessionError, match=r"got 4096 threads, needed 1 to"):
        OpenvinoSession.open(bundles["fp32"], threads=4096)
    session = OpenvinoSession.open(bundles["fp32"], threads=1)
    with pytest.raises(SessionError, match=r"got float32 .* needed uint8"):
        session.run(np.zeros((1, 1, 32, 32), np.float32))  # type: ignore[arg-type]
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(pixels_of(bundles["fp32"])[:1])


def test_after_a_fork_it_is_refused_and_waits_for_nobody(bundles: dict[str, Bundle]) -> None:
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.runtime.sessions.openvino import OpenvinoSession

session = OpenvinoSession.open(Bundle.open(Path({str(bundles["fp32"].path)!r})), threads=1)
pixels = np.zeros((1, 1, 32, 32), np.uint8)
session.run(pixels)
if os.fork() == 0:
    try:
        session.run(pixels)
    except SessionError as err:
        print(err, flush=True)
    os._exit(0)
os.wait()
session.run(pixels)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this session was opened before a fork. Open the bundle in each process.\n"


@pytest.mark.parametrize("closed_in", ["the order of opening", "the other order", "another thread"])
def test_signals_are_survived_when_sessions_have_been_closed(bundles: dict[str, Bundle], closed_in: str) -> None:
    code = f"""
import gc, signal, threading
from pathlib import Path
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.sessions.openvino import OpenvinoSession

sessions = [OpenvinoSession.open(Bundle.open(Path({str(bundles["fp32"].path)!r}))) for _ in range(2)]

def close_all(order):
    while sessions:
        sessions.pop(order).close()
        gc.collect()

if {closed_in!r} == "another thread":
    thread = threading.Thread(target=close_all, args=(0,))
    thread.start()
    thread.join()
else:
    close_all(0 if {closed_in!r} == "the order of opening" else -1)
signal.signal(signal.SIGTERM, lambda number, frame: print("told to stop"))
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "told to stop\n")


def test_auto_takes_openvino_where_it_is(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_provider("auto") == "openvino"
    assert resolve_provider("cpu") == "cpu"
    chosen = open_session(bundles["fp32"])
    assert isinstance(chosen, OpenvinoSession)
    chosen.close()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    assert resolve_provider("auto") == "cpu"
    assert isinstance(open_session(bundles["fp32"]), OrtSession)


def test_without_openvino_its_extra_is_named(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("chexnet_deploy.runtime.sessions.openvino"):
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "chexnet_deploy.runtime.sessions.openvino", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingPackageError, match=r"chexnet-deploy\[openvino\]"):
        open_session(bundles["fp32"], provider="openvino")
