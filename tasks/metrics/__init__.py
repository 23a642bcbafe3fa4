"""The official scorers of the tasks, one file each.

Every scorer is a plain function of texts that gives the number of the official script, or raises
`java.MetricUnavailableError` with the reason and the fix. A task's suite (`e2e.score`) turns that
into an empty cell of `delta_lora.protocols.Scores`. The folders beside the scorers (`e2e_nlg/`) are
the same suites as `evaluate` modules, loaded by path and without network.
"""
