"""One file per backend behind one method."""
