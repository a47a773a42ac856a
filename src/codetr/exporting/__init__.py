"""Detectors as files for other runtimes: one graph (`graph`), what the file says of itself (`about`), and the forms in
which it is written (`formats`)."""
