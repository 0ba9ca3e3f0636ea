"""Whether a machine has a model's weights, told from names, first bytes and the hub's word; nothing is fetched."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from biphase.protos.errors import SetupError
from biphase.protos.model_source import check_weights, resolve

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration and a tokenizer, and nothing else yet."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def lack(model: Path | str) -> str:
    with pytest.raises(SetupError) as caught:
        check_weights(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_index(folder: Path) -> None:
    weights = {f"tensor {number}": shard for number, shard in enumerate((*SHARDS, *SHARDS))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def test_a_configuration_alone_is_no_model(folder: Path) -> None:
    assert resolve(str(folder), weights=False).path == folder
    assert lack(folder) == f"{folder}: no weights there (*.safetensors)"
    (folder / "model.safetensors").write_bytes(b"x")
    check_weights(str(folder))


def test_every_shard_of_the_index_is_wanted(folder: Path) -> None:
    write_index(folder)
    (folder / SHARDS[0]).write_bytes(b"x")
    assert lack(folder) == f"{folder}: {SHARDS[1]} and 1 more of 3 weight files missing"
    for shard in SHARDS:
        (folder / shard).write_bytes(b"x")
    check_weights(str(folder))


def test_what_git_lfs_left_in_the_place_of_weights_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert lack(folder) == f"{path}: a pointer of git-lfs, not the weights themselves"


def test_a_file_is_its_weights(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    check_weights(str(tmp_path / "m.gguf"))
    assert "no such file or directory" in lack("/nowhere/model.gguf")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """``cached``: what the cache has of a name; ``error``: what a question to the hub raises; ``asked``: the questions."""
    seen: dict[str, Any] = {"cached": folder, "error": None, "asked": []}

    def snapshot(name: str, **options: Any) -> str:
        assert options["local_files_only"], "nothing is fetched"
        if seen["cached"] is None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(seen["cached"])

    def ask(url: str, **options: Any) -> None:
        seen["asked"].append(url)
        if seen["error"] is not None:
            raise seen["error"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return seen


def test_a_name_whose_weights_are_cached_asks_nobody(hub: dict[str, Any], folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")
    check_weights("org/name")
    assert hub["asked"] == []


def test_a_name_with_the_tokenizer_alone_needs_a_hub_that_gives_it(hub: dict[str, Any]) -> None:
    check_weights("org/name")
    hub["cached"] = None
    check_weights("org/name")
    assert [url.endswith("/org/name/resolve/main/config.json") for url in hub["asked"]] == [True, True]
    hub["error"] = ConnectionError("no\nroute")
    assert lack("org/name").startswith("org/name: not all of it is in the cache here, and http")
    assert lack("org/name").endswith("does not give it: no route")


def test_a_machine_that_is_offline_needs_all_of_it(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert lack("org/name") == "org/name: not all of it is in the cache here, and HF_HUB_OFFLINE is set"
    assert hub["asked"] == []
