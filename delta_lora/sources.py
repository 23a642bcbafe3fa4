"""Whether the files that a model is loaded from are there, before anything expensive.

A model comes from a folder or from the Hugging Face hub, as ``config.json`` and safetensors: one
file, or several with an index. Nothing here loads weights, and torch is not imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from delta_lora import stored
from delta_lora.checks import expanded, shown

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: any one of them makes a tokenizer.
TOKENIZERS = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "encoder.json",
)  # fmt: skip
#: what else is JSON in a model's folder, and is read where it is there.
_JSON = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "encoder.json",
)  # fmt: skip
#: weights that are never loaded: reading one runs what it holds, or no safetensors reader knows it.
OTHER_WEIGHTS = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
)  # fmt: skip
_COPY = "copy it again (a clone without git-lfs has only placeholders: git lfs pull)"
_CONVERT = (
    "convert the weights in an environment of their own (from_pretrained, then save_pretrained of "
    "transformers write safetensors) and name that folder (model.path=FOLDER), or take a revision "
    "that has them (model.revision=COMMIT)"
)


class HubError(OSError):
    """The hub answered, but not with what was asked for."""


class HubUnreachableError(ConnectionError):
    """The hub did not answer, or must not be asked (HF_HUB_OFFLINE)."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub lists it.

    Attributes:
        size: in bytes; None where the hub does not say.
        sha256: hexadecimal; None of a small file, which the hub keeps in git.
    """

    size: int | None
    sha256: str | None


def list_files(
    repository: str,
    revision: str | None = None,
    *,
    kind: Literal["model", "dataset"] = "model",
    timeout_s: float = 20.0,
) -> dict[str, RemoteFile]:
    """Return the files of a repository of the hub, by name, with one request.

    The environment variables of `huggingface_hub` count: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        repository: for example ``facebook/bart-large``.
        revision: commit, branch or tag; None takes the main branch.
        kind: what the repository holds.
        timeout_s: seconds to wait for the answer.

    Raises:
        HubError: there is no such repository or revision, it may not be read, or the answer is no
            listing.
        HubUnreachableError: no answer.
    """
    from huggingface_hub import HfApi, errors

    what = f"{repository} at revision {revision or 'main'}"
    hub = HfApi()
    ask: Callable[..., Any] = hub.model_info if kind == "model" else hub.dataset_info
    try:
        info = ask(repository, revision=revision, timeout=timeout_s, files_metadata=True)
        return {
            file.rfilename: RemoteFile(file.size, None if file.lfs is None else file.lfs.sha256)
            for file in info.siblings or ()
        }
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} is gated: accept its terms on {hub.endpoint}/{repository} and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{hub.endpoint} has {repository}, but not its revision {revision}; take one that its "
            "page of commits shows"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{hub.endpoint} has no {kind} {repository}, or may not show it without a token "
            "(HF_TOKEN); correct the name, or set the token"
        ) from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{hub.endpoint} refuses to list {what}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(
            f"{hub.endpoint} gave something else than a listing of {what} ({error}); is it a "
            "proxy's page? HF_ENDPOINT names the hub or a mirror of it"
        ) from error
    except Exception as error:  # what the hub's network library raises depends on its version
        raise HubUnreachableError(
            f"{hub.endpoint} does not answer: {type(error).__name__}: {error}"
        ) from error


def looks_local(source: str | Path) -> bool:
    """Return whether `source` means a folder and not a repository of the hub.

    Raises:
        TypeError: it is neither a text nor a path.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"{shown(source)} is a {type(source).__name__}, neither a folder nor a hub id of a "
            "model; write OWNER/NAME or the path of a folder"
        )
    path = Path(source)
    return path.is_absolute() or str(source).startswith((".", "~", "$")) or path.exists()


def located(source: str | Path) -> str | Path:
    """Return a folder with ``~`` and ``$NAME`` as what they stand for, and a hub id as it is."""
    return expanded(source) if looks_local(source) else source


def check_source(
    source: str | Path,
    revision: str | None = None,
    *,
    model: bool = True,
    tokenizer: bool = True,
    timeout_s: float = 20.0,
) -> None:
    """Check that a model's configuration, safetensors and tokenizer are there, without loading any.

    A folder is looked at. Of a repository of the hub the local cache is looked at, and nothing is
    asked where it holds everything; else the hub is asked for its list of files.

    Args:
        source: local folder or hub id.
        revision: commit of the hub repository.
        model: whether ``config.json`` and the weights are needed.
        tokenizer: whether a tokenizer is needed.
        timeout_s: seconds to wait for the hub's answer.

    Raises:
        FileNotFoundError: a needed file is missing, or the folder is.
        ValueError: a file is damaged (or a placeholder of git-lfs), or an index names a file
            outside the folder.
        HubError: see `list_files`.
        HubUnreachableError: the cache lacks a needed file, and the hub does not answer.
    """
    if looks_local(source):
        place = _folder(expanded(source))
        _refuse(place, _lacking(place, model=model, tokenizer=tokenizer))
        _check_readable(place, model=model)
        return
    cached = _cache(str(source), revision)
    lacking = _lacking(cached, model=model, tokenizer=tokenizer)
    if not lacking:
        _check_readable(cached, model=model)
        return
    try:
        listed = _hub(str(source), revision, timeout_s)
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"the local cache lacks {', '.join(lacking)} of {cached.name}, and {error}; connect "
            "once to download, or name a local copy (model.path=FOLDER)"
        ) from error
    _refuse(listed, _lacking(listed, model=model, tokenizer=tokenizer))


@dataclass(frozen=True)
class _Place:
    """Where files are looked for.

    Attributes:
        name: what messages call it.
        has: tells whether a file is there.
        path: returns where a file that is there can be read.
        names: all names that are known, for messages.
    """

    name: str
    has: Callable[[str], bool]
    path: Callable[[str], Path]
    names: Sequence[str] = ()


def _folder(folder: Path) -> _Place:
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    names = sorted(file.name for file in folder.iterdir())
    for name in {*_JSON, *TOKENIZERS, WEIGHTS, INDEX}.intersection(names):
        _check_file(folder / name)
    return _Place(str(folder), lambda name: (folder / name).is_file(), folder.joinpath, names)


def _check_file(path: Path) -> None:
    """Refuse what stands in the place of a file and is none; it would count as missing."""
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which leads to no file; copy the file there"
        )
    raise FileNotFoundError(f"{path} is no file; put the file of this name in its place")


def _cache(repository: str, revision: str | None) -> _Place:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def found(name: str) -> str | None:
        try:
            path = try_to_load_from_cache(repository, name, revision=revision)
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{repository} is neither a folder nor a name that the hub could have: {error}"
            ) from error
        return path if isinstance(path, str) else None

    return _Place(
        f"{repository} at revision {revision or 'main'}",
        lambda name: found(name) is not None,
        lambda name: Path(found(name) or ""),
    )


def _hub(repository: str, revision: str | None, timeout_s: float) -> _Place:
    from huggingface_hub import hf_hub_download

    files = list_files(repository, revision, timeout_s=timeout_s)
    return _Place(
        f"{repository} at revision {revision or 'main'}",
        files.__contains__,
        lambda name: Path(hf_hub_download(repository, name, revision=revision)),
        sorted(files),
    )


def _lacking(place: _Place, *, model: bool, tokenizer: bool) -> list[str]:
    """Return the names of needed files that are not there."""
    lacking = []
    if model:
        lacking += [name for name in (CONFIG, *_weights(place)) if not place.has(name)]
    if tokenizer and not any(place.has(name) for name in TOKENIZERS):
        lacking.append(TOKENIZERS[0])
    return lacking


def _weights(place: _Place) -> list[str]:
    """Return the names of the files that the weights are in, or should be in."""
    if not place.has(WEIGHTS) and place.has(INDEX):
        return shards(place.path(INDEX))
    return [WEIGHTS]


def shards(index: Path) -> list[str]:
    """Return the names of the files of weights that an index names.

    Raises:
        ValueError: it is no index, or it names a file that is not beside it.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors ({type(error).__name__}: {error}); it needs an "
            'object "weight_map" from parameters to files; copy it again'
        ) from error
    for name in names:
        is_plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not is_plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}: only safetensors of its own folder are read; "
                "save the model again with save_pretrained"
            )
    if not names:
        raise ValueError(f"{index} names no file of weights; copy it again")
    return names


def _refuse(place: _Place, lacking: Sequence[str]) -> None:
    """Raise where files are missing, with what is there instead and what to do."""
    if not lacking:
        return
    for link in (place.path(name) for name in lacking if name in place.names):
        if link.is_symlink():
            raise FileNotFoundError(
                f"{link} is a link to {link.readlink()}, which is not there; copy the folder again "
                "with what its links name (cp -rL)"
            )
    message = f"{place.name} has no {', '.join(lacking)}"
    if WEIGHTS in lacking:
        others = [name for name in OTHER_WEIGHTS if place.has(name)]
        if others:
            message += f" (its {', '.join(others)} is never loaded: only safetensors are safe)"
        message += f"; {_CONVERT}"
    elif TOKENIZERS[0] in lacking and len(lacking) == 1:
        message += f" nor another tokenizer ({', '.join(TOKENIZERS[1:])})"
        message += "; take model.tokenizer_path=FOLDER of one that goes with the weights"
    else:
        message += "; the copy is not complete, or this is no model of transformers"
    shown = ", ".join(place.names[:10]) or "nothing"
    raise FileNotFoundError(f"{message}. It holds {shown}")


def _check_readable(place: _Place, *, model: bool) -> None:
    """Raise where a file is not whole: the header of one of weights tells how long it must be."""
    from safetensors import SafetensorError, safe_open

    for name in _JSON:
        if place.has(name) and (model or name not in (CONFIG, "generation_config.json")):
            stored.read_json(place.path(name), _COPY)
    for name in _weights(place) if model else ():
        path = place.path(name)
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}; "
                f"{_COPY}"
            ) from error
