"""The folder of a saved adapter: its two files, and what they say of the base model.

``adapter_model.safetensors`` holds every parameter that training changed, ``adapter_config.json``
the method (its name and every setting), the base model and facts. A run of the suite writes the
same into ``outputs/<signature>/adapter``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora import checkpoint, stored, writing
from delta_lora.checks import check_path, expanded
from delta_lora.families import family_of
from delta_lora.models import DTYPES, fingerprint, load_model
from delta_lora.sources import located, looks_local

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: of the run whose folder holds the adapter's, where it is one of the suite.
RECORD = "record.json"
#: of `CONFIG`; raised when an older library could not read it as it is meant.
FORMAT = 1
#: what to do where a file is not the one that was written.
ADVICE = "copy the folder again, or save the adapter again"
#: keys of a description, and of its base, with the types of their values.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "method": dict, "seed": int, "base": dict, "facts": dict, "tensors_sha256": str,
}  # fmt: skip
_BASE_KEYS: dict[str, type | tuple[type, ...]] = {
    "family": (str, type(None)), "source": (str, type(None)), "revision": (str, type(None)),
    "architecture": (dict, type(None)), "dtype": str, "attention": str, "config_overrides": dict,
    "projections": (list, type(None)), "head": list, "sha256": (str, type(None)),
}  # fmt: skip


def write(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Write an adapter: tensors first, so that a folder with a description is whole.

    Args:
        folder: made where it does not exist.
        tensors: every parameter that training changed, by name.
        description: ``method`` (its ``name`` and its settings), ``seed`` (some methods draw what
            never trains), ``base`` (from `describe_base`) and ``facts``; JSON values.

    Returns:
        The sha256 of the file of tensors.

    Raises:
        WriteError: a file cannot be written; the message has its path.
    """
    base = dict(description["base"])
    if base["source"] is not None and (Path(base["source"]) / "config.json").is_file():
        # Relative, so that a folder of runs can be moved as a whole.
        base["source"] = os.path.relpath(base["source"], folder)
        if not base["source"].startswith("."):
            base["source"] = f"./{base['source']}"
    content = as_json({"format": FORMAT, **description, "base": base})
    # Until the new adapter is whole, the old one stays.
    with writing.filling(folder) as temporary:
        checkpoint.write_tensors(temporary / TENSORS, tensors)
        digest = checkpoint.sha256_file(temporary / TENSORS)
        sealed = stored.sealed({**content, "tensors_sha256": digest})
        checkpoint.write_json(temporary / CONFIG, sealed)
        (folder / CONFIG).unlink(missing_ok=True)
        (temporary / TENSORS).replace(folder / TENSORS)
    return digest


def as_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as it is read back.

    Raises:
        TypeError: a value is none of JSON.
    """
    for part, values in description.items():
        for key, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            try:
                json.dumps(value)
            except TypeError as error:
                name = f"{part}.{key}" if key else part
                raise TypeError(
                    f"{name}={value!r} ({type(value).__name__}) cannot be saved as JSON; give "
                    "plain numbers, texts, lists and dictionaries"
                ) from error
    return dict(description)


def describe_base(
    model: nn.Module,
    *,
    projections: Sequence[str] | None,
    head: Sequence[str],
    **known: Any,
) -> dict[str, Any]:
    """Return what `load_base` needs to build the untouched base model again.

    Args:
        model: the base model before any method.
        projections: as for `adapter.attach`.
        head: as for `adapter.attach`.
        **known: what is known better than the model tells: ``name``, ``family``, ``source``,
            ``revision``, ``architecture``, ``dtype``, ``attention``, ``config_overrides``.
    """
    config = getattr(model, "config", None)
    family = family_of(model)
    overrides = {}
    if family == "sequence_classification" and config is not None:
        overrides = {"num_labels": config.num_labels, "problem_type": config.problem_type}
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtypes = {value: key for key, value in DTYPES.items()}
    source = known.get("source", _source_of(config))
    return {
        "name": None if source is None else base_name(source),
        "family": family,
        "source": source,
        "revision": None,
        "architecture": None,
        "dtype": dtypes.get(first.dtype, "float32") if first is not None else "float32",
        "attention": getattr(config, "_attn_implementation", None) or "sdpa",
        "config_overrides": overrides,
        **known,
        "projections": None if projections is None else list(projections),
        "head": list(head),
        "sha256": None if _is_on_meta(model) else fingerprint(model, exclude=head),
    }


def base_name(source: str) -> str:
    """Return how people are told of a base model: its hub id, or the name of its folder alone."""
    return expanded(source).absolute().name if looks_local(source) else source


def _source_of(config: Any) -> str | None:
    """Return the folder or hub id that a model was loaded from; a folder as an absolute path.

    The working folder may be another one when the adapter is saved.
    """
    source = getattr(config, "name_or_path", None) or None
    return os.path.abspath(source) if source is not None and Path(source).is_dir() else source


def _is_on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def find_folder(path: str | Path) -> Path:
    """Return the folder of an adapter: `path` itself, or ``adapter`` in it.

    Raises:
        TypeError: it is no path.
        FileNotFoundError: neither holds one.
    """
    if hasattr(path, "param_groups") and hasattr(path, "save"):
        raise TypeError(
            f"the folder of an adapter is needed, not the {type(path).__name__} itself; write it "
            "with .save(FOLDER) and give that folder"
        )
    path = check_path("path", path)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() and (folder / TENSORS).is_file():
            return folder
    raise FileNotFoundError(
        f"{path} holds no adapter ({CONFIG} and {TENSORS}); give the folder of a finished run "
        "(outputs/<signature>) or one that Adapter.save wrote"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of the adapter in `folder`.

    Raises:
        ValueError: it is damaged, of another run than the record beside it, or one of PEFT's.
    """
    path = folder / CONFIG
    description = stored.read_json(path, ADVICE)
    if "peft_type" in description:
        raise ValueError(
            f"{folder} holds an adapter of PEFT; load it with peft.PeftModel.from_pretrained"
        )
    found = description.get("format")
    if found != FORMAT:
        age = "a newer" if isinstance(found, int) and found > FORMAT else "an older"
        raise ValueError(
            f"{path} has format {found!r} and this version reads format {FORMAT}: it was written "
            f"by {age} version; train again, or use that version"
        )
    stored.check_seal(path, description, ADVICE)
    _check_types(path, description, _KEYS)
    _check_types(path, description["base"], _BASE_KEYS)
    _check_record(folder.parent / RECORD, path, description)
    return description


def _check_types(
    path: Path, values: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Refuse a description without a key, or with a value of another type."""
    if lacking := [key for key in known if key not in values]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}; {ADVICE}")
    for key, kinds in known.items():
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise stored.damaged(path, f"{key} is {values[key]!r}", ADVICE)


def _check_record(path: Path, own: Path, description: Mapping[str, Any]) -> None:
    """Refuse the adapter of another run than the one whose record stands beside its folder."""
    if not path.is_file():
        return
    expected = stored.read_json(path, "load the adapter from a folder of its own").get(
        "adapter_sha256", description["tensors_sha256"]
    )
    if description["tensors_sha256"] != expected:
        raise stored.damaged(own, f"{path} has another adapter_sha256", ADVICE)


def read_tensors(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every parameter that training changed, by name.

    Raises:
        ValueError: the file is not the one that was written, or holds what is no number.
    """
    path = folder / TENSORS
    if stored.checksum(path, ADVICE) != description["tensors_sha256"]:
        raise stored.UnreadableError(
            f"{path} is damaged or of another adapter: its checksum is not the one in {CONFIG}; "
            f"{ADVICE}"
        )
    tensors = stored.read_tensors(path, ADVICE)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise stored.UnreadableError(
                f"{path} holds infinite or undefined values, in {name} for one: what was trained "
                "is of no use; train again with a smaller learning rate"
            )
    return tensors


def check_tensors(
    folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare the tensors of an adapter with what its method changes of the model.

    Args:
        folder: of the adapter.
        tensors: from `read_tensors`.
        expected: what `Method.updated_tensors` names of the injected model.

    Raises:
        UnreadableError: one is missing, not known, or of another shape.
    """
    path = folder / TENSORS
    missing, unknown = (sorted(a.keys() - b.keys()) for a, b in ((expected, tensors),
                                                                 (tensors, expected)))  # fmt: skip
    for names, what in ((missing, "it lacks"), (unknown, "the method does not know")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise stored.damaged(path, f"{what} {names[0]}{more}", ADVICE)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise stored.damaged(path, f"{name} has the shape {shapes}", ADVICE)


def base_source(
    description: Mapping[str, Any], folder: Path, given: str | Path | None = None
) -> tuple[str | None, str | None]:
    """Return where the base model is (folder, hub id or None), and its commit on the hub.

    Args:
        description: from `read_description`; it names a local base relative to `folder`.
        folder: where it stands.
        given: what a caller names instead: as it is, without the commit of another repository.
    """
    base = description["base"]
    if given is not None:
        same = str(given) == base["source"]
        return str(located(given)), base["revision"] if same else None
    source = base["source"]
    if source is not None and source.startswith("."):
        # As it was written, by names; through links a folder's ".." is another one.
        by_name = os.path.normpath(os.path.join(os.path.abspath(folder), source))
        source = by_name if Path(by_name).is_dir() else str(folder / source)
    return source, base["revision"]


def load_base(
    description: Mapping[str, Any], folder: Path, *, source: str | Path | None = None
) -> nn.Module:
    """Return the untouched base model of an adapter.

    Args:
        description: from `read_description`.
        folder: where it stands; a local base is named relative to it.
        source: folder or hub id to take instead.

    Raises:
        FileNotFoundError: the base's folder does not exist.
        ValueError: the description does not say how to build it.
    """
    base = description["base"]
    source, revision = base_source(description, folder, source)
    if base["family"] is None or (source is None and base["architecture"] is None):
        raise ValueError(
            f"{folder} does not say how its base model is built; "
            "build it yourself and give it with base=model"
        )
    return load_model(
        base["family"],
        source=source,
        revision=revision,
        architecture=base["architecture"],
        dtype=base["dtype"],
        config_overrides=base["config_overrides"],
        attention=base["attention"],
        new_modules=base["head"],
    )
