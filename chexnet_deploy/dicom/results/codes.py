"""What the 14 findings and the model's own concepts are called in coded form.

A code is public where its meaning is that of ChestX-ray14's label, as far as Wang et al. 2017 (section 3.1) define it, and
its number is certain; else it is of the private scheme 99CHEXNET, as a wrong public code misleads every reader after us:

    Pleural_Thickening   no public code was at hand that we could verify
    Hernia               the label's text mining took hiatal, diaphragmatic and other hernias alike
    operating point      DICOM's CAD Operating Point (111071, DCM) numbers discrete settings and holds no probability
"""

import hashlib
from types import MappingProxyType
from typing import Final

from pydicom.sr.coding import Code

from chexnet_deploy.dicom.results.representations import check_value
from chexnet_deploy.errors import DicomError

PRIVATE_SCHEME: Final = "99CHEXNET"  # private designators begin with 99 (PS3.16 section 8.2)
PRIVATE_SCHEME_NAME: Final = "chexnet-deploy: findings and operating points of CheXNet"

PROBABILITY: Final = Code("122157", "DCM", "Probability")
NO_UNITS: Final = Code("1", "UCUM", "no units")
OPERATING_POINT: Final = Code("OPERATING_POINT", PRIVATE_SCHEME, "Operating point")
ABSENT_BELOW: Final = Code("ABSENT_BELOW", PRIVATE_SCHEME, "Lower operating point")
# CID 240, Present-Absent.
PRESENT: Final = Code("52101004", "SCT", "Present")
ABSENT: Final = Code("272519000", "SCT", "Absent")
UNDETERMINED: Final = Code("373068000", "SCT", "Undetermined")
IMAGING: Final = Code("363679005", "SCT", "Imaging procedure")  # CID 100 names none of the chest

_FINDINGS: Final = MappingProxyType(
    {
        "Atelectasis": Code("46621007", "SCT", "Atelectasis"),
        # Not 287272002, which DICOM's fetal templates call Cardiomegaly and SNOMED an enlarged septal foramen.
        "Cardiomegaly": Code("8186001", "SCT", "Cardiomegaly"),
        "Effusion": Code("60046008", "SCT", "Pleural effusion"),  # CID 645
        "Infiltration": Code("112121", "DCM", "Infiltrate"),  # CID 6104
        "Mass": Code("4147007", "SCT", "Mass"),  # CID 6104, of abnormal opacities of the chest
        "Nodule": Code("27925004", "SCT", "Nodule"),  # CID 6104
        "Pneumonia": Code("233604007", "SCT", "Pneumonia"),
        "Pneumothorax": Code("36118008", "SCT", "Pneumothorax"),  # CID 6105
        "Consolidation": Code("95436008", "SCT", "Lung consolidation"),
        "Edema": Code("19242006", "SCT", "Pulmonary edema"),  # CID 3700
        "Emphysema": Code("87433001", "SCT", "Pulmonary emphysema"),
        "Fibrosis": Code("51615001", "SCT", "Fibrosis of lung"),
        "Pleural_Thickening": Code("PLEURAL_THICKEN", PRIVATE_SCHEME, "Pleural thickening"),
        "Hernia": Code("HERNIA", PRIVATE_SCHEME, "Hernia seen on a chest radiograph"),
    }
)


def finding_code(finding: str) -> Code:
    """Return a finding's code; a finding of another model than CheXNet's gets a private one made from its name.

    Raises:
        DicomError: the name can't be a code's meaning (PS3.3 section 8.3), or not in any character set.
    """
    known = _FINDINGS.get(finding)
    if known is not None:
        return known
    meaning = check_value("LO", finding)
    if not meaning.text or meaning.fault or not finding.isascii():
        raise DicomError(
            f"The finding {finding!r} can't be a code's meaning; needed 1 to 64 ASCII characters without backslash. "
            "Rename it in the checkpoint and export again."
        )
    # A code value has 16 characters at most (PS3.3 section 8.1), a name often more.
    digest = hashlib.sha256(finding.encode("utf-8")).hexdigest()
    return Code(f"FINDING_{digest[:8]}", PRIVATE_SCHEME, meaning.text)
