"""Drawn radiographs with findings, in ChestX-ray14's layout: the chain runs on them where no patient's images are."""
