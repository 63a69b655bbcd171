"""Changed headers of sound chests: no wrong picture is read, and nothing sound is refused.

    python -m benchmarks.robustness.header_mutations      writes results/header-mutations.json; exit 1 where a bar is missed

A seeded generator changes what a header says of a drawn radiograph: orientation, age, photometric interpretation, look-up
tables, window, bits, rescale, padding. What is read must be DCMTK's picture of the same file, turned upright by its letters;
what its age or orientation puts out of the default scope must be refused. Then sound variations, in which dciodvfy finds no
error: all must be read but for those that the scope names. See dicom_oracle.py for the judges, which need Debian's packages
dcmtk and dicom3tools.
"""

import json
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydicom
import typer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydicom.dataset import Dataset

from benchmarks.rigs.synthetic_dicom import COMPRESSED, LOSSLESS, make_dicom
from benchmarks.robustness import dicom_oracle as oracle
from chexnet_deploy.errors import ImageError, OnPhase
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.terminal import progress, run_program
from training.phantoms.draw import PhantomSpec, draw_radiograph, plan_studies

RESULTS = Path(__file__).parents[1] / "results" / "header-mutations.json"
TOLERANCE = 2  # of 255: DCMTK rounds down
_N_CHESTS, _SIDE_PX = 8, 96
_PLAIN = "1.2.840.10008.1.2.1"
_SCOPE_REASONS = {"age", "view"}
_COMPLETE = {  # so that dciodvfy finds no error in the unchanged file
    "PatientSex": "O",
    "StudyTime": "120000",
    "ReferringPhysicianName": "",
    "StudyID": "1",
    "AccessionNumber": "",
    "SeriesNumber": 1,
    "Manufacturer": "",
    "InstanceNumber": 1,
}

app = typer.Typer(add_completion=False)


@dataclass(slots=True)
class Case:
    """One file in the making.

    Attributes:
        words: [H, W] stored values.
        edits: header values by keyword, see make_dicom.
        age: Patient's Age; orientation: Patient Orientation, as written.
        syntax: transfer syntax.
        behind_pixels: bytes behind the picture within Pixel Data; behind: behind the last element.
        private: bytes of private elements, put before the Study Instance UID.
        families: what was changed.
    """

    words: NDArray[Any]
    edits: dict[str, Any]
    age: str = "060Y"
    orientation: str = ""
    syntax: str = _PLAIN
    behind_pixels: bytes = b""
    behind: bytes = b""
    private: bytes = b""
    families: list[str] = field(default_factory=list)

    def content(self) -> bytes:
        """Return the file's bytes."""
        edits = {"PatientAge": self.age, "PatientOrientation": self.orientation.split("\\"), **self.edits}
        if self.behind_pixels:
            edits["PixelData"] = self.words.tobytes() + self.behind_pixels
        content = make_dicom(self.words, edits, syntax=self.syntax)
        study = b"\x20\0\x0d\0UI"
        return content.replace(study, self.private + study, 1) + self.behind

    def is_in_scope(self) -> bool:
        """Return whether a model for adults' frontal chests may be asked, by the oracle's tables."""
        years = oracle.AGES[self.age]
        return (18 <= years <= 120 or years == oracle.UNKNOWN) and oracle.can_upright(self.orientation)


class Outcome(BaseModel):
    """What became of the files.

    Attributes:
        tried: files.
        answers: how many were read as the judges say, read with nobody to judge, refused (by reason), or wrong.
        by_family: the same by what was changed in the header.
        wrong: what was read otherwise, or read at all, against the judges.
    """

    model_config = ConfigDict(frozen=True)

    tried: int
    answers: dict[str, int]
    by_family: dict[str, dict[str, int]]
    wrong: tuple[str, ...]


@app.command()
def main(
    n: Annotated[int, typer.Option("-n", help="Changed headers.")] = 2000,
    n_sound: Annotated[int, typer.Option(help="Sound variations.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
) -> None:
    """Read files with changed headers and write what became of them."""
    missing = oracle.missing_tools()
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} not found. Install Debian's packages dcmtk and dicom3tools.")
    with progress() as on_phase, tempfile.TemporaryDirectory(prefix="chexnet-headers-") as folder:
        mutated = read_mutated(n, seed=seed, folder=Path(folder), on_phase=on_phase)
        sound = read_sound(n_sound, seed=seed, folder=Path(folder), on_phase=on_phase)
    result = {"machine": describe_machine().model_dump(), "seed": seed, "mutated": mutated.model_dump()}
    text = json.dumps({**result, "sound": sound.model_dump()}, indent=1)
    RESULTS.write_text(text + "\n")
    typer.echo(text)
    if mutated.wrong or sound.wrong:
        raise typer.Exit(1)


def read_mutated(n: int, *, seed: int, folder: Path, on_phase: OnPhase) -> Outcome:
    """Read n files of one to three changes each; what is read is judged, what is refused is counted."""
    chance = random.Random(seed)
    chests = _draw_chests()
    tally = _Tally()
    with Decoder() as decoder:
        for i in range(n):
            case = _begin(chests, chance)
            for family in chance.sample(list(MUTATIONS), chance.choice((1, 1, 2, 3))):
                MUTATIONS[family](case, chance)
                case.families.append(family)
            tally.count(i, case, _answer(case, decoder, folder / "mutated.dcm"))
            on_phase("changed headers", i + 1, n)
    return tally.outcome()


def read_sound(n: int, *, seed: int, folder: Path, on_phase: OnPhase) -> Outcome:
    """Read n variations in which dciodvfy finds no error; a refusal for anything but the scope is wrong."""
    chance = random.Random(seed)
    chests = _draw_chests()
    tally = _Tally()
    path = folder / "sound.dcm"
    with Decoder() as decoder:
        tried = 0
        while tried < n:
            case = _begin(chests, chance)
            for family in chance.sample(list(VARIATIONS), chance.choice((1, 2, 3))):
                VARIATIONS[family](case, chance)
                case.families.append(family)
            path.write_bytes(case.content())
            if oracle.errors_of(path):
                continue
            answer = _answer(case, decoder, path)
            is_named = answer.removeprefix("refused, ") in _SCOPE_REASONS and not case.is_in_scope()
            tally.count(tried, case, f"wrong: {answer}" if answer.startswith("refused") and not is_named else answer)
            tried += 1
            on_phase("sound variations", tried, n)
    return tally.outcome()


class _Tally:
    def __init__(self) -> None:
        self.by_family: dict[str, Counter[str]] = {}
        self.total: Counter[str] = Counter()
        self.wrong: list[str] = []

    def count(self, number: int, case: Case, answer: str) -> None:
        word = answer.partition(":")[0]
        self.total[word] += 1
        for family in case.families:
            self.by_family.setdefault(family, Counter())[word] += 1
        if word == "wrong":
            self.wrong.append(f"{number}, {' and '.join(case.families)}: {answer.partition(': ')[2]}")

    def outcome(self) -> Outcome:
        return Outcome(
            tried=self.total.total(),
            answers=dict(self.total.most_common()),
            by_family={family: dict(counts.most_common()) for family, counts in sorted(self.by_family.items())},
            wrong=tuple(self.wrong),
        )


def _answer(case: Case, decoder: Decoder, path: Path) -> str:
    content = case.content()
    path.write_bytes(content)
    try:
        gray = decoder.decode(content, scope=ScopePolicy()).gray
    except ImageError as err:
        return f"refused, {err.reason.value}"
    if not case.is_in_scope():
        return f"wrong: read with age {case.age!r} and orientation {case.orientation!r}"
    return _judge(case, gray, path)


def _judge(case: Case, gray: Gray, path: Path) -> str:
    dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    is_padding = _padding(dataset, case.words)
    if is_padding.all():
        return "wrong: read, but all is padding" if gray.any() else "read, all padding"
    # DCMTK knows no padding, nor every codec: it is shown the same picture without.
    shown_to_it = replace(
        case, words=np.where(is_padding, case.words[~is_padding].min(), case.words).astype(case.words.dtype)
    )
    if case.syntax in LOSSLESS:
        shown_to_it.syntax = _PLAIN
    path.write_bytes(shown_to_it.content())
    shown = oracle.render(path, dataset)
    if shown is None:
        return "read, not judged"
    shown = np.where(is_padding, 0, shown)
    upright = oracle.turn_upright(shown, case.orientation)
    if upright.shape != gray.shape:
        return f"wrong: {gray.shape} for {upright.shape}"
    difference = int(np.abs(upright - gray).max())
    return "read alike" if difference <= TOLERANCE else f"wrong: off by {difference} grays"


def _padding(dataset: Dataset, words: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which stored values are Pixel Padding (PS3.3 section C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(words.shape, np.bool_)
    last = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((int(first), int(first if last is None else last)))
    return np.asarray((words.astype(np.int64) >= ends[0]) & (words.astype(np.int64) <= ends[1]))


def _draw_chests() -> list[Gray]:
    studies = plan_studies(PhantomSpec(patients=_N_CHESTS, test_patients=1))[:_N_CHESTS]
    return [draw_radiograph(study, seed=0, side_px=_SIDE_PX)[: _SIDE_PX - 8] for study in studies]


def _begin(chests: list[Gray], chance: random.Random) -> Case:
    """Return a sound file: 88 x 96 px in 8 to 16 bits, often with a window."""
    gray = chance.choice(chests)
    bits = chance.choice((8, 10, 12, 12, 14, 16))
    edits: dict[str, Any] = {**_COMPLETE, "BitsStored": bits, "HighBit": bits - 1}
    words: NDArray[Any] = gray if bits == 8 else (gray.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    case = Case(words=words, edits=edits)
    if chance.random() < 0.5:
        _window_that_shows(case, chance)
    return case


def _most(case: Case) -> int:
    return int(case.words.max())


def _window_that_shows(case: Case, chance: random.Random) -> None:
    slope, intercept = (
        float(case.edits.get(f"Rescale{which}", default)) for which, default in (("Slope", 1), ("Intercept", 0))
    )
    width = max(2, round(_most(case) * abs(slope) * chance.uniform(0.5, 1.5)))
    center = round(_most(case) * slope * chance.uniform(0.4, 0.6) + intercept)
    case.edits |= {"WindowCenter": center, "WindowWidth": width}


def _no_window(case: Case) -> None:
    case.edits.pop("WindowCenter", None)
    case.edits.pop("WindowWidth", None)


def _table(case: Case, chance: random.Random, *, bits: int, declared: int, kind: str) -> None:
    """Put a look-up table that rises in a curve to the greatest value of some bits."""
    n = _most(case) + 1
    curve = np.linspace(0.0, 1.0, n) ** chance.choice((0.7, 1.0, 1.4))
    entries = np.round(curve * (2**bits - 1)).astype("<u2")
    item = Dataset()
    item.add_new(0x00283002, "US", [n % 65536, 0, declared])
    item.add_new(0x00283006, "OW", entries.tobytes())
    case.edits[kind] = [item]
    if kind == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
        for keyword in ("RescaleSlope", "RescaleIntercept"):
            case.edits.pop(keyword, None)
        _no_window(case)


def _mutate_orientation(case: Case, chance: random.Random) -> None:
    tables = (oracle.FRONTAL, oracle.FRONTAL, oracle.LEANING, oracle.NOT_FRONTAL, oracle.NO_ORIENTATION, ("", "\\"))
    said = chance.choice(chance.choice(tables))
    case.orientation = chance.choice((said, said, said.lower(), said.replace("\\", " \\")))


def _mutate_age(case: Case, chance: random.Random) -> None:
    case.age = chance.choice(list(oracle.AGES))
    case.edits |= {"PatientBirthDate": ""} if not case.age else {}


def _mutate_photometric(case: Case, chance: random.Random) -> None:
    case.edits["PhotometricInterpretation"] = chance.choice(
        ("MONOCHROME1", "MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "")
    )
    case.edits["PresentationLUTShape"] = chance.choice(("", "", "IDENTITY", "INVERSE", "LIN OD"))


def _mutate_table(case: Case, chance: random.Random) -> None:
    kind = chance.choice(("VOILUTSequence", "VOILUTSequence", "ModalityLUTSequence"))
    bits = chance.choice((8, 10, 12, 14, 16))
    _table(case, chance, bits=bits, declared=chance.choice((bits, 16, 12, 8, 0, 17)), kind=kind)
    item = case.edits[kind][0]
    change = chance.randrange(8)
    if change == 0:
        case.edits[kind] = chance.choice(([], [Dataset()]))
    elif change == 1:
        item.LUTDescriptor = [(item.LUTDescriptor[0] - 1) % 65536, *item.LUTDescriptor[1:]]
    elif change == 2:
        item["LUTDescriptor"].value = [item.LUTDescriptor[0], chance.randrange(1, 500), item.LUTDescriptor[2]]
    elif change == 3:
        del item.LUTData


def _mutate_window(case: Case, chance: random.Random) -> None:
    most = _most(case)
    center: Any = chance.choice((0, most // 2, most, -most, 2 * most, round(most / 3, 1)))
    width: Any = chance.choice((0, 1, 2, -5, 0.5, most // 2, most, 4 * most, 50 * most))
    several = chance.random() < 0.2
    case.edits |= {"WindowCenter": [center, 5] if several else center, "WindowWidth": [width, 9] if several else width}
    case.edits["VOILUTFunction"] = chance.choice(("", "", "LINEAR", "LINEAR_EXACT", "SIGMOID", "CUBIC"))
    if chance.random() < 0.15:
        case.edits.pop(chance.choice(("WindowCenter", "WindowWidth")))


def _mutate_bits(case: Case, chance: random.Random) -> None:
    stored = chance.choice((16, 16, 14, 12, 10, 8, 7, 17))
    case.edits |= {"BitsStored": stored, "HighBit": chance.choice((stored - 1, stored - 1, stored - 1, 15, 11))}
    if chance.random() < 0.2:
        case.edits["BitsAllocated"] = chance.choice((8, 16, 32))
    if chance.random() < 0.5:
        _no_window(case)


def _mutate_rescale(case: Case, chance: random.Random) -> None:
    slope = chance.choice((None, "", "1", "1.0", "2", "-1", "0.5", "0", "1e30"))
    intercept = chance.choice((None, "", "0", "-0", "-1024", "4095", "0.5"))
    said = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    case.edits |= {keyword: value for keyword, value in said.items() if value is not None}


def _mutate_padding(case: Case, chance: random.Random) -> None:
    which = chance.randrange(5)
    if which == 0:
        case.edits["PixelPaddingValue"] = int(chance.choice((0, _most(case), case.words[0, 0])))
    elif which == 1:
        case.edits |= {"PixelPaddingValue": _most(case), "PixelPaddingRangeLimit": int(case.words[0, 0])}
    elif which == 2:
        n_bytes = chance.choice((1, 2, 88, 96, 176, 192, 512, 4096)) * case.words.itemsize
        case.behind_pixels = chance.choice((b"\0", b"\xff")) * n_bytes
    elif which == 3:
        case.behind = bytes(chance.choice((1, 2, 7, 8, 512, 4096)))
    else:
        side = chance.choice(("Rows", "Columns"))
        case.edits[side] = int(case.words.shape[side == "Columns"]) + chance.choice((-8, -1, 1, 8))


MUTATIONS: dict[str, Callable[[Case, random.Random], None]] = {
    "orientation": _mutate_orientation,
    "age": _mutate_age,
    "photometric": _mutate_photometric,
    "look-up table": _mutate_table,
    "window": _mutate_window,
    "bits": _mutate_bits,
    "rescale": _mutate_rescale,
    "padding": _mutate_padding,
}


def _vary_orientation(case: Case, chance: random.Random) -> None:
    case.orientation = chance.choice((*oracle.FRONTAL, *oracle.LEANING, "", "A\\F"))
    case.edits["ViewPosition"] = "LL" if case.orientation == "A\\F" else chance.choice(("PA", "AP"))


def _vary_age(case: Case, chance: random.Random) -> None:
    case.age = chance.choice(("018Y", "060Y", "099Y", "017Y", "216M", "012W", "", "036M"))
    if not case.age:
        case.edits |= {"PatientBirthDate": chance.choice(("", "19600102"))}


def _vary_photometric(case: Case, chance: random.Random) -> None:
    case.edits["PhotometricInterpretation"] = "MONOCHROME1"


def _vary_table(case: Case, chance: random.Random) -> None:
    bits = chance.choice((8, 10, 12, 16))
    kind = chance.choice(("VOILUTSequence", "ModalityLUTSequence"))
    _table(case, chance, bits=bits, declared=chance.choice((bits, 16)), kind=kind)


def _vary_window(case: Case, chance: random.Random) -> None:
    if "ModalityLUTSequence" in case.edits:
        return
    _window_that_shows(case, chance)
    case.edits["VOILUTFunction"] = chance.choice(("LINEAR", "SIGMOID"))


def _vary_bits(case: Case, chance: random.Random) -> None:
    if case.words.itemsize == 2:
        case.edits |= {"BitsStored": 16, "HighBit": 15}
        _no_window(case)


def _vary_rescale(case: Case, chance: random.Random) -> None:
    if "ModalityLUTSequence" not in case.edits:
        slope = chance.choice((1, 2, -1, 0.5))
        case.edits |= {"RescaleSlope": slope, "RescaleIntercept": chance.choice((0, -1024)), "RescaleType": "US"}
        _no_window(case)


def _vary_padding(case: Case, chance: random.Random) -> None:
    if chance.random() < 0.5:
        case.edits["PixelPaddingValue"] = 0
    else:
        case.behind = b"\xfc\xff\xfc\xffOB\0\0" + (64).to_bytes(4, "little") + bytes(64)  # Data Set Trailing Padding


def _vary_metadata(case: Case, chance: random.Random) -> None:
    case.edits |= {"SpecificCharacterSet": chance.choice(("ISO_IR 100", "ISO_IR 192")), "PatientName": "Müller^Jörg"}
    if case.syntax == _PLAIN:
        sizes = [2 * chance.randrange(500) for _ in range(chance.choice((1, 200)))] + [chance.choice((0, 2**21))]
        elements = (
            struct.pack("<HH2s2xI", 0x19, 0x1000 + i, b"OB", size) + bytes(size) for i, size in enumerate(sizes)
        )
        case.private = b"\x19\0\x10\0LO\x08\0ACME 1.0" + b"".join(elements)


def _vary_syntax(case: Case, chance: random.Random) -> None:
    syntaxes = ["1.2.840.10008.1.2", *(uid for uid in COMPRESSED if uid[-3:] not in (".81", ".91"))]
    case.private, case.behind = b"", b""
    case.syntax = chance.choice([uid for uid in syntaxes if not uid.endswith(".50") or case.words.itemsize == 1])


VARIATIONS: dict[str, Callable[[Case, random.Random], None]] = {
    "orientation": _vary_orientation,
    "age": _vary_age,
    "photometric": _vary_photometric,
    "look-up table": _vary_table,
    "window": _vary_window,
    "bits": _vary_bits,
    "rescale": _vary_rescale,
    "padding": _vary_padding,
    "metadata": _vary_metadata,
    "transfer syntax": _vary_syntax,
}


if __name__ == "__main__":
    run_program(app)
