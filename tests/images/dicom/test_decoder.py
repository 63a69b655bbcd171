"""The decoder outlives whatever its processes meet, and its pictures don't depend on how they travelled."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from PIL import Image

from benchmarks.rigs.synthetic_dicom import COMPRESSED, LOSSLESS, WORDS, make_dicom
from chexnet_deploy.errors import ImageError, ImageRefusedError, MissingPackageError, RefusalReason, SessionError
from chexnet_deploy.images.dicom import process as process_room
from chexnet_deploy.images.dicom.decoder import DecodeLimits, Decoder
from chexnet_deploy.images.dicom.process import DecodingProcess
from chexnet_deploy.images.reader import ImageReader, read_image

RLE, J2K = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"
# No window: the darkest, 1000, is 0, and the brightest, 2919, 255.
EXPECTED = np.floor((WORDS - 1000) / 1919 * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", *LOSSLESS])
def test_every_lossless_syntax_gives_the_same_picture(decoder: Decoder, syntax: str) -> None:
    gray = decoder.decode(make_dicom(syntax=syntax)).gray
    np.testing.assert_array_equal(gray, EXPECTED)
    assert gray.flags.writeable


@pytest.mark.parametrize("syntax", [uid for uid in COMPRESSED if uid not in LOSSLESS])
def test_lossy_syntaxes_are_close(decoder: Decoder, syntax: str) -> None:
    # 8 bits for baseline JPEG: a smooth ramp, which 8 x 8 cosines hold well.
    words = (WORDS // 16).astype("u1") if syntax.endswith(".50") else WORDS
    gray = decoder.decode(make_dicom(words, syntax=syntax)).gray
    assert np.abs(gray.astype(int) - (words if syntax.endswith(".50") else EXPECTED)).max() <= 2


@pytest.mark.parametrize(
    ("options", "bits"), [(["+ee"], 12), (["+ee"], 8), (["+ee", "+q", "70"], 12), (["+ee", "+un"], 10)]
)
def test_extended_jpeg_is_read_as_dcmtk_reads_it(
    decoder: Decoder, options: list[str], bits: int, tmp_path: Path
) -> None:
    plain, packed, shown = tmp_path / "plain.dcm", tmp_path / "packed.dcm", tmp_path / "shown.pgm"
    words = WORDS >> (12 - bits)
    plain.write_bytes(make_dicom(words if bits > 8 else words.astype("u1"), {"BitsStored": bits, "HighBit": bits - 1}))
    dcmtk(["dcmcjpeg", *options, str(plain), str(packed)])
    dcmtk(["dcmj2pnm", *(["+Wm"] if bits > 8 else []), str(packed), str(shown)])
    image = decoder.decode(packed)
    assert (image.header.transfer_syntax_uid, image.header.is_lossy) == ("1.2.840.10008.1.2.4.51", True)
    assert np.abs(image.gray.astype(int) - np.asarray(Image.open(shown))).max() <= 1  # DCMTK rounds down


def dcmtk(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"NOT RUN against DCMTK: {command[0]} is missing")
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("syntax", [RLE, J2K, "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"])
def test_8_bits_in_every_codec(decoder: Decoder, syntax: str) -> None:
    words = (WORDS // 16).astype("u1")
    np.testing.assert_array_equal(decoder.decode(make_dicom(words, syntax=syntax)).gray, words)


@pytest.mark.parametrize("syntax", [RLE, J2K])
def test_signed_values_in_codecs(decoder: Decoder, syntax: str) -> None:
    words = (WORDS.astype(np.int16) - 2048).astype(np.int16)
    np.testing.assert_array_equal(decoder.decode(make_dicom(words, syntax=syntax)).gray, EXPECTED)


def test_a_value_beyond_bits_stored_is_refused(decoder: Decoder) -> None:
    # Packed as 12 bits, then called 10: 2919 doesn't fit.
    content = make_dicom(syntax=J2K).replace(b"\x28\0\x01\x01US\2\0\x0c\0", b"\x28\0\x01\x01US\2\0\x0a\0")
    content = content.replace(b"\x28\0\x02\x01US\2\0\x0b\0", b"\x28\0\x02\x01US\2\0\x09\0")
    with pytest.raises(ImageRefusedError, match="beyond Bits Stored") as caught:
        decoder.decode(content)
    assert caught.value.reason is RefusalReason.CONTRADICTION


def test_read_image_and_a_reader_read_dicom(tmp_path: Path) -> None:
    path = tmp_path / "radiograph.png"  # the contents decide
    path.write_bytes(make_dicom(syntax=RLE))
    np.testing.assert_array_equal(read_image(path), EXPECTED)
    with ImageReader() as reader:
        for _ in range(2):
            np.testing.assert_array_equal(reader.read(path), EXPECTED)


@pytest.mark.parametrize(
    ("edits", "darkest", "brightest"),
    [
        ({"WindowCenter": 30000, "WindowWidth": 400000}, 109, 110),  # (1000 - 29999.5) / 399999 + 0.5 = 0.4275
        ({"WindowCenter": 4000, "WindowWidth": 2401}, 0, 13),  # (2919 - 3999.5) / 2400 + 0.5 = 0.05
        ({"RescaleSlope": 1, "RescaleIntercept": 3000, "WindowCenter": 2840, "WindowWidth": 3201}, 220, 255),
    ],
)
def test_a_picture_in_few_grays_is_refused(
    decoder: Decoder, edits: dict[str, int], darkest: int, brightest: int
) -> None:
    with pytest.raises(ImageRefusedError, match=f"a picture in gray {darkest} to {brightest} of 255") as caught:
        decoder.decode(make_dicom(edits=edits))
    assert caught.value.reason is RefusalReason.GRAYSCALE


def test_a_quarter_of_the_grays_is_a_picture(decoder: Decoder) -> None:
    # 1920 values over a window of 7610: 64 grays.
    gray = decoder.decode(make_dicom(edits={"WindowCenter": 2000, "WindowWidth": 7610})).gray
    assert int(gray.max()) - int(gray.min()) == 64
    with pytest.raises(ImageRefusedError, match="of 255"):
        decoder.decode(make_dicom(edits={"WindowCenter": 2000, "WindowWidth": 8000}))


def test_a_missing_file(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file") as caught:
        decoder.decode(tmp_path / "absent.dcm")
    assert caught.value.reason is RefusalReason.UNREADABLE


def test_uncompressed_pixels_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("chexnet_deploy.images.dicom.decoder.DecodingProcess", refuse)
    with Decoder() as decoder:
        np.testing.assert_array_equal(decoder.decode(make_dicom()).gray, EXPECTED)


def pid(decoder: Decoder) -> int:
    """The process that would decode next."""
    process = decoder._take()
    decoder._give_back(process)
    return process._process.pid


def test_a_killed_process_costs_one_image() -> None:
    with Decoder() as decoder:
        decoder.decode(make_dicom(syntax=RLE))
        first = pid(decoder)
        os.kill(first, signal.SIGSEGV)
        sleep(0.1)
        with pytest.raises(ImageRefusedError, match="SIGSEGV") as caught:
            decoder.decode(make_dicom(syntax=RLE))
        assert caught.value.reason is RefusalReason.DECODE_FAILED
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=RLE)).gray, EXPECTED)
        assert pid(decoder) != first


def test_a_process_that_hangs_is_killed_at_the_deadline() -> None:
    with Decoder(limits=DecodeLimits(deadline_s=0.3)) as decoder:
        decoder.warm_up()
        hanging = pid(decoder)
        os.kill(hanging, signal.SIGSTOP)
        start = monotonic()
        # It had no processor time, so nothing is said of the image.
        with pytest.raises(ImageRefusedError, match="too busy to decode the image in time") as caught:
            decoder.decode(make_dicom(syntax=RLE))
        assert monotonic() - start < 2.0
        assert caught.value.reason is RefusalReason.BUSY
        assert not Path(f"/proc/{hanging}").exists()
        decoder.warm_up()
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=RLE)).gray, EXPECTED)


def test_waiting_for_the_machine_is_no_work() -> None:
    """Stopped for longer than its limit of processor time, as on a busy machine, then let go on."""
    with Decoder(limits=DecodeLimits(processor_s=0.5, deadline_s=20.0)) as decoder:
        decoder.decode(make_dicom(syntax=J2K))
        held = pid(decoder)
        os.kill(held, signal.SIGSTOP)
        threading.Timer(1.2, os.kill, (held, signal.SIGCONT)).start()
        start = monotonic()
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=J2K)).gray, EXPECTED)
        assert monotonic() - start > 1.0
        assert pid(decoder) == held


@pytest.mark.parametrize("deadline_s", [0.6, 30.0])
def test_too_much_work_ends_at_the_limit_of_processor_time(deadline_s: float) -> None:
    words = np.random.default_rng(0).integers(0, 4096, (2000, 2000)).astype(np.uint16)  # no codec's favourite
    content = make_dicom(words, syntax=J2K)
    with Decoder(limits=DecodeLimits(processor_s=0.1, deadline_s=deadline_s)) as decoder:
        for _ in range(2):
            decoder.warm_up()
            with pytest.raises(ImageRefusedError, match=r"not decoded in 0\.1 s of processor time") as caught:
                decoder.decode(content)
            assert caught.value.reason is RefusalReason.DECODE_TIMEOUT
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=RLE)).gray, EXPECTED)


def test_after_warming_up_a_start_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with Decoder(limits=DecodeLimits(deadline_s=0.3)) as decoder:
        decoder.warm_up()
        assert decoder._spare is not None
        os.kill(decoder._spare._process.pid, signal.SIGSTOP)  # it never gets ready
        os.kill(pid(decoder), signal.SIGKILL)
        start = monotonic()
        for _ in range(2):
            with pytest.raises(ImageRefusedError):
                decoder.decode(make_dicom(syntax=RLE))
        assert monotonic() - start < 2.0
        with pytest.raises(ImageRefusedError, match="no decoding process ready in time") as caught:
            decoder.decode(make_dicom(syntax=RLE))
        assert caught.value.reason is RefusalReason.BUSY
        monkeypatch.setattr(process_room, "START_DEADLINE_S", 0.5)  # it is given up, and another one started
        with pytest.raises(SessionError, match="did not start"):
            decoder.decode(make_dicom(syntax=RLE))


def test_an_interrupted_question_is_not_answered_to_the_next_image(monkeypatch: pytest.MonkeyPatch) -> None:
    brighter = make_dicom((WORDS + 1000).astype(np.uint16), syntax=RLE)
    with Decoder() as decoder:
        decoder.decode(make_dicom(syntax=RLE))
        asked = pid(decoder)
        with monkeypatch.context() as patch:
            patch.setattr(process_room, "_read_answer", lambda line, number: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                decoder.decode(brighter)
        assert pid(decoder) != asked
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=RLE)).gray, EXPECTED)


def test_a_spare_steps_in_for_a_lost_process() -> None:
    with Decoder() as decoder:
        decoder.warm_up()
        spare = decoder._spare
        assert spare is not None
        spare.wait_ready()
        os.kill(pid(decoder), signal.SIGKILL)
        with pytest.raises(ImageRefusedError, match="SIGKILL"):
            decoder.decode(make_dicom(syntax=RLE))
        assert pid(decoder) == spare._process.pid
        assert decoder._spare is not None
        np.testing.assert_array_equal(decoder.decode(make_dicom(syntax=RLE)).gray, EXPECTED)


def test_a_process_is_replaced_after_its_images() -> None:
    with Decoder(limits=DecodeLimits(images_per_process=2)) as decoder:
        pids = []
        for _ in range(4):
            decoder.decode(make_dicom(syntax=RLE))
            pids.append(pid(decoder))
    assert pids[0] != pids[1]  # `pid` is asked after the image: the second one was the last
    assert pids[1] == pids[2]
    assert pids[2] != pids[3]


def test_threads_share_the_processes() -> None:
    contents = {syntax: make_dicom(syntax=syntax) for syntax in LOSSLESS}
    with Decoder(processes=2) as decoder, ThreadPoolExecutor(6) as pool:
        grays = pool.map(lambda i: decoder.decode(contents[LOSSLESS[i % len(LOSSLESS)]]).gray, range(60))
        assert all(np.array_equal(gray, EXPECTED) for gray in grays)


def test_pictures_of_all_sizes_use_the_same_memory_rightly() -> None:
    with Decoder() as decoder:
        for side in (32, 700, 33, 1200, 64):
            words = (np.arange(side * side).reshape(side, side) % 4096).astype(np.uint16)
            gray = decoder.decode(make_dicom(words, syntax=RLE)).gray
            np.testing.assert_array_equal(gray, np.floor(words / words.max() * 255 + 0.5).astype(np.uint8))


def test_limits_of_a_process() -> None:
    with Decoder(limits=DecodeLimits(memory_mib=1024)) as decoder:
        decoder.warm_up()
        limits = Path(f"/proc/{pid(decoder)}/limits").read_text()
        files = {str(file.readlink()) for file in Path(f"/proc/{pid(decoder)}/fd").iterdir()}
        environment = Path(f"/proc/{pid(decoder)}/environ").read_bytes()
    soft = {line[:26].strip(): line[26:47].strip() for line in limits.splitlines()}
    assert soft["Max address space"] == str(1024 * 2**20)
    assert (soft["Max core file size"], soft["Max file size"], soft["Max open files"]) == ("0", "0", "16")
    assert {name.split(":")[0] for name in files} == {"/dev/null", "socket"}
    assert b"HOME=" not in environment


def test_too_little_memory_is_said() -> None:
    side = 4000  # 64 MB as JPEG 2000 decodes it
    words = np.zeros((side, side), np.uint16)
    content = make_dicom(words, syntax=J2K)
    with Decoder(limits=DecodeLimits(memory_mib=256)) as decoder, pytest.raises(ImageRefusedError) as caught:
        decoder.decode(content)
    assert caught.value.reason is RefusalReason.DECODE_FAILED


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # An empty package of the same name hides the installed one.
    (tmp_path / "chexnet_deploy").mkdir()
    (tmp_path / "chexnet_deploy" / "__init__.py").touch()
    monkeypatch.setattr(process_room, "_environment", lambda: {"PYTHONPATH": str(tmp_path)})
    with Decoder() as decoder, pytest.raises(SessionError, match="did not start"):
        decoder.decode(make_dicom(syntax=RLE))


def test_closing() -> None:
    decoder = Decoder()
    decoder.decode(make_dicom(syntax=RLE))
    ended = pid(decoder)
    decoder.close()
    decoder.close()
    assert not Path(f"/proc/{ended}").exists()
    with pytest.raises(SessionError, match="closed"):
        decoder.decode(make_dicom(syntax=RLE))


def test_a_thread_that_waits_while_all_is_closed() -> None:
    decoder = Decoder()
    process = decoder._take()
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            decoder.decode(make_dicom(syntax=RLE))
        except SessionError as err:
            failures.append(err)

    thread = threading.Thread(target=wait)
    thread.start()
    sleep(0.2)
    decoder.close()
    decoder._give_back(process)
    thread.join(timeout=10)
    assert len(failures) == 1
    assert not Path(f"/proc/{process._process.pid}").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Decoder(processes=0),
        lambda: DecodeLimits(deadline_s=0),
        lambda: DecodeLimits(processor_s=0),
        lambda: DecodeLimits(memory_mib=1),
        lambda: DecodeLimits(images_per_process=0),
    ],
)
def test_limits_check_themselves(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="needed"):
        make()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"number": 0, "bits": 24}',
        b'{"number": 1, "bits": 8}',
        b'{"number": 0, "error": 5}',
        b"[" * 4000,
    ],
)
def test_a_child_is_answered_to_like_a_stranger(line: bytes) -> None:
    with pytest.raises(process_room.DecodeError, match=r"can't be decoded \(no answer\)"):
        process_room._read_answer(line, 0)


def test_the_shared_memory_cannot_be_cut_short() -> None:
    memory, view = process_room._new_shared_memory(4096)
    try:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(memory, size)
    finally:
        view.close()
        os.close(memory)


def test_a_process_ends_with_its_parent() -> None:
    code = (
        "import os\nfrom chexnet_deploy.images.dicom.process import DecodingProcess\n"
        "p = DecodingProcess(memory_mib=1024); p.wait_ready(); print(p._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    child = Path(f"/proc/{done.stdout.strip()}")
    end = monotonic() + 10
    while child.exists() and monotonic() < end and "State:\tZ" not in (child / "status").read_text():
        sleep(0.05)
    assert not child.exists() or "State:\tZ" in (child / "status").read_text()


def test_without_pydicom_the_extra_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(make_dicom())
    code = f"""
import sys
sys.modules["pydicom"] = None
from pathlib import Path
from chexnet_deploy.errors import {MissingPackageError.__name__}
from chexnet_deploy.images import read_image
try:
    read_image(Path({str(path)!r}))
except MissingPackageError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'chexnet-deploy[dicom]'" in done.stdout, done.stderr


def test_a_decoding_process_reads_nothing_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dl.py").write_text("raise SystemExit('imported')")  # gdcm tries to import a module of this name
    monkeypatch.chdir(tmp_path)
    process = DecodingProcess(memory_mib=2048)
    try:
        process.wait_ready()
    finally:
        process.kill()
