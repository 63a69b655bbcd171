"""A folder of DICOM radiographs becomes a table, a row an image: which study, what was found, or why it was refused.

python examples/dicom_folder_to_table.py BUNDLE FOLDER findings.csv
"""

import csv
import sys

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from chexnet_deploy import Bundle, ImageError, Predictor
from chexnet_deploy.images import find_images

HEADER = ("StudyInstanceUID", "StudyDate", "ViewPosition")
path, folder, table = sys.argv[1:]
bundle = Bundle.open(path)
found = find_images([folder])
with (
    Predictor.of(bundle, threads=1, provider="cpu") as predictor,
    open(table, "w", newline="", encoding="utf-8") as out,
):
    rows = csv.writer(out)
    rows.writerow(("file", *HEADER, *bundle.findings, "refused"))
    for file, answer, _ in predictor.predict_stream(found.paths()):
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=[*HEADER])
            said = [str(header.get(name, "")) for name in HEADER]
        except (InvalidDicomError, OSError):
            said = [""] * len(HEADER)
        if isinstance(answer, ImageError):
            cells = [""] * len(bundle.findings) + [answer.reason.value]
        else:
            cells = [f"{answer.probabilities[finding]:.4f}" for finding in bundle.findings] + [""]
        rows.writerow((file.relative_to(found.root), *said, *cells))
