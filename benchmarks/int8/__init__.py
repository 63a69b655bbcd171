"""Int8 beside fp32 and beside other quantisers."""
