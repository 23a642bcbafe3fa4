"""The tasks of the paper: `e2e`, `webnlg`, `xsum` and `glue`, one module each; see README.md here.

A task meets `delta_lora.protocols.Task`: it loads, encodes, decodes and scores. `sources` says
where data come from and `data` reads them; the other modules hold what tasks share. `metrics`
scores, and `tiny` is the world of the tiny scale.
"""
