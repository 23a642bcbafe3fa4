"""The tasks of the paper: one module a task, which loads, encodes, decodes and scores it.

A task meets `delta_lora.protocols.Task` and imports nothing else of `delta_lora`. `data` reads
files and downloads them, `language_modeling` and `generation` hold what causal models share,
`embedded` writes the offline corpora and `metrics` scores.
"""
