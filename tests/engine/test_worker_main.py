"""Flags of a worker process: what they become, and how a bad one is told."""

import asyncio
import socket

import pytest

from biphase.engine.link_service import LinkService
from biphase.engine.serving import _listening
from biphase.engine.worker_config import WorkerConfig
from biphase.engine.worker_main import num_bytes, parse, run_worker
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.process import Announcer


def test_flags_left_out_take_the_configs_defaults() -> None:
    config, _ = parse("decode", ["--model", "m.gguf", "--kv-memory", "256M", "--threads", "1", "--host", "::1"])
    assert (config.name, config.role, config.max_num_seqs, config.queue_tokens) == ("decode-0", "decode", 64, 1024)
    assert (config.engine.model, config.engine.kv_memory_bytes, config.engine.threads) == ("m.gguf", 256 * 2**20, 1)
    assert config.address(80) == "[::1]:80" and config.incarnation > 10**12


def test_a_rank_finds_its_key_in_the_environment_and_its_leader_by_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPHASE_RANK_KEY", "0f" * 16)
    flags = ["--model", "m", "--tp", "2", "--pp", "3", "--rank", "5", "--leader", "/run/rank0.json"]
    config, _ = parse("prefill", flags)
    assert (config.plan, config.rank, config.rank_key) == (ParallelPlan(tp=2, pp=3), 5, "0f" * 16)
    assert (config.leader, config.step_timeout_s, config.rank_host) == ("/run/rank0.json", 60.0, "127.0.0.1")


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("256M", 2**28), ("1.5GiB", 3 * 2**29), ("2kb", 2048)])
def test_bytes(text: str, value: int) -> None:
    assert num_bytes(text) == value


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "70000"], "port is 70000, it must be from 0 to 65535"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0, it must be from 1 to 65536"),
        (["--lease-s", "nan"], "lease_s is nan, it must be above 0"),
        (["--block-size", "0"], "block_size is 0, must be at least 1"),
        (["--tp", "0"], "tensor_parallel_size is 0, must be at least 1"),
        (["--tp", "2", "--pp", "2", "--rank", "4"], "rank is 4, it must be from 0 to 3"),
        (["--tp", "2", "--rank-key", "abc"], "rank_key has 3 characters, the ranks of tp 2 x pp 1 share 32 hex digits"),
        (["--host", "0.0.0.0"], "host is 0.0.0.0: others cannot connect to that, give an advertise_host"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def never(config: WorkerConfig, announcer: Announcer, stop: asyncio.Event) -> None:
        raise AssertionError("it must not get here")

    assert run_worker("prefill", never, ["--model", "m", *flags]) == 2
    assert capsys.readouterr().err == f"biphase: {told}\n"


async def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config, _ = parse("decode", ["--model", "m", "--port", str(port)])
        with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            async with _listening(config, LinkService()):
                pass
