"""A card says what sealed files say, names the file of each number, and is made of nothing that was changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Check
from chexnet_deploy.bundle.signing.attestation import ATTESTATION, ATTESTATION_SIGNATURE
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import Evidence, Site, SitePoint, site_path
from chexnet_deploy.errors import BundleError, ChexnetError, TrustError
from chexnet_deploy.evaluation.card import write_card
from chexnet_deploy.evaluation.spec import find_spec
from chexnet_deploy.files import sha256_of_file
from tests.bundle.test_attestation import attested, give, trust_file  # noqa: F401 - a fixture
from tests.command_line import assert_one_line_error, chexnet
from tests.tiny import write_parent

SPEC = find_spec("fp32")


def checked(value: float) -> tuple[Check, ...]:
    return (Check(name="max |logit difference| to torch", value=value, limit=0.5),)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Bundle, Bundle]:
    """A release and its successor, both measured, signed and attested; the newer one has a site file."""
    bundles = [
        write_parent(
            tmp_path / name,
            release=Release(line="adult", number=number),
            operating_points={"Mass": point},
            checks=checked(value),
        )
        for name, number, point, value in (("old", 1, 0.25, 0.125), ("new", 2, 0.375, 0.0625))
    ]
    for bundle, n_images in zip(bundles, (1234, 5678), strict=True):
        give(bundle, attested(bundle, n_images=n_images, spec_sha256=sha256_of_file(SPEC)), tmp_path)
    return Bundle.open(tmp_path / "old"), Bundle.open(tmp_path / "new")


def add_site(bundle: Bundle) -> None:
    evidence = {"sensitivity": Evidence(n_patients=60, n_wrong=1)}
    point = SitePoint(
        present_at=0.5, absent_below=0.5, guaranteed=evidence, sensitivity=1.0, specificity=0.5, undetermined=0.0
    )
    facts: dict[str, Any] = {
        "data": "s",
        "patients_note": (),
        "backend": "b",
        "made_utc": "u",
        "inputs_sha256": {},
        "tools": {},
    }
    counts = {"n_images": 60, "n_patients": 60, "n_refused": 0}
    site = Site(
        bundle=bundle.id,
        asked={"sensitivity": 0.9},
        confidence=0.95,
        points={"Mass": point},
        without={},
        **counts,
        **facts,
    )
    site_path(bundle.path).write_bytes(site.to_json())


def rows(text: str) -> list[list[str]]:
    """Of all tables, without their headers."""
    tables = re.findall(r"\| ---.*\n((?:\|.*\n)+)", text)
    return [re.split(r"(?<!\\) \| ", line[2:-2]) for table in tables for line in table.splitlines()]


def test_the_same_files_give_the_same_bytes_and_every_number_names_its_file(pair: tuple[Bundle, Bundle]) -> None:
    old, new = pair
    add_site(new)
    text = write_card(new, old)
    assert text == write_card(Bundle.open(new.path), Bundle.open(old.path))
    files = [sha256_of_file(b.path / name) for b in pair for name in ("manifest.json", ATTESTATION)]
    files += [sha256_of_file(site_path(new.path)), sha256_of_file(SPEC)]
    for file in files:
        assert f" | {file} |" in text
    for what, *values, source in rows(text):
        if re.fullmatch("[0-9a-f]{64}", source):
            continue  # the list of files
        named = re.findall(r"`([0-9a-f]{12})`", source)
        assert named or not re.search(r"\d", " ".join(values)), what
        assert all(any(file.startswith(each) for file in files) for each in named)


def test_what_a_card_says(pair: tuple[Bundle, Bundle]) -> None:
    _, new = pair
    said = {row[0]: row[1:] for row in rows(write_card(new))}
    manifest, attestation = (
        f"manifest.json `{new.id[:12]}`",
        f"attestation.json `{sha256_of_file(new.path / ATTESTATION)[:12]}`",
    )
    assert said["release"] == ["adult 2", manifest]
    assert said["Mass"] == ["present from 0.375", manifest]
    assert said[r"max \|logit difference\| to torch"] == ["0.0625", "0.5", manifest]
    assert said["verdict"] == ["PASS on 1 of 1", attestation]
    assert said["images, patients"] == ["5,678, 2", attestation]
    add_site(new)
    (site_says,) = [row for row in rows(write_card(new)) if row[0] == "Mass"]
    assert site_says[1:] == [
        "absent below 0.5, present from 0.5",
        f"site file `{sha256_of_file(site_path(new.path))[:12]}`",
    ]


def test_a_dossier_has_the_three_parts(pair: tuple[Bundle, Bundle]) -> None:
    old, new = pair
    _, description, protocol, impact = re.split(
        "## (?:Description of m|Modification p|Impact a).*\n", write_card(new, old)
    )
    assert {row[0]: row[1:3] for row in rows(description)} == {"release": ["adult 1", "adult 2"]}
    assert "Unchanged: precision, findings, model file, " in description
    assert ["auroc margin", "default 0.001", f"spec `{sha256_of_file(SPEC)[:12]}`"] in rows(protocol)
    assert "Both were measured on the same data, by the same spec, on the same kind of machine." in protocol
    changed = {row[0]: row[1:3] for row in rows(impact)}
    assert changed[r"max \|logit difference\| to torch"] == ["0.125", "0.0625"]
    assert changed["images, patients"] == ["1,234, 2", "5,678, 2"]
    assert changed["Mass"] == ["present from 0.25", "present from 0.375"]


def test_what_a_file_says_stays_text(tmp_path: Path) -> None:
    hostile = (Check(name="a | b\n\n# PASS <img src=x>", value=0.5, limit=1.0),)
    text = write_card(write_parent(tmp_path / "hostile", checks=hostile))
    assert "| a \\| b # PASS &lt;img src=x> | 0.5 | 1 |" in text


def test_two_experiments_are_not_passed_off_as_one(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    old, new = pair
    give(new, attested(new, data_sha256="3" * 64), tmp_path)
    text = write_card(new, old)
    assert "measured with another data and another spec: their results are not of one experiment" in text
    assert f"| spec | `{'5' * 64}`, which is none of this package's |" in text
    (new.path / ATTESTATION).unlink()
    (new.path / ATTESTATION_SIGNATURE).unlink()
    assert "Not both bundles hold an attestation" in write_card(Bundle.open(new.path), old)


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def link_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("edit", "trusted", "found"),
    [
        (
            lambda new, old: replace(new / "manifest.json", b"0.0625", b"0.0525"),
            False,
            "was changed after it was written",
        ),
        (lambda new, old: (new / "probe.npz").write_bytes(b"x"), False, "probe.npz does not match its manifest"),
        (
            lambda new, old: replace(new / ATTESTATION, b":5678,", b": 5678,"),
            False,
            "not in the form that `bench` writes",
        ),
        (
            lambda new, old: replace(new / ATTESTATION, b":5678,", b":9678,"),
            True,
            "signature by release is not for this",
        ),
        (lambda new, old: link_nowhere(new / ATTESTATION), False, "is not a plain file"),
        (lambda new, old: (new / ATTESTATION_SIGNATURE).unlink(), True, "attestation.sig is missing"),
        (lambda new, old: (new / "manifest.sig").unlink(), True, "is not signed"),
        (lambda new, old: (new / ATTESTATION).write_bytes((old / ATTESTATION).read_bytes()), False, "needed one of"),
        (
            lambda new, old: replace(new.parent / "new.site.json", b"0.95", b"0.85"),
            False,
            "was changed after it was written",
        ),
    ],
    ids=["manifest", "file", "form", "number", "link", "no signature", "unsigned", "another's", "site"],
)
def test_an_edited_input_is_refused(
    pair: tuple[Bundle, Bundle],
    trust_file: Path,  # noqa: F811
    edit: Callable[[Path, Path], object],
    trusted: bool,
    found: str,
) -> None:
    old, new = pair
    if not trusted:
        add_site(new)
    edit(new.path, old.path)
    trust = Trust.read(trust_file).without_floor() if trusted else None
    with pytest.raises(ChexnetError, match=found):
        write_card(Bundle.open(new.path, trust=trust), old)


def test_an_attestation_of_another_model_and_a_change_from_nothing_are_refused(
    pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    old, new = pair
    with pytest.raises(BundleError, match="twice, needed another by --since"):
        write_card(new, Bundle.open(new.path))
    with pytest.raises(BundleError, match="--since is adult 2, needed an older release of adult than adult 1"):
        write_card(old, new)
    (new.path / ATTESTATION).write_bytes(attested(new, model_sha256="3" * 64).to_bytes())  # `sign` would refuse it
    with pytest.raises(TrustError, match="the attestation is of another model file"):
        write_card(new)


def test_the_command(pair: tuple[Bundle, Bundle], trust_file: Path) -> None:  # noqa: F811
    old, new = pair
    done = chexnet("card", new.path, "--since", old.path)
    assert (done.returncode, done.stdout) == (0, write_card(new, old))
    text = trust_file.read_text().replace("5" * 64, sha256_of_file(SPEC))
    trust_file.write_text(f'line = "adult"\nmin_release = 2\n{text}')  # the one before may be older
    done = chexnet("card", new.path, "--since", old.path, "--trust", trust_file)
    assert done.returncode == 0, done.stderr
    assert "Signatures: by release." in done.stdout
    replace(new.path / ATTESTATION, b":5678,", b":9678,")
    assert_one_line_error(chexnet("card", new.path, "--trust", trust_file), 2, "signature by release is not for this")
