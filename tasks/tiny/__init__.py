"""The tiny world: what makes runs possible without a GPU, a network or anybody's data.

`corpora` is a grammar that writes data sets in the real files' formats, and a general corpus of the
same world. `pretraining` is the task by which the tiny models get their weights from the latter:
`bpe` trains their tokenizers, `objectives` says what they learn, `mimetic` how they start.
"""
