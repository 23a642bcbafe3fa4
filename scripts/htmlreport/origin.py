"""What repeats the report: commands, code, devices, packages, checksums."""

from __future__ import annotations

from collections import Counter
from typing import Any

from scripts.htmlreport.sources import Sources
from scripts.reporting import stats


def origin_of(sources: Sources) -> dict[str, Any]:
    """Return what repeats the page: commands, code, devices, packages, checksums."""
    contents = sources.contents.values()
    seeds = {tuple(content["seeds"]) for content in contents}
    extra = {tuple(content["overrides"]) for content in contents}
    command = f"make reproduce-all SCALE={sources.scale}"
    if len(seeds) == len(extra) == 1:
        command += f" SEEDS={','.join(map(str, next(iter(seeds))))}"
        if overrides := next(iter(extra)):
            command += f' ARGS="{" ".join(overrides)}"'
    commits: Counter[tuple[str, bool | None]] = Counter()
    packages: Counter[tuple[tuple[str, str], ...]] = Counter()
    files: dict[tuple[str, str, str], None] = {}
    weights: dict[tuple[str, str], None] = {}
    for record in sources.records.values():
        git = record["provenance"]["git"]
        commits[str(git["commit"]), git["dirty"]] += 1
        packages[tuple(sorted(record["provenance"]["packages"].items()))] += 1
        for file in record["task"].get("files", []):
            files[record["task"]["name"], file["name"], str(file.get("sha256"))] = None
        if record["model"].get("weights_sha256"):
            weights[record["model"]["name"], record["model"]["weights_sha256"]] = None
    return {
        "commands": [command, f"make report SCALE={sources.scale}"],
        "is_one_command": len(seeds) == len(extra) == 1,
        "commits": sorted(commits.items(), key=lambda item: (-item[1], item[0][0])),
        "devices": sorted({device for content in contents for device in content["devices"]}),
        "packages": sorted(packages.items(), key=lambda item: (-item[1], item[0])),
        "files": sorted(files),
        "weights": sorted(weights),
        "hashes": sorted(sources.hashes.items()),
        "num_records": len(sources.records),
        "num_runs": len(sources.run_names()),
        "confidence": f"{stats.CONFIDENCE:.0%}".replace("%", " %"),
    }
