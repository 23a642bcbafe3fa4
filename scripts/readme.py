"""Put the generated rows into README, between ``<!-- results/... -->`` and ``<!-- end -->``.

Example:
    python scripts/readme.py            (or: make readme)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from delta_lora.writing import write_text

_BLOCK = re.compile(r"(<!-- (results/[\w./-]+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """Return `text` with every block replaced by the file it names; headings one level lower.

    Raises:
        FileNotFoundError: a named table was never made.
    """

    def block(match: re.Match[str]) -> str:
        table = (root / match[2]).read_text(encoding="utf-8")
        lower = re.sub(r"^(#+ )", r"##\1", table, flags=re.MULTILINE)
        return f"{match[1]}\n{lower.strip()}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    try:
        filled = fill(readme.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        sys.stderr.write(f"error: {error.filename} is missing; make that table first\n")
        return 2
    write_text(readme, filled)
    print(f"wrote {readme}")
    return 0


if __name__ == "__main__":
    console.run(main)
