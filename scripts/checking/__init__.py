"""The checks behind `scripts/gpu_check.py`: what a CPU cannot show, measured in minutes.

They need torch, transformers, accelerate, safetensors, numpy and tqdm, and nothing else of the
suite's packages, so they run on a bare GPU machine without network.
"""
