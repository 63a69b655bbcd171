"""DICOM in and out; each file a room, opened only where it is needed."""
