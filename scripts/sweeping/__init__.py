"""Sweeps: a grid of settings, its runs, and the view of what came of them."""
