"""The cache of converted weights: written once, shared by processes, repaired when broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.tiny_models import tiny_config, tiny_weights, write_directory

from biphase.engine.checkpoint.cache import CachedFile, default_directory
from biphase.engine.checkpoint.opening import FORMAT, open_checkpoint
from biphase.protos.errors import SetupError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "model", tiny_config(), tiny_weights())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def steps_of_opening(model: Path, cache: Path, dtype: str = "float32") -> list[tuple[str, float]]:
    """What was reported; empty when nothing had to be converted."""
    seen: list[tuple[str, float]] = []
    open_checkpoint(str(model), dtype=dtype, cache_dir=cache, progress=lambda *step: seen.append(step))
    return seen


def cached_file(cache: Path) -> Path:
    (path,) = cache.glob("*.safetensors")
    return path


def test_the_second_opening_converts_nothing(model: Path, cache: Path) -> None:
    first = steps_of_opening(model, cache)
    assert first[0] == ("converting weights to float32", 0.0)
    assert first[-1] == ("converting weights to float32", 1.0)
    assert [fraction for _, fraction in first] == sorted(fraction for _, fraction in first)
    assert steps_of_opening(model, cache) == []
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".safetensors"]


def test_each_dtype_has_its_own_file(model: Path, cache: Path) -> None:
    assert steps_of_opening(model, cache, "float32") and steps_of_opening(model, cache, "bfloat16")
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_the_file_is_readable_by_the_safetensors_library(model: Path, cache: Path) -> None:
    checkpoint = open_checkpoint(str(model), dtype="float32", cache_dir=cache, progress=lambda *_: None)
    with safe_open(cached_file(cache), framework="pt") as file:
        assert file.metadata()["format"] == FORMAT
        assert set(file.keys()) == set(checkpoint.tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in checkpoint.tensors.items())


@pytest.mark.parametrize("damage", ["truncated", "overlong", "header", "empty", "garbage", "format"])
def test_a_broken_file_is_made_anew(model: Path, cache: Path, damage: str) -> None:
    steps_of_opening(model, cache)
    path = cached_file(cache)
    good = path.read_bytes()
    bad = {
        "truncated": good[:-1],
        "overlong": good + b"x",
        "header": good[:20] + b"\0" + good[21:],
        "empty": b"",
        "garbage": os.urandom(4096),
        "format": good.replace(f'"format":"{FORMAT}"'.encode(), b'"format":"0"'),
    }[damage]
    assert bad != good
    path.write_bytes(bad)
    assert steps_of_opening(model, cache)
    assert cached_file(cache).read_bytes() == good


def test_a_changed_layout_is_made_anew(model: Path, cache: Path) -> None:
    steps_of_opening(model, cache)
    path = cached_file(cache)
    good = path.read_bytes()
    path.write_bytes(good.replace(b"layers.1.qkv", b"layers.7.qkv"))
    assert steps_of_opening(model, cache)
    assert path.read_bytes() == good


def test_temporaries_of_dead_writers_go(model: Path, cache: Path) -> None:
    steps_of_opening(model, cache)
    path = cached_file(cache)
    stale, foreign = path.with_suffix(".99999.tmp"), cache / "other-float32-1.5.tmp"
    path.unlink()
    stale.write_bytes(b"half")
    foreign.write_bytes(b"of another model")
    steps_of_opening(model, cache)
    assert not stale.exists() and foreign.exists()


def test_a_failed_conversion_leaves_nothing(model: Path, cache: Path) -> None:
    def stop(detail: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(str(model), dtype="float32", cache_dir=cache, progress=stop)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert steps_of_opening(model, cache)


def test_the_old_map_outlives_its_replacement(model: Path, cache: Path) -> None:
    before = open_checkpoint(str(model), dtype="float32", cache_dir=cache, progress=lambda *_: None)
    values = before.tensors["embed"].clone()
    path = cached_file(cache)
    replacement = path.with_suffix(".x")
    replacement.write_bytes(b"broken")
    replacement.replace(path)
    after = open_checkpoint(str(model), dtype="float32", cache_dir=cache, progress=lambda *_: None)
    assert torch.equal(before.tensors["embed"], values) and torch.equal(after.tensors["embed"], values)


OPEN = """
import sys
from pathlib import Path
from biphase.engine.checkpoint.opening import open_checkpoint
steps = []
def progress(detail, fraction):
    if not steps:
        print(detail, flush=True)
    steps.append(fraction)
    if detail.startswith("converting") and len(steps) == 2 and "hold" in sys.argv:
        input()
checkpoint = open_checkpoint(sys.argv[1], dtype="float32", cache_dir=Path(sys.argv[2]), progress=progress)
print("sum", float(sum(t.double().sum() for t in checkpoint.tensors.values())), flush=True)
"""


def test_a_second_process_waits_and_maps_the_same_file(model: Path, cache: Path) -> None:
    def start(*more: str) -> "subprocess.Popen[str]":
        arguments = [sys.executable, "-c", OPEN, str(model), str(cache), *more]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start("hold") as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "converting weights to float32\n"
        with start() as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "waiting for another process that converts the weights\n"
            made, _ = writer.communicate("go on\n")
            mapped, _ = reader.communicate()
    assert made == mapped != ""
    assert (writer.returncode, reader.returncode) == (0, 0)


KILLED = OPEN.replace("input()", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_killed_writer_frees_the_lock(model: Path, cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(cache), "hold"], check=False)
    assert done.returncode == -9
    assert list(cache.glob("*.tmp")) and not list(cache.glob("*.safetensors"))
    assert steps_of_opening(model, cache)[0][0] == "converting weights to float32"
    assert not list(cache.glob("*.tmp"))


def test_no_anonymous_memory(tmp_path: Path, cache: Path) -> None:
    """The pages of the weights are the file's own, clean, so that processes share them."""
    weights = tiny_weights() | {"model.embed_tokens.weight": torch.randn(50_000, 32)}
    model = write_directory(tmp_path / "m", tiny_config(vocab_size=50_000), weights)
    checkpoint = open_checkpoint(str(model), dtype="float32", cache_dir=cache, progress=lambda *_: None)
    assert float(checkpoint.tensors["embed"].sum()) == pytest.approx(float(weights["model.embed_tokens.weight"].sum()))
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs Linux's /proc/self/smaps")
    counts: dict[str, int] = {}
    inside = False
    for line in smaps.read_text().splitlines():
        key, _, rest = line.partition(":")
        if " " in key:
            inside = str(cached_file(cache)) in line
        elif inside and rest.strip().endswith("kB"):
            counts[key] = counts.get(key, 0) + int(rest.split()[0])
    assert counts["Rss"] >= 6000, "6.4 MB of embedding were read"
    assert counts["Anonymous"] == counts["Private_Dirty"] == counts["Shared_Dirty"] == 0


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIPHASE_WEIGHTS_CACHE", str(tmp_path / "named"))
    assert default_directory() == tmp_path / "named"
    monkeypatch.delenv("BIPHASE_WEIGHTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "biphase" / "weights"


def test_a_cache_that_cannot_be_made_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file/cache: cannot be made for the weights cache"):
        open_checkpoint(str(model), dtype="float32", cache_dir=tmp_path / "file" / "cache", progress=lambda *_: None)


def test_a_full_disk_is_refused_with_both_numbers(cache: Path) -> None:
    with pytest.raises(SetupError, match=r"cache: \d{16,} bytes needed for converted weights, \d+ free"):
        with CachedFile(cache, "x").replacing(10**16):
            pass
    assert json.dumps(sorted(path.name for path in cache.iterdir())) == "[]"
