"""One file a question, in the order of the page.

``facts`` compares the records with the limits of ``configs/audit`` and returns numbers and
verdicts, or None where there is nothing to judge; ``words`` puts them into sentences and a table,
and decides nothing.
"""
