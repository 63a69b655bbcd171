"""The DICOM node: images in by C-STORE, results out by C-STORE, nothing lost and nothing about a patient in any log."""
