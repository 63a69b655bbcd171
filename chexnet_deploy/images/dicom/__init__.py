"""Reading DICOM: bytes -> elements -> grayscale pipeline -> gray, decoded in a process of its own."""
