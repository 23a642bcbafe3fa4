"""Runs: what one is, its configuration, its folder, and many of them in worker processes."""
