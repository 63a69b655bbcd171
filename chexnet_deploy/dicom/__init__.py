"""DICOM in: one radiograph, checked on its header before a codec sees it, decoded in a process of its own."""
