"""Find the Java runtime and the jars that the official scorers consist of.

METEOR 1.5 and the Stanford tokenizer exist only as Java programs. Package `pycocoevalcap` 1.2
carries both, byte for byte those of tuetschek/e2e-metrics (equal git blob ids); what is found is
checked by SHA-256, because another build of METEOR is another metric.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
from pathlib import Path

#: what is needed of `pycocoevalcap`: path inside the package to SHA-256.
FILES = {
    "meteor/meteor-1.5.jar": "1e57b4c72c0830ebe68558f1c799a624e96cbc1b6045c9f6330e26dcff6eafc2",
    "meteor/data/paraphrase-en.gz": (
        "c147ac7d2c91f2fbb3ad31e4b352235061eb83145e0434daf217ee9ca5975f48"
    ),
    "tokenizer/stanford-corenlp-3.4.1.jar": (
        "2fcb91bb7a111f93d71e264f4ee0e3afd19ba0dde6d21b38605088df9e940399"
    ),
}

#: the same bytes in and out whatever the locale; a comma for a decimal point would break METEOR.
LOCALE_FLAGS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")


class MetricUnavailableError(RuntimeError):
    """A metric cannot be computed here; the message is the reason and the fix, for the reader."""


def find_java() -> str:
    """Return the path of the Java runtime.

    Raises:
        MetricUnavailableError: there is no `java` on PATH.
    """
    path = shutil.which("java")
    if path is None:
        raise MetricUnavailableError(
            "Java not found on PATH; install OpenJDK 8 or later, for example "
            "`conda install -c conda-forge openjdk` or `apt-get install default-jre-headless`"
        )
    return path


@functools.cache
def find_file(name: str) -> Path:
    """Return the path of one of `FILES`, its content checked once per process.

    Args:
        name: a key of `FILES`.

    Raises:
        MetricUnavailableError: the package or the file is missing, or the file is another one.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MetricUnavailableError(
            f"package pycocoevalcap, which carries {name}, is not installed; "
            "run `pip install pycocoevalcap==1.2`"
        )
    path = Path(folders[0]) / name
    if not path.is_file():
        raise MetricUnavailableError(
            f"{path} is missing; run `pip install --force-reinstall pycocoevalcap==1.2`"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != FILES[name]:
        raise MetricUnavailableError(
            f"{path} is not the official file: SHA-256 {digest}, expected {FILES[name]}; "
            "run `pip install --force-reinstall pycocoevalcap==1.2`"
        )
    return path
