"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAZY = {"wandb", "bitsandbytes", "matplotlib", "peft"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no source in {folder}"
    return files


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", sources("delta_lora"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_knows_no_task_no_script_and_no_hydra(path: Path) -> None:
    forbidden = ("tasks", "scripts", "hydra", "omegaconf")
    assert not [m for m in imports(path) if within(m, *forbidden)]


@pytest.mark.parametrize("path", sources("tasks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tasks_import_of_the_library_what_knows_no_training(path: Path) -> None:
    allowed = (
        "delta_lora.protocols", "delta_lora.checks", "delta_lora.console", "delta_lora.locks",
        "delta_lora.positions", "delta_lora.writing",
    )  # fmt: skip
    assert not [
        m for m in imports(path)
        if within(m, "scripts", "hydra", "omegaconf")
        or (within(m, "delta_lora") and not within(m, *allowed))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", sources("delta_lora/methods"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_methods_know_neither_each_other_nor_the_trainer(path: Path) -> None:
    forbidden = ("delta_lora.methods", "delta_lora.trainer", "delta_lora.checkpoint")
    assert not [m for m in imports(path) if within(m, *forbidden)]


#: folder -> what of this repository it may import beside itself (the table in CONTRIBUTING.md).
MAY_IMPORT = {
    "delta_lora/analysis": ("delta_lora",),
    "delta_lora/integrations": (
        "delta_lora.checkpoint", "delta_lora.checks", "delta_lora.delta",
        "delta_lora.peft_folder", "delta_lora.projections", "delta_lora.step_watch",
        "delta_lora.stored", "delta_lora.writing",
    ),
    "delta_lora/methods": (
        "delta_lora.checks", "delta_lora.delta", "delta_lora.families", "delta_lora.low_rank",
        "delta_lora.method_bases", "delta_lora.peft_folder", "delta_lora.positions",
        "delta_lora.projections", "delta_lora.protocols",
    ),
    "tasks/metrics": ("delta_lora.protocols", "delta_lora.console", "tasks.data"),
    "tasks/tiny": ("tasks", "delta_lora.protocols", "delta_lora.checks"),
    "tasks/tiny/corpora": (),
    "scripts/planning": ("delta_lora.checks",),
    "scripts/runs": ("delta_lora", "tasks", "scripts.planning"),
    "scripts/reporting": ("delta_lora", "scripts.runs"),
    "scripts/htmlreport": ("delta_lora.stored", "scripts.runs", "scripts.reporting"),
    "scripts/auditing": ("delta_lora", "scripts.runs", "scripts.reporting"),
    "scripts/sweeping": ("delta_lora", "scripts.runs", "scripts.reporting"),
    "scripts/dashboards": (
        "delta_lora", "scripts.runs", "scripts.reporting", "scripts.sweeping"
    ),
    "scripts/checking": ("delta_lora", "tasks", "scripts.runs.provenance", "scripts.runs.workers"),
    "examples": ("delta_lora",),
}  # fmt: skip


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_the_table_says(folder: str) -> None:
    allowed = (folder.replace("/", "."), *MAY_IMPORT[folder])
    for path in sources(folder):
        ours = [m for m in imports(path) if within(m, "delta_lora", "tasks", "scripts")]
        assert not [m for m in ours if not within(m, *allowed)], path


@pytest.mark.parametrize(
    "path",
    [*sources("delta_lora"), *sources("tasks"), *sources("scripts")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_heavy_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not [m for m in imports(path, top_level_only=True) if within(m, *LAZY)]


@pytest.mark.parametrize("file", ["trainer.py", "loop.py", "engine.py", "optimization.py"])
def test_the_trainer_names_no_method_and_no_task(file: str) -> None:
    text = (ROOT / "delta_lora" / file).read_text(encoding="utf-8").lower()
    names = [p.stem for p in (ROOT / "configs" / "method").glob("*.yaml")]
    names += ["deltalora", "adalora", "dylora", "e2e", "webnlg", "xsum", "glue"]
    # Ordinary words: the package itself, and what "full" means elsewhere.
    words = set(re.findall(r"\w+", text)) - {"delta_lora", "full", "lora"}
    assert not words & set(names)
