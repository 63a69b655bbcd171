"""A node's worker that really answers: a bundle's Predictor on the pixels of a DICOM file.

    python -m benchmarks.node_answering BUNDLE

For tests it hangs, dies or fails on images of patients who are named so.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.node.work import Answer
from chexnet_deploy.node.worker import serve
from chexnet_deploy.predictor import Prediction, Predictor
from chexnet_deploy.sessions import check_known_answers, open_session


class PredictingWork:
    """Reads uncompressed MONOCHROME2 alone."""

    def __init__(self, path: Path) -> None:
        self._bundle = Bundle.open(path)
        self._session = open_session(self._bundle, threads=1)
        self._predictor = Predictor(self._session, self._bundle.manifest)
        self.versions: Mapping[str, str] = {"bundle": self._bundle.id}

    def self_test(self) -> None:
        """Check the known answers."""
        check_known_answers(self._session, self._bundle, n_probes=2)

    def answer(self, path: Path) -> Answer:
        """Return a text and a picture."""
        image = dcmread(path)
        misbehave(str(image.PatientName), path)
        if image.BodyPartExamined != "CHEST":
            return Answer(refusal="not-a-chest")
        values = image.pixel_array
        gray = (values >> (image.BitsStored - 8)).astype(np.uint8)
        prediction = self._predictor.predict(gray)
        return Answer((text_report(image, prediction, self._bundle.id), picture(image, gray, self._bundle.id)))


def misbehave(name: str, path: Path) -> None:
    """Do what the patient's name says."""
    if name == "HANG":
        time.sleep(3600)
    if name == "HANG^ONCE":
        marker = path.parents[1] / "hung-once"
        if not marker.exists():
            marker.touch()
            time.sleep(3600)
    if name == "DIE":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "RAISE":
        raise RuntimeError(f"{name} is quoted in this message")


def text_report(image: Dataset, prediction: Prediction, bundle_id: str) -> bytes:
    """Return the probabilities as a small structured report."""
    report = document(image, BasicTextSRStorage, bundle_id)
    report.Modality = "SR"
    report.ContentDate = report.StudyDate = image.StudyDate
    report.TextValue = "; ".join(f"{name} {p:.6f}" for name, p in prediction.probabilities.items())
    return encode(report)


def picture(image: Dataset, gray: np.ndarray, bundle_id: str) -> bytes:
    """Return what the model saw as a secondary capture."""
    capture = document(image, SecondaryCaptureImageStorage, bundle_id)
    capture.Modality = "OT"
    capture.Rows, capture.Columns = gray.shape
    capture.SamplesPerPixel, capture.PhotometricInterpretation = 1, "MONOCHROME2"
    capture.BitsAllocated = capture.BitsStored = 8
    capture.HighBit, capture.PixelRepresentation = 7, 0
    capture.PixelData = gray.tobytes()
    return encode(capture)


def document(image: Dataset, sop_class: str, bundle_id: str) -> Dataset:
    """Begin a document about an image."""
    made = Dataset()
    made.SOPClassUID = sop_class
    # The same image and bundle give the same UID.
    made.SOPInstanceUID = generate_uid(entropy_srcs=[image.SOPInstanceUID, bundle_id, sop_class])
    made.StudyInstanceUID = image.StudyInstanceUID
    made.SeriesInstanceUID = generate_uid(entropy_srcs=[image.SeriesInstanceUID, bundle_id, sop_class])
    made.PatientID, made.PatientName = image.PatientID, image.PatientName
    return made


def encode(dataset: Dataset) -> bytes:
    """Return a DICOM file."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    content = BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


if __name__ == "__main__":
    serve(lambda: PredictingWork(Path(sys.argv[1])))
