"""A grammar that writes the offline corpora: one world of entities, one file for each corpus.

`world` holds the entities and their facts and says nothing about text. `wording` holds what every
realiser needs (weighted choice, articles, tokenised text). Each corpus is one more file that reads
the world and words it in its own way: `e2e`, `webnlg`, `xsum` and `glue` in the format of the real
files, `general` and `sentences` for the pre-training. Every word is made up here; nothing is taken
from a data set. All randomness comes from `random.Random(seed)`.
"""
