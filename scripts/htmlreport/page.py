"""The report as one HTML file: facts from `Sources`, shown by the templates.

All text goes through Jinja's escaping. The page may load nothing: its policy allows the one style
sheet and the one script that it holds, by their checksums, and pictures that stand in it.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.htmlreport.origin import origin_of
from scripts.htmlreport.runs import failures_of, groups_of
from scripts.htmlreport.sources import Sources, Sweep
from scripts.htmlreport.tables import table_of
from scripts.htmlreport.verdicts import verdicts_of
from scripts.htmlreport.words import facts_of, heading, held

Content = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
#: bytes; a page that would be larger shows the details of the first seed only.
LIMIT = 3_000_000
_MIME = {".svg": "image/svg+xml", ".png": "image/png"}


def write(sources: Sources) -> str:
    """Return the page; the same sources give the same bytes.

    Raises:
        ValueError: it would be larger than `LIMIT` even with the details of the first seed only.
    """
    for first_seed_only in (False, True):
        text = render(build(sources, first_seed_only=first_seed_only))
        if (size := len(text.encode())) <= LIMIT:
            return text
    raise ValueError(
        f"the report of {sources.folder} has {size:,} bytes, allowed are {LIMIT:,}; its tables "
        "name too many runs, make fewer tables at this scale"
    )


def render(page: Content) -> str:
    """Return the HTML of a page from `build`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(held=held)
    style, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "report.js")
    )
    return environment.get_template("page.html").render(
        page=page,
        policy=f"default-src 'none'; img-src data:; style-src {_checksum(style)}; "
        f"script-src {_checksum(script)}; base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
    )


def _checksum(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def build(sources: Sources, *, first_seed_only: bool = False) -> dict[str, Any]:
    """Return all that the page shows.

    Args:
        sources: from `scripts.htmlreport.sources.read_sources`.
        first_seed_only: show the details of the first seed's runs only.
    """
    groups = groups_of(sources, first_seed_only=first_seed_only)
    return {
        "scale": sources.scale,
        "is_paper": sources.scale == "paper",
        "problems": sources.problems,
        "verdicts": verdicts_of(sources),
        "counts": Counter(c["verdict"] for t in sources.contents.values() for c in t["claims"]),
        "tables": [table_of(sources, name, table) for name, table in sources.tables.items()],
        "figures": [_figure(sources, name, item) for name, item in sources.figures.items()],
        "audit": _audit(sources),
        "sweeps": [_sweep(sweep) for sweep in sources.sweeps],
        "failures": failures_of(sources),
        "run_tables": [
            {
                "id": name,
                "title": heading(content),
                "groups": [group for group in groups if group["table"] == name],
            }
            for name, content in sources.contents.items()
        ],
        "has_samples": any(run.get("samples") for group in groups for run in group["runs"]),
        "has_training": any(sample.get("loss") for sample in sources.samples.values()),
        "first_seed_only": first_seed_only,
        "origin": origin_of(sources),
    }


def _figure(sources: Sources, name: str, content: Content) -> dict[str, Any]:
    verdicts = [f"{claim['id']} {claim['verdict']}" for claim in content["claims"]]
    return {
        "id": name,
        "title": heading(content),
        "short": heading(content, short=True),
        "facts": facts_of(content),
        "picture": _picture(sources.picture(name), f"{heading(content)}. {'; '.join(verdicts)}"),
    }


def _audit(sources: Sources) -> dict[str, Any] | None:
    if sources.audit is None:
        return None
    return {
        "num_runs": sources.audit["num_runs"],
        "num_measurements": sources.audit["num_measurements"],
        "missing": sources.audit["missing"],
        "sections": [
            {
                **{key: section[key] for key in ("key", "title", "asked", "findings", "not_shown")},
                "head": section["head"],
                "rows": section["rows"],
                "picture": _picture(
                    sources.picture(f"audit_{section['key']}"),
                    f"{section['title']} {section['findings'][0]}",
                ),
            }
            for section in sources.audit["sections"]
        ],
    }


def _sweep(sweep: Sweep) -> dict[str, Any]:
    names = [path.stem.replace("_", " ") for path in sweep.pictures]
    return {
        "name": sweep.name,
        "title": f"{sweep.name}: {sweep.title}" if sweep.title else sweep.name,
        "pictures": [
            _picture(path, f"Sweep {sweep.name}: {name}; the numbers stand in the table below")
            for path, name in zip(sweep.pictures, names, strict=True)
        ],
        "rows": [[_rounded(text) for text in row] for row in sweep.rows],
    }


def _rounded(text: str) -> str:
    """Return a number of a CSV file with at most four decimals, any other text as it is."""
    try:
        return f"{float(text):.4f}".rstrip("0").rstrip(".") if "." in text else text
    except ValueError:
        return text


def _picture(path: Path | None, alt: str) -> dict[str, str] | None:
    """Return a picture as a data URI with its text, or None where there is none."""
    if path is None:
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return {"uri": f"data:{_MIME[path.suffix]};base64,{data}", "alt": alt}
