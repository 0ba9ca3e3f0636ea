"""Two worker processes in a Python that lacks what a bare GPU machine lacks: no Ray, no health checks, no psutil."""

import sys
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from support import bare_python
from support.deployment import Deployment, Running
from support.link_client import GREEDY, LinkClient, hand_over
from support.tiny_models import VOCAB, tiny_config, tiny_weights, write_directory

BLOCKS = 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    folder = tmp_path_factory.mktemp("bare")
    model = write_directory(folder / "model", tiny_config(), tiny_weights())
    flags = ["--model", str(model), "--device", "cpu", "--threads", "1", "--num-kv-blocks", str(BLOCKS)]
    flags += ["--max-model-len", "256", "--weights-cache", str(folder / "cache")]
    deployment = Deployment(folder)
    try:
        for role in ("prefill", "decode"):
            command = [sys.executable, bare_python.__file__, f"biphase.{role}_worker", *flags]
            getattr(deployment, role).append(deployment.spawn(f"{role}-0", command))
        (prefill,), (decode,) = deployment.prefill, deployment.decode
        prefill.wait_ready()
        decode.wait_ready()
        yield prefill, decode
    finally:
        deployment.stop()


async def test_a_request_is_handed_over_and_every_block_is_back(pair: tuple[Running, Running]) -> None:
    prompt = [(position * 31) % VOCAB for position in range(70)]
    async with LinkClient(pair[0].address) as prefill, LinkClient(pair[1].address) as decode:
        first, second = await hand_over(prefill, decode, prompt)
        assert second is not None and second.handed_off is not None
        alone = await decode.open_decode(prompt)
        assert await alone.end() == "done"
        assert first.text + second.text == alone.text and len(alone.text) == GREEDY.max_tokens
        for link in (prefill, decode):
            stats = await link.stats()
            assert (stats["blocks_free"], stats["legs"]) == (BLOCKS, 0)
            # from /proc, as psutil is not there
            assert stats["threads"] > stats["python_threads"] > 1
            assert stats["rss_bytes"] > 50 << 20 and 3 < stats["open_fds"] < 1000


async def test_what_is_not_served_is_said_once_and_answered_as_unknown(pair: tuple[Running, Running]) -> None:
    for instance in pair:
        line = "not served, as not installed: health checks (grpcio-health-checking), reflection (grpcio-reflection)"
        assert instance.log_file.read_text().count(line) == 1
        async with grpc.aio.insecure_channel(instance.address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
