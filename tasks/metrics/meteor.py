"""METEOR 1.5, the official jar, through its stdio interface, as e2e-metrics runs it.

``java -jar meteor-1.5.jar - - -stdio -l en -norm`` answers one line a request:
``SCORE ||| reference ||| ... ||| output`` gives the statistics of an instance, and
``EVAL ||| statistics ||| ...`` the score of every instance and, last, that of the whole set, in
which the statistics (not the scores) are summed. The command line of the same jar on files
(``-l en -norm -r N``, as WebNLG/GenerationEval runs it) gives the same score.

Loading the paraphrase table takes some ten seconds, so one Java process serves the whole life of
ours. It is started at the first score, again if it died, is killed where it does not answer in
time, and ends with our process.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.metrics import java
from tasks.metrics.java import MetricUnavailableError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: seconds for one answer, the first with the loading of the tables included.
TIMEOUT_S = 300.0
# 0.6 GiB is what the tables need.
_HEAP = "-Xmx1G"
_SEPARATOR = " ||| "


class MeteorDiedError(MetricUnavailableError):
    """The Java process ended, or answered nonsense, in the middle of a request."""


class MeteorProcess:
    """The Java process; a lock makes it safe to use from several threads."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()
        #: texts that were aligned last, and their statistics.
        self._aligned: tuple[Any, list[str]] = (None, [])

    def command(self) -> list[str]:
        """Return the command line.

        Raises:
            MetricUnavailableError: no Java, or no METEOR jar.
        """
        runtime = java.find_java()
        jar = java.find_file("meteor/meteor-1.5.jar")
        java.find_file("meteor/data/paraphrase-en.gz")  # the jar reads it from beside itself
        flags = [_HEAP, "-XX:+UseSerialGC", *java.LOCALE_FLAGS]
        return [runtime, *flags, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]

    def start(self) -> None:
        """Start the process where none is alive; loading goes on in the background.

        Raises:
            MetricUnavailableError: no Java, or no METEOR jar.
        """
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._owner != os.getpid():  # we are a fork: the pipes belong to the parent
            self._process, self._errors, self._owner = None, None, os.getpid()
        if self._process is not None and self._process.poll() is None:
            return
        command = self.command()
        self.close()
        logger.info("starting METEOR 1.5 (loading its paraphrase table takes some seconds)")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        self._process = subprocess.Popen(  # noqa: S603 -- our own command line
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        atexit.register(self.close)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return METEOR of the whole set; see `meteor`."""
        return self.score_subsets(predictions, references, [range(len(predictions))])[0]

    def score_subsets(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        subsets: Sequence[Sequence[int]],
    ) -> list[float]:
        """Return METEOR of several parts of a set; see `meteor_subsets`."""
        return self._twice(lambda: self._score(predictions, references, subsets))

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[str]:
        """Return the statistics of every instance, numbers between blanks, as the jar says them."""
        return self._twice(lambda: self._align(predictions, references))

    def evaluate(self, sets: Sequence[Sequence[str]]) -> list[float]:
        """Return the score of several sets of instances, each given by its statistics."""
        return self._twice(lambda: [self._evaluate(statistics) for statistics in sets])

    def _twice(self, work: Callable[[], T]) -> T:
        """Do some work, once more where the process died in it."""
        with self._lock:
            try:
                self._start()
                return work()
            except MeteorDiedError as error:
                logger.warning("%s; once more with a new process", error)
                self._start()
                return work()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        errors, self._errors = self._errors, None
        self._aligned = None, []
        atexit.unregister(self.close)
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, errors):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:  # what was buffered for a dead process
                continue

    def _score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        subsets: Sequence[Sequence[int]],
    ) -> list[float]:
        statistics = self._align(predictions, references)
        return [self._evaluate([statistics[index] for index in subset]) for subset in subsets]

    def _align(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Return the statistics of every instance; those of the last texts are kept."""
        texts_of_all = (tuple(predictions), tuple(map(tuple, references)))
        if self._aligned[0] == texts_of_all:
            return self._aligned[1]
        statistics: list[str] = []
        for prediction, texts in zip(predictions, references, strict=True):
            # As the official script does, for outputs only.
            output = prediction.replace("|||", "").replace("  ", " ")
            statistics += self._ask(_SEPARATOR.join(("SCORE", *texts, output)), 1)
        self._aligned = texts_of_all, statistics
        return statistics

    def _evaluate(self, statistics: Sequence[str]) -> float:
        """Return the score of the instances with these statistics."""
        answers = self._ask(_SEPARATOR.join(("EVAL", *statistics)), len(statistics) + 1)
        try:
            return float(answers[-1])
        except ValueError:
            self.close()
            raise MeteorDiedError(f"METEOR answered {answers[-1]!r} instead of a score") from None

    def _ask(self, request: str, num_answers: int) -> list[str]:
        """Send one line and read lines; a process that gives no answer in time is killed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()  # ends the blocked write or read below

        clock = threading.Timer(self.timeout_s, expire)
        clock.start()
        answers: list[bytes] = []
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            for _ in range(num_answers):
                answers.append(process.stdout.readline())
        except BrokenPipeError:
            answers.append(b"")
        finally:
            clock.cancel()
        if all(answer.endswith(b"\n") for answer in answers):
            return [answer.decode("utf-8", "replace").strip() for answer in answers]
        reason = self._last_error()
        self.close()
        if expired.is_set():
            raise MetricUnavailableError(
                f"METEOR gave no answer within {self.timeout_s:g} s and was ended; "
                f"score the predictions again on a machine that is less busy{reason}"
            )
        raise MeteorDiedError(
            f"the Java process of METEOR ended unexpectedly; it needs 1 GiB of memory{reason}"
        )

    def _last_error(self) -> str:
        """Return what the process wrote last to its error stream, to be put behind a message."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f" (Java says: {lines[0]})" if lines else ""


@functools.cache
def shared_process() -> MeteorProcess:
    """Return the one process that all scores share (not yet started)."""
    return MeteorProcess()


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR 1.5 of the whole set.

    Args:
        predictions: one text per instance, as `ptb.tokenize` returns it.
        references: for every instance one or more such texts.

    Returns:
        A fraction in [0, 1].

    Raises:
        MetricUnavailableError: no Java, no METEOR jar, or the process failed twice or did not
            answer in time.
    """
    return shared_process().score(predictions, references)


def meteor_subsets(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    subsets: Sequence[Sequence[int]],
) -> list[float]:
    """Return METEOR 1.5 of several parts of a set, each instance being aligned once.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.
        subsets: for every part the indices of its instances, at least one.

    Returns:
        A fraction in [0, 1] for each part.

    Raises:
        MetricUnavailableError: as in `meteor`.
    """
    return shared_process().score_subsets(predictions, references, subsets)


def statistics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """Return what of each instance goes into the sums of METEOR, as the jar counts it.

    The jar counts an output whose words are all in their places as no chunk, not as one, when it
    sums; so it is here.

    Args:
        predictions: one text per instance.
        references: for every instance one or more texts.

    Returns:
        (instances, statistics) float64.

    Raises:
        MetricUnavailableError: as in `meteor`, or the sums do not give the jar's score.
    """
    lines = shared_process().statistics(predictions, references)
    table = np.array([[float(number) for number in line.split()] for line in lines])
    lengths, chunks, matches = table[:, :2], table[:, -3], table[:, -2:]
    table[(lengths == matches).all(axis=1) & (chunks == 1), -3] = 0
    expected, found = shared_process().evaluate([lines])[0], from_sums(table.sum(axis=0)[None])[0]
    if not math.isclose(expected, found, rel_tol=1e-9):
        raise MetricUnavailableError(
            f"the summed statistics of METEOR give {found} where the jar says {expected}; its "
            "spread over instances cannot be told"
        )
    return table


def from_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return METEOR of several sets, by the jar itself.

    Args:
        sums: (sets, statistics) float64, over the instances of each set.

    Returns:
        (sets,) float64, fractions in [0, 1].

    Raises:
        MetricUnavailableError: as in `meteor`.
    """
    sets = [[" ".join(map(str, row))] for row in sums.tolist()]
    return np.array(shared_process().evaluate(sets))
