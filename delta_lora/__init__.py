"""Delta-LoRA (arXiv 2309.02411): the method, its relatives, and the loop that trains them."""

__version__ = "0.1.0"
