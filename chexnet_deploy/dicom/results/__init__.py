"""One image's answers as a structured report and as pictures."""
