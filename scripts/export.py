"""Export a finished run, to be served anywhere.

    RUN=outputs/e2e--delta_lora--seed1--8e1bd133d9c5
    python scripts/export.py $RUN                 PEFT LoRA, merged model, card
    python scripts/export.py $RUN --rank 4        LoRA compressed to rank 4 by SVD
    python scripts/export.py $RUN --eval-rank 2   DyLoRA at rank 2

Writes ``OUTPUT/peft`` (a LoRA on the untouched base, read by `peft.PeftModel.from_pretrained`),
``OUTPUT/merged`` (a plain model) and a card in each. OUTPUT is ``export`` in the run's folder by
default. What cannot be written (full fine-tuning is no LoRA) is said, the rest is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from delta_lora import console, stored
from delta_lora.checks import expanded
from delta_lora.console import as_path
from delta_lora.writing import filling, write_text
from scripts.reporting.results import RESULTS
from scripts.reporting.scope import words_of_part
from scripts.runs import weights
from scripts.runs.checksums import ADAPTER, MODEL, RECORD, check_files, check_record

PAPER = "https://arxiv.org/abs/2309.02411"
#: of how many tokens the comparison of outputs is made.
NUM_TOKENS = 16

logger = logging.getLogger(__name__)


def export(
    run: Path,
    output: Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    eval_rank: int | None = None,
    is_merged_wanted: bool = True,
) -> list[str]:
    """Write the exports of a run; return what to tell the user, one line each.

    Args:
        run: its folder, or the folder of an adapter.
        output: gets the folders ``peft`` and ``merged``.
        base: the pre-trained model where it is not where it was; None takes that of the run.
        rank: compress the LoRA to this rank.
        eval_rank: DyLoRA's rank to export at.
        is_merged_wanted: whether the merged model is written.

    Raises:
        ValueError: nothing of it can be exported, a rank is not allowed, or a file of the run, of
            its adapter or of its base is not the one that was written.
        FileNotFoundError: the folder holds no finished run.
    """
    from delta_lora import adapter_file, export
    from delta_lora.checks import check_integer

    for name, value in (("rank", rank), ("eval_rank", eval_rank)):
        if value is not None:
            check_integer(name, value, at_least=1)
    settings = None if eval_rank is None else {"eval_rank": eval_rank}
    source = adapter_file.find_folder(run)
    description = adapter_file.read_description(source)
    record = _record_of(source)
    lines, problems = [], []
    written: list[Path] = []
    try:
        done = export.export_peft(run, output / "peft", base=base, rank=rank, settings=settings)
    except ValueError as error:
        if rank is not None:
            raise
        problems.append(f"no PEFT LoRA: {error}")
    else:
        difference = _difference(run, done.folder, base, settings)
        ranks = sorted(set(done.ranks.values()))
        facts = (
            f"rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'} in "
            f"{len(done.ranks)} layers, {done.num_parameters:,} numbers; the largest error of a "
            f"layer's change is {max(done.errors.values()):.1e} of its norm"
        )
        if difference is not None:
            facts += f"; outputs differ by at most {difference:.1e} of the largest"
        written.append(done.folder)
        lines.append(f"{done.folder}: PEFT LoRA, {_megabytes(done.folder)}; {facts}")
        _write_card(done.folder, description, record, facts)
    if is_merged_wanted:
        try:
            folder = export.export_merged(run, output / "merged", base=base, settings=settings)
        except (TypeError, ValueError) as error:
            problems.append(f"no merged model: {error}")
        else:
            written.append(folder)
            lines.append(f"{folder}: merged model, {_megabytes(folder)}")
            _write_card(folder, description, record, "the change is merged into the weights")
    if not lines:
        raise ValueError("; ".join(problems))
    _copy_tokenizer(description, source, base, written)
    return lines + problems


def _record_of(source: Path) -> dict[str, Any] | None:
    """Return the record of the run whose adapter stands in `source`; None for one without a run.

    Raises:
        UnreadableError: it is damaged, or the adapter is not the one that it names.
    """
    if not (source.parent / RECORD).exists():
        return None
    record = check_files(source.parent, [ADAPTER])
    check_record(source.parent / RECORD, record, "export the folder of the adapter elsewhere")
    return record if record["status"] == "completed" else None


def _difference(
    run: Path, folder: Path, base: str | None, settings: Mapping[str, Any] | None
) -> float | None:
    """Return how far logits of the trained model and of the exported one are apart at most.

    Relative to the largest logit: float32 has seven digits of it, whatever its size. None for a
    model that reads no tokens.
    """
    import peft
    import torch

    import delta_lora
    from delta_lora import adapter_file

    trained = delta_lora.load(run, base=base, settings=settings).model
    config: Any = getattr(trained, "config", None)
    if getattr(config, "vocab_size", None) is None:
        return None
    source = adapter_file.find_folder(run)
    plain = adapter_file.load_base(adapter_file.read_description(source), source, source=base)
    served = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, NUM_TOKENS), generator=generator)
    tokens = {"input_ids": ids}
    if config.is_encoder_decoder:
        tokens["decoder_input_ids"] = ids
    with torch.no_grad():
        own, theirs = trained(**tokens).logits, served(**tokens).logits
        return float((own - theirs).abs().max() / own.abs().max())


def _megabytes(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{size / 1e6:,.2f} MB of weights"


def _copy_tokenizer(
    description: Mapping[str, Any], source: Path, base: str | None, folders: Sequence[Path]
) -> None:
    """Put the tokenizer of the base beside the weights, where the base has one."""
    from delta_lora import adapter_file
    from delta_lora.models import load_tokenizer

    origin, revision = adapter_file.base_source(description, source, base)
    if origin is None:
        return
    if Path(origin).name == MODEL and (Path(origin).parent / RECORD).exists():
        check_files(Path(origin).parent, [MODEL])  # one that the suite pre-trained
    try:
        tokenizer = load_tokenizer(origin, revision)
    except OSError as error:
        logger.warning("no tokenizer beside the export: %s", error)
        return
    for folder in folders:
        with filling(folder) as temporary:
            tokenizer.save_pretrained(str(temporary))


# ---------------------------------------------------------------------- the card


def _write_card(
    folder: Path,
    description: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    facts: str,
) -> None:
    """Write the model card: what it is, how to load it, its scores, and what they are worth."""
    base, method = description["base"], dict(description["method"])
    name = str(method.pop("name"))
    is_peft = (folder / "adapter_config.json").exists()
    model = _model_of(base, record)
    hub_id, _ = weights.hub_weights(model)
    front = ["---", "library_name: peft" if is_peft else "library_name: transformers"]
    if hub_id is not None:
        front.append(f"base_model: {hub_id}")
    tags = dict.fromkeys(("delta-lora", "lora", name.replace("_", "-")))
    front += ["tags:", *[f"- {tag}" for tag in tags], "---"]
    title = f"# {name} on {hub_id or weights.label(model)}"
    lines = [*front, "", title, "", f"{facts[0].upper()}{facts[1:]}.", ""]
    lines += ["## Load it", "", "```python", *_loading(base, model, is_peft), "```", ""]
    if record is not None:
        lines += _scores(record)
    lines += ["## Settings", ""]
    lines += [f"- `{key}`: {json.dumps(value)}" for key, value in method.items()]
    if record is not None:
        training = record["training"]
        lines += [
            f"- {training['steps']} steps of {training['batch_size']} examples "
            f"({training['examples']} in all), seed {record['seed']}, recipe `{record['recipe']}`, "
            f"scale `{record['scale']}`",
            f"- run `{record['signature']}`",
        ]
    lines += ["", f"Method: [Delta-LoRA]({PAPER}) and its relatives, by the Delta-LoRA suite.", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _model_of(base: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return which base model was loaded: by the record, else by what the adapter says of it."""
    if record is not None:
        return weights.facts_of_record(record)
    from delta_lora import adapter_file
    from delta_lora.sources import looks_local

    source, revision = base["source"], base["revision"]
    is_local = source is None or looks_local(source)
    named = None if source is None else adapter_file.base_name(source)
    return {
        "name": base.get("name") or named or "a model of its own",
        "init": "pretrained",
        "hub_id": None if is_local else source,
        "revision": None if is_local else revision,
    }


def _loading(base: Mapping[str, Any], model: Mapping[str, Any], is_peft: bool) -> list[str]:
    from delta_lora.families import FAMILIES

    family = FAMILIES.get(base["family"])
    auto = "AutoModel" if family is None else family.auto_class
    if not is_peft:
        return [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("FOLDER")']
    labels = base["config_overrides"].get("num_labels")
    extra = f", num_labels={labels}" if labels is not None else ""
    hub_id, revision = weights.hub_weights(model)
    pin = f', revision="{revision}"' if revision is not None else ""
    where = [] if hub_id is not None else ["# the folder of the base model, wherever you keep it"]
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        *where,
        f"base = {auto}.from_pretrained({json.dumps(hub_id or model['name'])}{pin}{extra})",
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    ]


def _scores(record: Mapping[str, Any]) -> list[str]:
    task = record["task"]
    lines = [f"## Scores on `{task['name']}`", ""]
    values = [f"| {name} | {value:.4f} |" for name, value in record["metrics"].items()]
    values += [
        f"| {name} | not computed: {why} |" for name, why in record["missing_metrics"].items()
    ]
    if not values:
        return [*lines, "The run trained and was not scored.", ""]
    lines += ["| metric | value |", "|---|---|", *values, ""]
    if part := task.get("part"):
        lines += [f"Of a part of the {part['split']} set: {words_of_part(part)}.", ""]
    lines += [
        "Fractions of 1 where the metric is one; one run, one seed: no interval.",
        "",
        "## What the paper's claims are worth",
        "",
        *_verdicts(record["scale"], weights.facts_of_record(record)["name"]),
        "",
    ]
    return lines


def _verdicts(scale: str, model: str) -> list[str]:
    """Return the suite's verdicts on a model at a scale, from the generated tables."""
    lines = []
    for path in sorted((RESULTS / scale).glob("*.json")):
        content = stored.read_json(path, "make the table anew")
        if model not in content.get("models", ()):
            continue
        for claim in content.get("claims", []):
            lines.append(f"- {claim['id']}: {claim['statement']} **{claim['verdict']}**")
    if not lines:
        return [f"No table of `{model}` at scale `{scale}` judges a claim."]
    return [f"Judged by this suite on `{model}` at scale `{scale}`:", "", *sorted(lines)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="outputs/<signature>, a signature, or an adapter's folder")
    parser.add_argument("--output", type=as_path, help="default: export in the run's folder")
    parser.add_argument("--base", help="folder or hub id of the base model, if it has moved")
    parser.add_argument("--rank", type=int, help="compress the LoRA to this rank")
    parser.add_argument("--eval-rank", type=int, help="DyLoRA: export at this rank")
    parser.add_argument("--no-merged", action="store_true", help="write the LoRA only")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    run = expanded(options.run)
    if not run.exists() and (ROOT / "outputs" / options.run).is_dir():
        run = ROOT / "outputs" / options.run
    try:
        lines = export(
            run,
            options.output or run / "export",
            base=options.base,
            rank=options.rank,
            eval_rank=options.eval_rank,
            is_merged_wanted=not options.no_merged,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        return console.complain(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    console.run(main)
