"""A router as a process of its own: flags, one-line errors and exit codes, health, reflection, a graceful stop."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.scripted_worker import ScriptedWorker

from biphase.protos import router_pb2, router_pb2_grpc
from biphase.protos.errors import SetupError
from biphase.protos.process import Announcement
from biphase.router.__main__ import main, parse
from biphase.router.config import RequestLimits, RouterConfig, Waits


def test_flags_make_a_config_and_defaults_live_in_it_alone() -> None:
    config, _ = parse(["--model", "m", "--decode", "a:1", "--decode", "b:2"])
    assert config == RouterConfig(model="m", decode=("a:1", "b:2"))
    assert config.is_colocated
    flags = "--model m --controller c:1 --mode strict --max-queued-requests 5 --drain-s 3 --name r --port 7"
    assert parse(flags.split())[0] == RouterConfig(
        model="m",
        controller="c:1",
        mode="strict",
        name="r",
        port=7,
        limits=RequestLimits(max_queued_requests=5),
        waits=Waits(drain_s=3.0),
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "a router takes either a controller's address or those of static instances"),
        ("--controller c:1 --decode d:1", "a router takes either a controller's address or those of static instances"),
        ("--prefill p:1", "a router with static instances needs at least one decode instance"),
        ("--decode d:1 --port 70000", "port is 70000; it is within 0..65535"),
        ("--decode d:1 --max-queued-requests 0", "max_queued_requests is 0; it is above 0"),
        ("--decode d:1 --silence-s nan", "silence_s is nan; it is above 0"),
        ("--decode d:1 --local-prefill-max-tokens -1", "local_prefill_max_tokens is -1; at least 0"),
    ],
)
def test_a_set_up_that_cannot_work_is_one_line(flags: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", *flags.split()]) == 2
    assert capsys.readouterr().err == f"biphase: {line}\n"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SetupError, match="mode is 'fast'; it is one of auto, strict"):
        RouterConfig(model="m", decode=("d:1",), mode="fast")  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def started(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A router process, killed at the end if it still lives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "biphase.router", *flags, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ends_with(code: int, *flags: str) -> str:
    """Run a router that ends by itself; returns its one line."""
    async with started(*flags) as process:
        _, error = await process.communicate()
    assert process.returncode == code, error.decode()
    assert error.count(b"\n") == 1, error.decode()
    return error.decode()


async def test_a_missing_model_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path, log = tmp_path / "none.gguf", tmp_path / "log"
    line = await ends_with(2, "--model", str(path), "--decode", "127.0.0.1:1", "--log-file", str(log))
    assert str(path) in line
    assert "Traceback" not in log.read_text()


@pytest.mark.model
async def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ["--model", "smollm2", "--decode", "127.0.0.1:1", "--log-file", str(tmp_path / "log")]
        line = await ends_with(2, *flags, "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.model
async def test_from_ready_to_a_graceful_stop(tmp_path: Path) -> None:
    announce, log = tmp_path / "router.json", tmp_path / "router.log"
    async with ScriptedWorker("decode", max_model_len=2048, num_blocks=1000) as d:
        d.welcome.model.vocab_size = 49152
        files = ("--announce", str(announce), "--log-file", str(log))
        async with started("--model", "smollm2", "--decode", d.address, *files) as process:
            await d.wait_linked()
            async with asyncio.timeout(10):
                while (said := Announcement.from_json(announce.read_text())).state != "ready":
                    await asyncio.sleep(0.01)
            assert (said.kind, said.pid, said.log_file) == ("router", process.pid, str(log))
            async with grpc.aio.insecure_channel(said.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for service in ("", "biphase.v1.Router"):
                    answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
                await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                services = {service.name for service in (await reflection.read()).list_services_response.service}
                assert {"biphase.v1.Router", "grpc.health.v1.Health"} <= services
                reflection.cancel()

                chat = router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="my secret is 42")])
                call = router_pb2_grpc.RouterStub(channel).Generate(
                    router_pb2.GenerateRequest(chat=chat, request_id="mine")
                )
                accepted = (await call.read()).accepted
                leg = (await d.next("open_decode")).leg_id
                process.send_signal(signal.SIGTERM)  # a live request may end
                d.tokens(leg, 0, [5345], finish=2)
                d.end(leg)
                replies = []
                while (reply := await call.read()) is not grpc.aio.EOF:
                    replies.append(reply)
                assert replies[-1].finished.usage.output_tokens == 1
            assert await process.wait() == 0
            assert await process.stderr.read() == b""  # type: ignore[union-attr]
    assert Announcement.from_json(announce.read_text()).state == "stopped"
    text = log.read_text()
    assert f"{accepted.request_id} accepted: client id 'mine'" in text
    assert f"{accepted.request_id} finished length; 1 output tokens" in text
    assert "secret" not in text
