"""What the callback keeps in a checkpoint of `Trainer`: one JSON file and one of tensors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delta_lora import writing
from delta_lora.checkpoint import sha256_file, write_json, write_tensors
from delta_lora.stored import UnreadableError, checksum, damaged, read_json, read_tensors

#: folder of the callback in a checkpoint, where PEFT writes adapters into folders of their names;
#: no adapter has a dot in its name. `Trainer` takes a folder that itself holds an adapter for one
#: more adapter of the model, so the export of a checkpoint is one level deeper.
FOLDER = "delta_lora.state"
EXPORT = "adapter"
STATE, TENSORS = "state.json", "tensors.safetensors"


def write(
    checkpoint: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    export: Callable[[Path], Any] | None,
) -> None:
    """Write the state into a checkpoint; whatever happens, the folder in it is whole.

    Args:
        checkpoint: the folder that `Trainer` has written.
        content: JSON values; the checksum of the tensors is added.
        tensors: by name.
        export: writes the trained model to a folder; None leaves it out.

    Raises:
        WriteError: a file cannot be written; the message has its path.
    """
    folder = checkpoint / FOLDER
    with writing.whole(folder, "train on from the checkpoint before it") as temporary:
        writing.make_folder(temporary)
        write_tensors(temporary / TENSORS, tensors)
        if export is not None:
            export(temporary / EXPORT)
        digest = sha256_file(temporary / TENSORS)
        write_json(temporary / STATE, {**content, "tensors_sha256": digest})
        shutil.rmtree(folder, ignore_errors=True)


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON state and the tensors in a checkpoint.

    Raises:
        RuntimeError: a file is missing or damaged.
    """
    folder = checkpoint / FOLDER
    advice = "resume from another checkpoint"
    if not (folder / STATE).is_file() or not (folder / TENSORS).is_file():
        raise RuntimeError(
            f"{folder} lacks {STATE} or {TENSORS}, so the state of Delta-LoRA is unknown; {advice}"
        )
    try:
        content = read_json(folder / STATE, advice)
        if checksum(folder / TENSORS, advice) != content.get("tensors_sha256"):
            raise damaged(folder / TENSORS, "its checksum differs", advice)
        return content, read_tensors(folder / TENSORS, advice)
    except UnreadableError as error:
        raise RuntimeError(str(error)) from error


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the sha256 of values; the same for equal values in wider types."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()
