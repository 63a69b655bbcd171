"""How good scores are on labelled images: from a bundle or anyone's CSV to one record of every figure."""
