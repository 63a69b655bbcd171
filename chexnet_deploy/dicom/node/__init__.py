"""A DICOM node: receives images, has them answered, sends the results, and loses none."""
