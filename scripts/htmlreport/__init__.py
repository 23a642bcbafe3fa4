"""The report of a scale: one HTML file that opens from disk, made of records and nothing else."""
