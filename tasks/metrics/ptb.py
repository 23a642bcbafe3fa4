"""The text that METEOR, ROUGE-L and CIDEr see: Penn Treebank tokens without punctuation.

e2e-metrics sends all texts of a file, one a line, through the PTBTokenizer of Stanford CoreNLP
3.4.1, lower-cases them and drops the tokens of `PUNCTUATION` (brackets stay, as ``-lrb-``). The
jar's answer for a line can depend on the next one (an abbreviation before a capital ends a
sentence), so texts go through it together and in order, as in the official script. Without Java,
`ptb_rules` gives the same tokens for the plain sentences of such data and refuses any other text.
"""

from __future__ import annotations

import functools
import logging
import subprocess

from tasks.metrics import java, ptb_rules
from tasks.metrics.java import MetricUnavailableError

logger = logging.getLogger(__name__)

#: seconds for one call; a full set of E2E references takes half a second.
TIMEOUT_S = 300.0
_QUOTES_AND_BRACKETS = ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
_STOPS_AND_DASHES = (".", "?", "!", ",", ":", "-", "--", "...", ";")
#: the tokens that are dropped.
PUNCTUATION = frozenset(_QUOTES_AND_BRACKETS + _STOPS_AND_DASHES)


@functools.lru_cache(maxsize=32)
def tokenize(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tokens of every text, joined by blanks; results are kept for the next call.

    Args:
        texts: the lines of one file: all references of a set, or all outputs.

    Raises:
        MetricUnavailableError: no Java, and a text that only the jar is certain about.
    """
    try:
        return tokenize_with_jar(texts)
    except MetricUnavailableError as error:
        try:
            tokenized = tuple(_drop_punctuation(tokens) for tokens in ptb_rules.tokenize(texts))
        except ptb_rules.UncertainError as uncertain:
            raise MetricUnavailableError(
                f"{error}; without it the tokens of one text are not certain: {uncertain}"
            ) from None
        logger.info("tokenising without CoreNLP: %s", error)
        return tokenized


def tokenize_with_jar(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tokens as CoreNLP gives them.

    Raises:
        MetricUnavailableError: no Java, no CoreNLP jar, or the jar failed.
    """
    jar = java.find_file("tokenizer/stanford-corenlp-3.4.1.jar")
    command = [java.find_java(), *java.LOCALE_FLAGS, "-XX:+UseSerialGC", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(  # noqa: S603 -- our own command line
            command,
            input="\n".join(texts).encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MetricUnavailableError(
            f"the CoreNLP tokenizer gave no answer within {TIMEOUT_S:g} s and was ended; "
            "score the predictions again on a machine that is less busy"
        ) from None
    if done.returncode != 0:
        message = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise MetricUnavailableError(
            f"the CoreNLP tokenizer failed with exit code {done.returncode}: {message[:1]}; "
            "check the Java installation with `java -version`"
        )
    lines = done.stdout.decode().split("\n")
    if len(lines) != len(texts):
        raise MetricUnavailableError(
            f"the CoreNLP tokenizer made {len(lines)} lines of {len(texts)} texts; "
            "take line breaks and control characters out of the texts"
        )
    return tuple(_drop_punctuation(line.rstrip().split(" ")) for line in lines)


def _drop_punctuation(tokens: list[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)
