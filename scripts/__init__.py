"""The commands of the suite; each file runs as `python scripts/<name>.py`."""
