"""The node's DICOM conformance statement (PS3.2), made from the tables that the node itself runs by.

python -m benchmarks.services.conformance     writes docs/dicom-conformance.md
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pydantic import BaseModel
from pydicom.uid import Comprehensive3DSRStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made when it is imported

from chexnet_deploy import __version__
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.dicom.node.config import Limits, NodeConfig, Outbox
from chexnet_deploy.dicom.node.inbox import DROPPED_SOP_CLASSES, RADIOGRAPH_MODALITIES, Verdict
from chexnet_deploy.dicom.node.storage_scp import SOP_CLASSES, TRANSFER_SYNTAXES
from chexnet_deploy.dicom.node.storage_scu import judge
from chexnet_deploy.dicom.results import codes
from chexnet_deploy.dicom.results.attributes import PATIENT_STUDY, PICTURE
from chexnet_deploy.dicom.results.result import ALGORITHM, DISCLAIMER

PAGE: Final = Path(__file__).parents[2] / "docs" / "dicom-conformance.md"
RESULT_CLASSES: Final = (Comprehensive3DSRStorage, SecondaryCaptureImageStorage)

_TEXT: Final = """# DICOM conformance statement

`chexnet-deploy node` {version}, in the order of PS3.2 annex A. `python -m benchmarks.services.conformance` writes this page
from the tables that the node runs by, and a test holds them equal.

## 1 Overview

The node receives chest radiographs, has a model look for findings, and sends a structured report and pictures, or why there
are none, to each configured destination, in the study that the image came from. It queries nothing, prints nothing and writes
no media.

{services}

As SCP the node also takes what lies in a study beside radiographs, so that whole studies can be sent; it keeps none of it (3.4).

## 2 Introduction

For whoever connects the node to a network. That two statements match is no proof that two systems work together: try them. The
results are marked "{disclaimer}"; the node is no medical device.

## 3 Networking

### 3.1 Implementation model

One application entity listens, and calls each destination. An image is acknowledged once it is on disk. Images are answered
in the order of arrival; results wait in a durable outbox until each destination took them. After a kill at any moment the same
results may be sent again, under the same SOP Instance UIDs. An image that was answered is not answered again, transcoded or not;
one with another header or other pixels under the same UID is, by objects with UIDs of their own.

### 3.2 Association policies

{associations}

### 3.3 Association initiation: Storage SCU

When results wait for a destination; one presentation context for each kind of document.

{proposed}

What a C-STORE response means: "later" is tried again after {first_retry_s:g} s, then after twice as long each time, up to
{max_retry_s:g} s; a document that is refused is parked for a person to look at, and the next one goes.

{responses}

No answer within {send_timeout_s:g} s, a rejected association and one that breaks off are "later" too; a document that breaks
off {max_breaks} associations is parked. So is one whose SOP class is not accepted.

### 3.4 Association acceptance: Storage and Verification SCP

From the configured AE titles and networks alone. Taken and answered; a Secondary Capture only of modality {modalities}:

{taken}

In the first of these transfer syntaxes that is proposed:

{syntaxes}

What a C-STORE is answered with:

{answers}

An image is kept until it is answered, not longer. One that the model can't use is acknowledged, and a Secondary Capture in its
study says why there is no result.

Taken in the same transfer syntaxes, and dropped:

{dropped}

### 3.5 Network interfaces

TCP over IPv4 or IPv6, with TLS where it is configured.

### 3.6 Configuration

One TOML file, read at start; units are in the names.

{configuration}

## 4 Media interchange

None.

## 5 Character sets

Read: those of PS3.3 C.12.1.1.2 that pydicom decodes. Written: ISO_IR 6; the source's, where that has one byte a character; else
ISO_IR 192.

## 6 Security

AE titles and networks limit who may connect. TLS with certificates on both sides is optional. The audit log is hash-chained and
names no patient; it is not PS3.15's.

## 7 Annexes

### 7.1 Created objects

Comprehensive 3D SR, complete, unverified and preliminary; Secondary Capture, RGB, one for each finding drawn, or one that says
why there is no result. UIDs are made from the image, the bundle and its
site file (2.25, PS3.5 B.2). Taken over from the image where valid:

{attributes}

### 7.2 Private attributes

None.

### 7.3 Templates and coded terminology

The report is TID 1500, Measurement Report, with one measurement group (TID 1501) a finding, of algorithm {algorithm} (TID 4019):
its probability, its operating point where there is one, and an evaluation named by the finding's code. {scheme} is a private
scheme; a finding of another model has a code of it, made from the finding's name.

{codes}

### 7.4 Grayscale image consistency

Nothing is displayed.

### 7.5 Standard extended, specialized and private SOP classes; private transfer syntaxes

None.
"""
# One status of each kind that PS3.4 table B.2-1 has, and one of PS3.7 annex C.
_STATUSES: Final = (0x0000, 0xB000, 0xB006, 0xB007, 0xA700, 0xA900, 0xC000, 0x0122)
_CONCEPTS: Final = {
    **{finding: codes.finding_code(finding) for finding in FINDINGS},
    "procedure reported": codes.IMAGING,
    "probability": codes.PROBABILITY,
    "operating point": codes.OPERATING_POINT,
    "a site file's second operating point, below which a finding is absent": codes.ABSENT_BELOW,
    "at or above its operating point": codes.PRESENT,
    "below its operating point": codes.ABSENT,
    "without operating point, or between two": codes.UNDETERMINED,
}


def render() -> str:
    """Return the page."""
    limits, outbox, library = Limits(), Outbox(), AE()
    accepted = (Verification, *SOP_CLASSES)
    services = dict.fromkeys((*accepted, *RESULT_CLASSES))
    return _TEXT.format(
        version=__version__,
        disclaimer=DISCLAIMER,
        algorithm=ALGORITHM,
        scheme=codes.PRIVATE_SCHEME,
        services=_table(
            "SOP class | UID | SCU | SCP",
            ((uid.name, uid, _yes(uid in RESULT_CLASSES), _yes(uid in accepted)) for uid in services),
        ),
        associations=_table(
            "policy | value",
            (
                ("application context", "1.2.840.10008.3.1.1.1"),
                ("accepted at once", f"{limits.max_associations}, {limits.max_associations_per_peer} of one peer"),
                ("opened at once", "1 to each destination, kept while there is something to send"),
                ("operations at once", "1: asynchronous operations are not negotiated"),
                ("largest PDU received", f"{limits.max_pdu_bytes} bytes"),
                ("implementation class UID", library.implementation_class_uid),
                ("implementation version name", library.implementation_version_name),
            ),
        ),
        proposed=_table(
            "SOP class | UID | transfer syntax",
            ((uid.name, uid, ExplicitVRLittleEndian.name) for uid in RESULT_CLASSES),
        ),
        first_retry_s=outbox.first_retry_s,
        max_retry_s=outbox.max_retry_s,
        send_timeout_s=outbox.send_timeout_s,
        max_breaks=outbox.max_breaks,
        responses=_table("status | the document is", ((f"{each:04X}", judge(each).state) for each in _STATUSES)),
        modalities=" or ".join(sorted(RADIOGRAPH_MODALITIES)),
        taken=_table("SOP class | UID", ((uid.name, uid) for uid in accepted)),
        syntaxes=_table("transfer syntax | UID", ((uid.name, uid) for uid in TRANSFER_SYNTAXES)),
        answers=_table("the object | status", ((each.value, f"{each.status:04X}") for each in Verdict)),
        dropped=_table("SOP class | UID", ((uid.name, uid) for uid in DROPPED_SOP_CLASSES)),
        configuration=_table("key | default", _keys(NodeConfig)),
        attributes=_table(
            "attribute | VR | type | in",
            (
                (each.keyword, each.vr, each.type, where)
                for where, table in (("report and picture", PATIENT_STUDY), ("picture", PICTURE))
                for each in table
            ),
        ),
        codes=_table(
            "concept | code | scheme | meaning",
            ((name, each.value, each.scheme_designator, each.meaning) for name, each in _CONCEPTS.items()),
        ),
    )


def _table(head: str, rows: Iterable[tuple[object, ...]]) -> str:
    heads = head.split(" | ")
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows))


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _keys(record: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """Return each key of a configuration and its default."""
    rows: list[tuple[str, str]] = []
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _keys(field.annotation, f"{prefix}{name}.")
        else:
            rows.append((f"`{prefix}{name}`", "required" if field.is_required() else str(field.default)))
    return rows


if __name__ == "__main__":
    PAGE.write_text(render())
