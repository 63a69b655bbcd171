"""The statistics themselves, and studies on published predictions."""
