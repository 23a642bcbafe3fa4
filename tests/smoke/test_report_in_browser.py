"""The report in a real browser: nothing goes wrong, tables sort, nothing is wider than a phone.

Runs where Chromium is. The page's own policy forbids foreign scripts, so a hook that clicks and
measures runs in a copy without the policy; that the page itself is clean is seen with it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.htmlreport import page
from scripts.htmlreport.sources import Sources, read_sources
from scripts.reporting.results import RESULTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"

#: clicks the second column of the first table three times, in each mode, and follows a link.
CLICKS = """
const table = document.querySelector("#table1 table.scores");
const head = table.tHead.rows[0].cells[1], button = head.querySelector("button");
const column = (mode) => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset[mode]);
const labels = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
const found = {before: labels()};
button.click(); found.down = column("ours"); found.sorted = head.getAttribute("aria-sort");
button.click(); found.up = column("ours");
for (const mode of ["paper", "difference"]) {
  document.querySelector(`#table1 input[value=${mode}]`).click();
  found[mode] = column(mode);
  found["sees_" + mode] = getComputedStyle(table.querySelector("td .for-" + mode)).display;
}
found.sees_ours = getComputedStyle(table.querySelector("td .for-ours")).display;
button.click(); found.after = labels(); found.unsorted = head.getAttribute("aria-sort");
const run = document.querySelector("details.run");
location.hash = run.id;
const find = document.getElementById("find");
setTimeout(() => {
  found.opened = run.open && run.parentElement.open;
  find.value = "adalora seed1"; find.dispatchEvent(new Event("input"));
  found.runs = [...document.querySelectorAll("details.run")].filter((r) => r.checkVisibility())
    .map((r) => r.id);
  found.status = document.getElementById("status").textContent;
  found.images = [...document.images].filter((i) => !i.src.startsWith("data:")).length;
  found.errors = errors;
  tell(found);
}, 200);
"""

#: tells what is wider than the window, and how many buttons are too small for a finger.
MEASURES = """
const width = document.documentElement.clientWidth;
const inside = (e) => e.closest(".scroll, .sr, .skip, .picture img") !== null;
const wide = [...document.querySelectorAll("main *, header *")].filter((e) => !inside(e)
  && e.checkVisibility() && e.getBoundingClientRect().right > width + 1);
tell({width, all: document.documentElement.scrollWidth, errors,
  wide: wide.slice(0, 5).map((e) => e.tagName + "." + e.getAttribute("class"))});
"""


@pytest.fixture(scope="module")
def sources() -> Sources:
    found = read_sources(RESULTS, "tiny", None)
    name = found.run_names()[0]
    sample = {"input": HOSTILE, "prediction": HOSTILE, "references": [HOSTILE]}
    found.samples = {name: {"repeated": None, "loss": [], "predictions": [sample]}}
    return found


def _browse(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000",
        "--enable-logging=stderr", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def _ask(text: str, script: str, folder: Path, width: int) -> Any:
    """Return what `script` tells from the page in a frame of `width` pixels."""
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    before = "<script>const errors = []; addEventListener('error', (e) => errors.push(e.message));"
    before += "const tell = (what) => parent.postMessage(JSON.stringify(what), '*');</script>"
    hook = f"<script>addEventListener('load', () => {{ {script} }});</script>"
    bare = bare.replace("<style>", f"{before}<style>", 1).replace("</body>", f"{hook}</body>")
    (folder / "page.html").write_text(bare, encoding="utf-8")
    (folder / "frame.html").write_text(
        "<pre id=told></pre><script>addEventListener('message', (e) => {"
        "document.getElementById('told').textContent = e.data; });</script>"
        f"<iframe src=page.html width={width} height=900></iframe>",
        encoding="utf-8",
    )
    done = _browse(folder / "frame.html", folder)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None
    assert told[1], done.stderr[-2000:]
    return json.loads(html.unescape(told[1]))


def test_the_page_itself_says_nothing_on_the_console(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(page.write(sources), encoding="utf-8")
    done = _browse(path, tmp_path)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The script ran: it numbers the rows.
    assert 'data-order="0"' in done.stdout
    assert "<title>Delta-LoRA: results at scale tiny</title>" in done.stdout
    assert "<img src=" + '"x"' not in done.stdout


def test_tables_sort_and_links_open(sources: Sources, tmp_path: Path) -> None:
    found = _ask(page.write(sources), CLICKS, tmp_path, 1200)

    def numbers(texts: list[str]) -> list[float]:
        # What has no value stands at the end.
        assert "" not in texts[: sum(map(bool, texts))]
        return [float(text) for text in texts if text]

    assert numbers(found["down"]) == sorted(numbers(found["down"]), reverse=True)
    assert numbers(found["up"]) == sorted(numbers(found["up"]))
    for mode in ("paper", "difference"):
        assert numbers(found[mode]) == sorted(numbers(found[mode]))
        assert found[f"sees_{mode}"] == "inline"
    assert found["sees_ours"] == "none"
    assert (found["sorted"], found["unsorted"]) == ("descending", None)
    assert found["after"] == found["before"]
    assert found["opened"]
    assert found["runs"]
    assert all("adalora" in name and "seed1" in name for name in found["runs"])
    assert found["status"] == f"{len(found['runs'])} runs"
    assert found["images"] == 0
    assert found["errors"] == []


@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_nothing_is_wider_than_the_window(sources: Sources, tmp_path: Path, width: int) -> None:
    found = _ask(page.write(sources), MEASURES, tmp_path, width)
    assert found["errors"] == []
    assert found["wide"] == []
    assert found["all"] <= found["width"]
