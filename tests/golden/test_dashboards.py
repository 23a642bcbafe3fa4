"""The views and reports of a table and a sweep, as Weights & Biases would get them.

Where a change is meant, write them again, read the difference, and say in the commit why:

    python -m tests.golden.test_dashboards
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scripts import dashboard
from tests.choices import first

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb-workspaces

FOLDER = Path(__file__).with_name("dashboards")
NAMES = ("table6", "lambda_k")


def made(name: str) -> dict[str, Any]:
    """Return view and report of a table or sweep with a page, a picture and a record of ours.

    Hashes in names of runs are none of this test's: `test_names` holds them.
    """
    run = "e2e--delta_lora--seed1--0123456789ab"
    rows = [{"label": "Delta-LoRA", "runs": [run]}, {"label": "LoRA", "runs": []}]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "tiny" / ("sweeps/lambda_k" if name == "lambda_k" else "")
        place.mkdir(parents=True)
        stem = "sweep" if name == "lambda_k" else name
        (place / f"{stem}.md").write_text("# Page\n\n![picture](x.svg)\n\n| BLEU |\n| --- |\n")
        (place / f"{stem}.json").write_text(json.dumps({"rows": rows}))
        (place / f"{stem}.png").write_bytes(b"")
        path = Path(temporary) / "made.json"
        command = [name, "--entity", "team", "--project", "mine", "--results", temporary]
        assert dashboard.main([*command, "--dry-run", str(path)]) == 0
        text = path.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(re.sub(r"\b[0-9a-f]{12}\b", "0123456789ab", text))
    return content


@pytest.mark.parametrize("name", first(NAMES))
def test_views_and_reports_are_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_APP_URL", "https://example.org")
    assert made(name) == json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    import os

    os.environ["WANDB_APP_URL"] = "https://example.org"
    FOLDER.mkdir(exist_ok=True)
    for each in NAMES:
        text = json.dumps(made(each), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (FOLDER / f"{each}.json").write_text(text, encoding="utf-8")
