"""The report is one file that loads nothing, follows from its records, and shows text as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scripts import report
from scripts.htmlreport import page, samples
from scripts.htmlreport.charts import curves, forest, scatter
from scripts.htmlreport.comparisons import (
    Difference,
    differences_of,
    scores_of,
    signed,
    stated_differences,
)
from scripts.htmlreport.runs import flat, overrides_of
from scripts.htmlreport.sources import Sources, read_sources
from scripts.reporting.results import RESULTS
from scripts.runs.run import Run

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"
#: elements without an end tag.
VOID = {"meta", "link", "img", "input", "br", "col"}


class Document(HTMLParser):
    """What stands in a page: its elements in order, ids, links, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.script = ""
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources(RESULTS, "tiny", None)


@pytest.fixture(scope="module")
def text(sources: Sources) -> str:
    return page.write(sources)


@pytest.fixture(scope="module")
def document(text: str) -> Document:
    return Document(text)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of results with Table 1 and its records."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "runs").mkdir()
    content = json.loads((RESULTS / "tiny" / "table1.json").read_text(encoding="utf-8"))
    _write(tmp_path / "tiny" / "table1.json", content)
    for row in content["rows"]:
        for run in row["runs"]:
            shutil.copy(RESULTS / "runs" / "tiny" / f"{run}.json", tmp_path / "runs")
    return tmp_path


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _table(results: Path) -> tuple[Path, dict[str, Any]]:
    path = results / "tiny" / "table1.json"
    return path, json.loads(path.read_text(encoding="utf-8"))


def _dead_links(document: Document) -> list[str | None]:
    ids = {f"#{a['id']}" for _, a in document.tags if "id" in a}
    return [a["href"] for a in document.all("a") if a["href"] not in ids]


# ---------------------------------------------------------------------- the page


def test_the_committed_report_follows_from_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--scale", "tiny", "--check"]) == 0, capsys.readouterr().out


def test_the_same_records_give_the_same_bytes(text: str) -> None:
    assert page.write(read_sources(RESULTS, "tiny", None)) == text


def test_the_page_is_small_and_whole(text: str, document: Document, sources: Sources) -> None:
    assert len(text.encode()) < page.LIMIT == 3_000_000
    assert not sources.problems
    assert not document.wrong
    assert not document.open
    assert str(RESULTS.parent) not in text
    assert "None<" not in text


def test_the_page_loads_nothing(text: str, document: Document) -> None:
    for _, attributes in document.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (name, value)
            assert name != "style"
            if name in ("src", "href", "action", "poster", "data"):
                assert (value or "").startswith(("#", "data:")), value
    assert "@import" not in text
    assert "url(" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_policy_allows_the_own_style_and_script_alone(text: str, document: Document) -> None:
    policy = next(m for m in document.all("meta") if m.get("http-equiv"))["content"] or ""
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    for name, content in (("style-src", style[1]), ("script-src", document.script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert len(document.all("script")) == 1


def test_every_link_leads_to_one_place(document: Document) -> None:
    ids = [a["id"] for _, a in document.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert len(document.all("a")) > 50
    assert not _dead_links(document)


def test_pictures_and_charts_have_their_text(document: Document) -> None:
    for image in document.all("img"):
        assert len(image["alt"] or "") > 20
    for chart in document.all("svg"):
        is_drawing = chart.get("role") == "img" and len(chart.get("aria-label") or "") > 20
        # A strip inside another is a mark of it.
        is_mark = "x" in chart and "y" in chart
        assert is_drawing or chart.get("aria-hidden") == "true" or is_mark or "strip" in str(chart)


def test_tables_are_tables(text: str, document: Document) -> None:
    assert text.count("<table") == text.count("<caption")
    for region in (a for a in document.all("div") if a.get("role") == "region"):
        assert region["tabindex"] == "0"
        assert region["aria-label"]
    for button in document.all("button"):
        assert button["type"] == "button"


def test_every_table_claim_and_run_is_there(document: Document, sources: Sources) -> None:
    ids = {a["id"] for _, a in document.tags if "id" in a}
    assert {*sources.tables, *sources.figures, "verdicts", "audit", "cost", "reproduce"} <= ids
    assert {f"run-{name}" for name in sources.run_names()} <= ids
    words = " ".join(document.text)
    for claim in sources.claims.values():
        assert claim["short"] in words
    assert "These are not the paper's numbers." in words


def test_the_paper_scale_has_no_banner(small: Path) -> None:
    (small / "tiny").rename(small / "paper")
    text = page.write(read_sources(small, "paper", None))
    assert "not the paper's numbers" not in text


def test_text_stays_text(small: Path) -> None:
    path, content = _table(small)
    row = content["rows"][3]
    content["title"] = row["label"] = row["paper_note"] = HOSTILE
    row["metrics"]["bleu"]["missing"] = [HOSTILE]
    row["absent"] = [
        {"run": "e2e", "seed": 9, "signature": "x", "state": "failed", "reason": HOSTILE}
    ]
    content["claims"][0]["parts"][0]["statement"] = HOSTILE
    _write(path, content)
    (small / "tiny" / "report").mkdir()
    prediction = {"input": HOSTILE, "prediction": HOSTILE, "references": [HOSTILE]}
    kept = {row["runs"][0]: {"repeated": None, "loss": [], "predictions": [prediction]}}
    _write(small / "tiny" / "report" / "samples.json", kept)
    text = page.write(read_sources(small, "tiny", None))
    document = Document(text)
    assert not document.wrong
    assert "<img src=x" not in text
    assert not [i for i in document.all("img") if i.get("src") == "x"]
    assert len(document.all("script")) == 1
    assert " ".join(document.text).count("onerror=alert(1)") >= 7


def test_a_large_page_shows_the_first_seed_only(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = read_sources(small, "tiny", None)
    full = page.write(sources)
    assert full.count('class="run"') == 36
    monkeypatch.setattr(page, "LIMIT", len(full.encode()) - 1)
    short = page.write(sources)
    assert short.count('class="run"') == 12
    assert "the first seed is shown" in short
    assert not _dead_links(Document(short))
    monkeypatch.setattr(page, "LIMIT", 1000)
    with pytest.raises(ValueError, match="allowed are 1,000"):
        page.write(sources)


def test_failures_come_first_with_reason_and_command(small: Path) -> None:
    path, content = _table(small)
    row = content["rows"][6]
    for state, seed in (("missing", 2), ("failed", 3)):
        lost = {"run": "e2e", "seed": seed, "signature": "x", "state": state, "reason": "NaN loss"}
        row["absent"].append(lost)
    for i in (3, 4):
        content["rows"][i]["metrics"]["meteor"]["missing"] = ["METEOR: no Java"]
    _write(path, content)
    text = page.write(read_sources(small, "tiny", None))
    runs = text[text.index('<section id="runs"') :]
    places = [runs.index(f">{state}<") for state in ("failed", "not run", "no score")]
    assert places == sorted(places)
    assert places[-1] < runs.index('class="group"')
    assert runs.count(">no score<") == 1
    assert "LoRA, DyLoRA: METEOR: no Java" in runs
    assert "Delta-LoRA on e2e, seed 3" in runs
    assert "NaN loss" in runs
    assert "train.py experiment=e2e method=delta_lora scale=tiny seed=3" in runs


def test_a_broken_file_costs_its_section_alone(small: Path) -> None:
    (small / "tiny" / "table2.json").write_text("{", encoding="utf-8")
    sources = read_sources(small, "tiny", None)
    text = page.write(sources)
    assert "table2.json is no JSON" in text
    assert 'id="table1"' in text


def test_a_record_that_is_not_at_hand_costs_its_details_alone(small: Path) -> None:
    name = _table(small)[1]["rows"][0]["runs"][0]
    (small / "runs" / f"{name}.json").unlink()
    text = page.write(read_sources(small, "tiny", None))
    assert "Its record is not at hand." in text


def test_without_any_table_there_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--scale", "tiny", "--results", str(tmp_path)]) == 2
    assert "make reproduce-table1 SCALE=tiny" in capsys.readouterr().err


def test_a_sweep_is_shown_where_there_is_one(small: Path) -> None:
    folder = small / "tiny" / "sweeps" / "lambda_k"
    folder.mkdir(parents=True)
    (folder / "heat.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "pivot.csv").write_text("lambda,K 0\n0.5,17.40001\n")
    _write(folder / "sweep.json", {"title": "lambda & K"})
    text = page.write(read_sources(small, "tiny", None))
    assert "lambda_k: lambda &amp; K" in text
    assert 'href="#sweeps"' in text
    assert "<td>17.4</td>" in text
    assert text.count("data:image/svg+xml") == 1


# ---------------------------------------------------------------------- the command


def test_the_command_writes_what_its_check_accepts(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--scale", "tiny", "--results", str(small), "--outputs", str(small / "none")]
    assert report.main([*arguments, "--check"]) == 1
    assert "is missing" in capsys.readouterr().out
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    path, content = _table(small)
    content["rows"][0]["metrics"]["bleu"]["mean"] += 1
    _write(path, content)
    assert report.main([*arguments, "--check"]) == 1


def test_samples_are_kept_from_run_folders(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_references_of", lambda _: {"t0": ("one reference", "two")})
    name = _table(small)[1]["rows"][6]["runs"][0]
    folder = small / "outputs" / name
    folder.mkdir(parents=True)
    shutil.copy(small / "runs" / f"{name}.json", folder / "record.json")
    steps = [{"step": s, "train/loss": 1 / s} for s in range(1, 101)]
    lines = [*steps, {"step": 100, "validation/loss": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    predictions = [{"id": f"t{i}", "input": "a" * 999, "prediction": "ä"} for i in range(9)]
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in predictions)
    )
    path = report.make(small, "tiny", small / "outputs")
    kept = json.loads((path.parent / "samples.json").read_text(encoding="utf-8"))
    assert list(kept) == [name]
    assert len(kept[name]["loss"]) <= samples.NUM_POINTS
    assert kept[name]["loss"][-1] == [100, 0.01]
    assert len(kept[name]["predictions"]) == samples.NUM_PREDICTIONS
    assert len(kept[name]["predictions"][0]["input"]) == samples.NUM_LETTERS
    before = path.read_bytes()
    assert b"Training loss, e2e" in before
    assert b"<p>one reference</p><p>two</p>" in before
    assert b"not read" in before
    shutil.rmtree(small / "outputs")
    assert report.make(small, "tiny", small / "outputs").read_bytes() == before


def test_a_repetition_that_ended_elsewhere_says_so(small: Path) -> None:
    name = _table(small)[1]["rows"][0]["runs"][0]
    folder = small / "outputs" / name
    folder.mkdir(parents=True)
    record = json.loads((small / "runs" / f"{name}.json").read_text(encoding="utf-8"))
    _write(folder / "record.json", {**record, "metrics": {"bleu": 0.123456}})
    lines = [json.dumps({"step": s, "train/loss": 1.0 / s}) + "\n" for s in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    sources = read_sources(small, "tiny", None)
    sources.samples = samples.collect(sources, small / "outputs")
    device = record["provenance"]["device"]["name"]
    repeated = {"device": device, "scores": {"bleu": 0.1235}}
    assert sources.samples[name]["repeated"] == repeated
    assert "Training loss, e2e (of repetitions on another device)" in page.write(sources)
    kept = {name: {"repeated": None, "loss": [[1, 2.0]]}}
    sources.samples = dict(kept)
    assert samples.collect(sources, small / "outputs") == kept


@pytest.mark.parametrize(("table", "row"), [("table1", "delta_lora"), ("table4", "lora")])
def test_the_command_of_a_run_makes_that_run(sources: Sources, table: str, row: str) -> None:
    content = sources.tables[table]
    found = next(each for each in content["rows"] if each["method"] == row)
    on = next(iter(content["tasks"]))
    overrides = overrides_of(sources.specs[table], content, found, on, 2)
    assert overrides is not None
    name = Run.compose(overrides).name
    assert name in found["runs"]


# ---------------------------------------------------------------------- facts


def _row(method: str, values: dict[int, float], paper: float | None = None) -> dict[str, Any]:
    mean = sum(values.values()) / len(values) if values else None
    cell = {
        "mean": mean, "n": len(values), "ci95": None, "missing": [],
        "values": {str(seed): value for seed, value in values.items()},
    }  # fmt: skip
    known = {} if paper is None else {"x": {"value": paper, "status": "text"}}
    return {"method": method, "metrics": {"x": cell}, "paper": known}


COLUMN = {"name": "x", "better": "higher", "decimals": 2}


def test_differences_are_paired_and_read_by_direction() -> None:
    rows = [
        _row("lora", {1: 10.0, 2: 20.0, 3: 30.0}, 5.0),
        _row("delta_lora", {1: 11.0, 2: 21.1, 3: 31.0, 4: 99.0}, 6.5),
        _row("full", {1: 10.0, 2: 30.0, 3: 20.0}),
        _row("other", {7: 1.0}),
    ]
    base, above, unclear, none = differences_of(
        rows, COLUMN, {("full", "x"): 0.5, ("delta_lora", "x"): 9.0}
    )
    assert base is None
    assert above is not None
    assert unclear is not None
    assert none is not None
    assert (above.n, above.reading, above.paper) == (3, "better", 1.5)
    assert above.mean == pytest.approx(31 / 30)
    assert (unclear.reading, unclear.paper) == ("not distinguishable", 0.5)
    assert (none.reading, none.mean) == ("too few seeds", None)
    lower = differences_of(rows, {**COLUMN, "better": "lower"}, {})[1]
    assert lower is not None
    assert lower.reading == "worse"
    assert [score.mark for score in scores_of(rows[:3], COLUMN)] == [None, "best", "tied"]


def test_the_paper_s_differences_stand_in_the_claims_too(sources: Sources) -> None:
    stated = stated_differences(sources.tables["table2"]["claims"])
    assert stated["delta_lora", "meteor_all"] == 0.01
    assert {row for row, _ in stated} == {"delta_lora"}


def test_without_lora_there_is_no_difference() -> None:
    assert differences_of([_row("full", {1: 1.0})], COLUMN, {}) == [None]
    assert forest([None], COLUMN) is None


def test_a_forest_has_zero_in_its_middle_and_arrows_at_its_ends() -> None:
    found = [
        None,
        Difference(1.0, 0.5, 1.5, 3, 1.2, "better"),
        Difference(-0.8, -1.4, -0.2, 3, None, "worse"),
        Difference(100.0, 90.0, 110.0, 3, None, "better"),
        Difference(None, None, None, 0, 1.0, "too few seeds"),
    ]
    plot = forest(found, COLUMN)
    assert plot is not None
    base, up, down, far, missing = plot.strips
    assert base is None
    assert missing is None
    assert up is not None
    assert down is not None
    assert far is not None
    assert up.mean is not None
    assert up.paper is not None
    assert down.mean is not None
    assert down.mean < 50 < up.mean < up.paper
    assert (far.side, far.mean) == ("right", None)
    assert (50.0, "0.0") in plot.ticks or (50.0, "0") in plot.ticks
    assert plot.better == "right"
    assert all(0 <= place <= 100 for place, _ in plot.ticks)


def test_differences_of_nothing_still_have_an_axis() -> None:
    plot = forest([Difference(0.0, 0.0, 0.0, 3, None, "not distinguishable")], COLUMN)
    assert plot is not None
    assert plot.strips[0] is not None
    assert plot.strips[0].mean == 50


def test_curves_take_the_mean_over_common_steps() -> None:
    seeds = {1: {1: 4.0, 2: 3.0, 3: 2.0}, 2: {1: 2.0, 2: 1.5, 3: 1.0, 4: 0.5}}
    panel = curves("Loss", [("lora", "LoRA", seeds), ("control", "none", {1: {0: 9.0}})])
    assert panel is not None
    assert [(line.label, line.last, len(line.seeds)) for line in panel.lines] == [
        ("LoRA", "1.500", 2)
    ]
    assert curves("Loss", [("lora", "LoRA", {1: {1: 1.0, 2: 1.0}})]) is None
    assert curves("Loss", [("lora", "LoRA", {1: {1: float("nan"), 2: 1.0, 3: 1.0}})]) is None


def test_labels_of_points_do_not_meet() -> None:
    point = {"low": None, "high": 2.0}
    counts = (1000, 1000, 1001, 1000, 100000)
    points = [{**point, "number": i, "x": x, "y": 1 + i / 99} for i, x in enumerate(counts)]
    panel = scatter("Score", "parameters", points, 1)
    assert panel is not None
    places = sorted((p["label_x"], p["label_y"]) for p in panel.points)
    assert len({x for x, _ in places}) == 2
    assert all(high - low >= 9.9 for (_, low), (_, high) in pairwise(places[:4]))
    assert all(0 < p["cx"] < p["label_x"] < 360 for p in panel.points)
    assert scatter("Score", "parameters", points[:1], 1) is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(scheme: str) -> None:
    style = (page.TEMPLATES / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    texts = ["text", "soft", "link", "lora", "delta-lora", "control"]
    texts += [f"other-{i}" for i in range(5)]
    pairs = [(text, back) for text in texts for back in ("page", "card")]
    pairs += [(name, f"{name}-back") for name in ("good", "bad", "open", "none")]
    pairs += [("text", "open-back"), ("soft", "side"), ("delta-lora", "side")]
    for text, back in pairs:
        light, dark = sorted((_luminance(found[text]), _luminance(found[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)


def _luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_numbers_are_written_as_in_print() -> None:
    assert [signed(v, 1) for v in (1.26, -1.26, -0.01, None)] == ["+1.3", "−1.3", "0.0", "–"]
    assert list(flat({"a": {"b": 1, "c": [2]}, "d": None})) == [
        ("a.b", "1"), ("a.c", "[2]"), ("d", "null"),
    ]  # fmt: skip


def test_references_that_cannot_be_read_cost_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> dict[str, Any]:
        raise RuntimeError("no data here")

    reader = samples._References(broken)
    assert reader.read(["a=b"]) == {}
    assert reader.read(["a=b"]) == {}
    assert caplog.text.count("no data here") == 1
