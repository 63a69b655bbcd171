"""DICOM radiographs made from nothing, in every transfer syntax that is read: for tests and hostile inputs.

Written by pydicom and compressed by gdcm, so that what reads them wasn't written by the same hand.
"""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

ROWS, COLUMNS = 48, 40
WORDS = (np.arange(COLUMNS)[np.newaxis, :] + 40 * np.arange(ROWS)[:, np.newaxis] + 1000).astype(np.uint16)
"""[48, 40], 1000..2919, each value once, so that any swap of rows, columns or bytes shows."""

COMPRESSED: Mapping[str, int] = {
    "1.2.840.10008.1.2.4.50": gdcm.TransferSyntax.JPEGBaselineProcess1,
    "1.2.840.10008.1.2.4.57": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "1.2.840.10008.1.2.4.70": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "1.2.840.10008.1.2.4.80": gdcm.TransferSyntax.JPEGLSLossless,
    "1.2.840.10008.1.2.4.81": gdcm.TransferSyntax.JPEGLSNearLossless,
    "1.2.840.10008.1.2.4.90": gdcm.TransferSyntax.JPEG2000Lossless,
    "1.2.840.10008.1.2.4.91": gdcm.TransferSyntax.JPEG2000,
    "1.2.840.10008.1.2.5": gdcm.TransferSyntax.RLELossless,
}
LOSSLESS = tuple(syntax for syntax in COMPRESSED if syntax[-3:] not in (".50", ".81", ".91"))


@config.disable_value_validation()  # what is no value of its VR must be written too
def make_dataset(words: NDArray[Any] = WORDS, edits: Mapping[str, Any] | None = None) -> Dataset:
    """Return a data set of an adult's chest, PA, by computed radiography, 12 bits stored, as plain as the standard allows.

    Args:
        words: [H, W] uint8 or 16-bit stored values.
        edits: by keyword, values to set; None takes the attribute away.
    """
    dataset = Dataset()
    dataset.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1")
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = (UID(f"1.2.3.{n}") for n in (1, 2, 3))
    dataset.StudyDate, dataset.Modality = "20200102", "CR"
    dataset.PatientName, dataset.PatientID = "CANARY^NAME", "CANARYID"
    dataset.PatientBirthDate, dataset.PatientAge = "19600102", "060Y"
    dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = words.shape
    dataset.BitsAllocated = 8 * words.dtype.itemsize
    dataset.BitsStored = 12 if words.dtype.itemsize == 2 else 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(words.dtype.kind == "i")
    dataset.PixelData = words.astype(words.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW" if words.dtype.itemsize == 2 else "OB"
    for keyword, value in (edits or {}).items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


@config.disable_value_validation()
def make_dicom(
    words: NDArray[Any] = WORDS,
    edits: Mapping[str, Any] | None = None,
    *,
    syntax: str = ExplicitVRLittleEndian,
) -> bytes:
    """Return the file of such a data set; see make_dataset."""
    dataset = make_dataset(words, edits)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = (
        ImplicitVRLittleEndian if syntax == "1.2.840.10008.1.2" else ExplicitVRLittleEndian
    )
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return compress(buffer.getvalue(), syntax) if syntax in COMPRESSED else buffer.getvalue()


def compress(content: bytes, syntax: str) -> bytes:
    """Return an uncompressed file in another transfer syntax."""
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "plain.dcm", Path(folder) / "packed.dcm"
        plain.write_bytes(content)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(COMPRESSED[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(packed))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return packed.read_bytes()
