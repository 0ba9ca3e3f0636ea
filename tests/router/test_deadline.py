"""Requests that expire count as expired, whoever notices it first: the client's gRPC, the server's, or the router."""

import time

import grpc
import pytest
from support.scripted_controller import ScriptedController
from support.scripted_worker import ScriptedWorker

from biphase.router.config import RouterConfig, Waits
from biphase.router.deadline import MARGIN_S, has_run_out

SHORT_WAITS = Waits(leg_end_s=0.3, drain_s=0.3)


def test_a_client_that_goes_at_its_deadline_has_not_cancelled() -> None:
    assert not has_run_out(1e9, arrived_s=0.0, deadline_s=None)
    assert has_run_out(11.0, arrived_s=1.0, deadline_s=11.0)
    assert has_run_out(11.0 - MARGIN_S, arrived_s=1.0, deadline_s=11.0)
    assert has_run_out(100.2, arrived_s=0.0, deadline_s=101.0), "100.1 s travel as 101 s"
    assert not has_run_out(10.0, arrived_s=1.0, deadline_s=11.0)
    assert not has_run_out(99.0, arrived_s=0.0, deadline_s=101.0)


async def test_all_that_expire_in_the_queue_are_misses(controller: ScriptedController, toy_tokenizer, running_router):
    num = 40
    config = RouterConfig(model="toy", controller=f"127.0.0.1:{controller.port}", waits=SHORT_WAITS)
    async with ScriptedWorker("decode", max_num_seqs=1) as d, running_router(config) as door:
        controller.say(1, 1, d)
        await door.until_states("ready")
        d.load(running=1)
        await door.until_running(1)
        # gRPC says 1.01 s to the router: the client's own clock runs out before it
        answers = [door.ask("prompt", timeout=1.001 + 0.01 * index) for index in range(num)]
        for answer in answers:
            code, detail = await answer.failed()
            assert code == grpc.StatusCode.DEADLINE_EXCEEDED, detail
        left = door.ask("prompt", timeout=60)
        await left.accepted()
        left.call.cancel()
        report = await controller.until_reported(lambda report: sum(report.ended.values()) > num)
        assert dict(report.ended) == {"finished": 0, "cancelled": 1, "refused": 0, "expired": num, "failed": 0}
        assert (report.offered_requests, report.latency.missed) == (num + 1, num)
        assert (await door.counters())["cancelled"] == 1


async def test_a_deadline_while_the_prompt_is_read_is_a_miss(
    controller: ScriptedController, toy_tokenizer, running_router, monkeypatch: pytest.MonkeyPatch
):
    def slow(text: str) -> list[int]:
        time.sleep(0.4)  # in the tokenizer's thread
        return [1] * 10

    monkeypatch.setattr(toy_tokenizer, "encode", slow)
    config = RouterConfig(model="toy", controller=f"127.0.0.1:{controller.port}")
    async with ScriptedWorker("decode") as d, running_router(config) as door:
        controller.say(1, 1, d)
        await door.until_states("ready")
        code, _ = await door.ask("x" * 3000, timeout=0.1).failed()
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        report = await controller.until_reported(lambda report: sum(report.ended.values()))
        assert (report.ended["expired"], report.latency.missed, report.offered_requests) == (1, 1, 1)
