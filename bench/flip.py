"""How long an instance takes to turn into the other role, and what it costs the requests aboard.

    python bench/flip.py [--model smollm2] [--repeat 10] [--tp N] [--grace-s 1] [--json FILE] [--check]

Two instances as plain processes on loopback, one of each role. Per repeat each turns and turns back: idle, and under load,
prompts that wait to be pulled on the one, running requests on the other, all longer than the grace. Measured from outside:

    drain   from the order to the last word on the last leg, which a grace bounds
    turn    from the last word (of an idle instance: the order) to the first link that the new role welcomes
    first   from there to the first token of a request in the new role

Then in a deployment, through a router: streams that are longer than the grace go on elsewhere, with the tokens that they would
have had (``flip_replay.py``).
"""

import argparse
import asyncio
import itertools
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from flip_replay import measure_replay
from report import Report, add_arguments, run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.link_client import ClientLeg, LinkClient

from biphase.protos import common_pb2, worker_pb2
from biphase.protos.grpc_setup import channel_options
from biphase.protos.process import Announcement
from biphase.protos.values import Role, Sampling

TURN_S = 1.0
BEYOND_GRACE_S = 0.5
"""What is left at the end of the grace ends within one step, here of a batch of LEGS on a busy core."""
READY_WITHIN_S = 300.0
LEGS = 4
LONG = Sampling(max_tokens=4000, ignore_eos=True)
ONE = Sampling(max_tokens=1, ignore_eos=True)
OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}
TO_PROTO = {"prefill": common_pb2.ROLE_PREFILL, "decode": common_pb2.ROLE_DECODE}


@dataclass
class Instance:
    """All ranks of one instance; ``role``: what it is now."""

    role: Role
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    address: str = ""

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """Seconds."""

    drain_s: float
    turn_s: float
    first_s: float
    inside_s: float
    """The turn as the instance itself has measured it."""


def start(role: Role, arguments: argparse.Namespace, folder: Path) -> Instance:
    """Spawn every rank."""
    instance, leader = Instance(role), folder / f"{role}.0.json"
    environment = {**os.environ, "BIPHASE_RANK_KEY": secrets.token_hex(16)}
    for rank in range(arguments.tp):
        command = [sys.executable, "-m", f"biphase.{role}_worker", "--model", arguments.model, "--threads", "1"]
        command += ["--announce", str(folder / f"{role}.{rank}.json"), "--log-file", str(folder / f"{role}.{rank}.log")]
        command += ["--num-kv-blocks", "512", "--incarnation", "1", "--drain-s", "0", "--tp", str(arguments.tp)]
        command += ["--rank", str(rank), *(["--leader", str(leader)] if rank else [])]
        instance.processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    return instance


def wait_ready(instance: Instance, file: Path) -> None:
    until_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until_s:
        if file.exists() and (said := Announcement.from_json(file.read_text())).state == "ready":
            instance.address = said.address
            return
        if instance.processes[0].poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"the {instance.role} instance is not ready; logs: {file.parent}")


async def flip(instance: Instance, *, load: int, grace_s: float, prompt: list[int]) -> Flip:
    """One flip under a load of so many legs."""
    role = OTHER[instance.role]
    async with (
        LinkClient(instance.address) as router,
        LinkClient(instance.address, kind="controller", epoch=1) as controller,
    ):
        legs = [await opened(router, instance.role, prompt, LONG) for _ in range(load)]
        for leg in legs:
            await leg.until(lambda leg: leg.tokens)
        incarnation = controller.incarnation + 1
        began_s = drained_s = time.monotonic()
        await controller.send(flip=worker_pb2.Flip(role=TO_PROTO[role], incarnation=incarnation, grace_s=grace_s))
        for leg in legs:
            outcome = await leg.end()
            if outcome != "drained":
                sys.exit(f"a leg that is longer than the grace ended {outcome}: {leg.detail}")
            drained_s = time.monotonic()
        await controller.until_broken()
    await welcomed(instance.address, incarnation)
    serving_s = time.monotonic()
    async with LinkClient(instance.address, incarnation=incarnation) as router:
        instance.role = role
        leg = await opened(router, role, prompt, ONE)
        await leg.until(lambda leg: leg.tokens)
        first_s = time.monotonic()
        await leg.end()
        stats = await router.stats()
    if stats["blocks_used"] or stats["legs"] or stats.get("tickets"):
        sys.exit(f"something is left: {stats}")
    return Flip(
        drain_s=drained_s - began_s,
        turn_s=serving_s - drained_s,
        first_s=first_s - serving_s,
        inside_s=stats["turned_ms"] / 1e3,
    )


async def opened(link: LinkClient, role: Role, prompt: list[int], sampling: Sampling) -> ClientLeg:
    for refusals in itertools.count():
        if role == "prefill":
            leg = await link.open_prefill(prompt, sampling, refusals=refusals)
        else:
            leg = await link.open_decode(prompt, sampling)
        await leg.until(lambda leg: leg.tokens or leg.refused)
        if not leg.refused:
            return leg
    raise AssertionError


async def welcomed(address: str, incarnation: int) -> None:
    """Returns when the new role has welcomed a link; asks again as soon as it is told to wait."""
    hello = worker_pb2.Hello(peer_name="bench", peer_kind="router")
    async with (
        asyncio.timeout(READY_WITHIN_S),
        grpc.aio.insecure_channel(address, options=channel_options()) as channel,
    ):
        link = channel.stream_stream(
            "/biphase.v1.Worker/Link",
            request_serializer=worker_pb2.LinkDown.SerializeToString,
            response_deserializer=worker_pb2.LinkUp.FromString,
        )
        while True:
            call = link()
            try:
                await call.write(worker_pb2.LinkDown(incarnation=incarnation, hello=hello))
                if await call.read() is not grpc.aio.EOF:
                    return
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await asyncio.sleep(0.002)
            finally:
                call.cancel()


async def measure(arguments: argparse.Namespace, report: Report) -> None:
    prompt = [1000 + (position * 104729) % 40000 for position in range(arguments.prompt)]
    with tempfile.TemporaryDirectory(prefix="biphase-flip-") as scratch:
        folder = Path(scratch)
        instances: list[Instance] = []
        try:
            for role in OTHER:
                instances.append(start(role, arguments, folder))
            for instance in instances:
                await asyncio.to_thread(wait_ready, instance, folder / f"{instance.role}.0.json")
            found: dict[tuple[str, Role], list[Flip]] = {}
            for _ in range(arguments.repeat):
                for load, name in ((0, "idle"), (LEGS, "loaded")):
                    for instance in (*instances, *instances):  # each there and back
                        before = instance.role
                        flipped = await flip(instance, load=load, grace_s=arguments.grace_s, prompt=prompt)
                        found.setdefault((name, before), []).append(flipped)
        finally:
            for instance in instances:
                instance.stop()
    for (name, before), flips in found.items():
        turn_s = [flip.turn_s for flip in flips]
        drain_s = [flip.drain_s for flip in flips]
        report.row(
            f"{name}, {before} to {OTHER[before]}",
            len(flips),
            *(round(1e3 * figure(times), 1) for times in (drain_s, turn_s) for figure in (statistics.median, max)),
            round(1e3 * statistics.median(flip.inside_s for flip in flips), 1),
            round(1e3 * statistics.median(flip.first_s for flip in flips), 1),
        )
        label = f"{name}_{before}_to_{OTHER[before]}"
        report.goal(f"turn_max_s_{label}", max(turn_s), TURN_S)
        if name == "loaded":
            report.goal(f"drain_max_s_{label}", max(drain_s), arguments.grace_s + BEYOND_GRACE_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeat", type=int, default=10, help="each instance there and back, so often")
    parser.add_argument("--tp", type=int, default=1, help="ranks of each instance")
    parser.add_argument("--grace-s", type=float, default=1.0, help="of the drain")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    add_arguments(parser)
    arguments = parser.parse_args()
    columns = (
        "flip",
        "times",
        "drain p50 ms",
        "drain max ms",
        "turn p50 ms",
        "turn max ms",
        "inside p50 ms",
        "first p50 ms",
    )
    report = Report("flip", columns)
    asyncio.run(measure(arguments, report))
    asyncio.run(measure_replay(arguments, report))
    return report.finish(arguments)


if __name__ == "__main__":
    run(main)
