"""The asking half of scripts/try_ray_up.sh, from outside the cluster, over the gRPC client alone.

    python scripts/try_ray_up_ask.py wait HOST:PORT SECONDS       until a prefill and a decode instance are ready
    python scripts/try_ray_up_ask.py record HOST:PORT FILE        write every answer's tokens to FILE
    python scripts/try_ray_up_ask.py check HOST:PORT FILE         ask again, one by one: the same tokens, by both roles
    python scripts/try_ray_up_ask.py load HOST:PORT FILE STARTED  all at once; STARTED is made when all of them stream

Exit code 1, with a line that says which answer and where, when one differs or a request fails.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from biphase.client import AsyncClient, BiphaseError, Client, Result

PROMPTS = (
    "The tide went out past the old pier, and",
    "A list of the planets, from the sun outwards: Mercury,",
    "In the year 1850 the railway reached the town. Before that,",
    "def fibonacci(n):\n    ",
)
MAX_TOKENS = 96
STREAMING_TOKENS = 8
TIMEOUT_S = 240.0
OPTIONS = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0.0}


def fail(line: str) -> int:
    print(f"try_ray_up: {line}", file=sys.stderr)
    return 1


def difference(prompt: int, expected: list[int], got: Result) -> str:
    """Where an answer leaves the recorded one; empty: nowhere."""
    if list(got.token_ids) == expected:
        return ""
    pairs = zip(expected, got.token_ids, strict=False)
    at = next(
        (index for index, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(got.token_ids))
    )
    return f"answer {prompt} differs from the local run at token {at} of {len(expected)} ({len(got.token_ids)} came)"


def wait(address: str, within_s: float) -> int:
    """What is missing is not there yet, the router included."""
    deadline_s, missing = time.monotonic() + within_s, "the router"
    with Client(address) as client:
        while time.monotonic() < deadline_s:
            try:
                there = {one.role for one in client.server_info(timeout_s=2.0).instances if one.state == "ready"}
                missing = ", ".join({"prefill", "decode"} - there)
                if not missing:
                    return 0
            except BiphaseError:
                missing = "the router"
            time.sleep(0.2)
    return fail(f"not ready within {within_s:g} s: {missing}")


def ask(client: Client, prompt: str) -> Result:
    with client.generate(prompt, timeout_s=TIMEOUT_S, **OPTIONS) as answer:  # type: ignore[arg-type]
        for _ in answer:
            pass
    return answer.result


def record(address: str, file: Path) -> int:
    with Client(address) as client:
        file.write_text(json.dumps([list(ask(client, prompt).token_ids) for prompt in PROMPTS]))
    return 0


def check(address: str, file: Path) -> int:
    expected = json.loads(file.read_text())
    with Client(address) as client:
        for number, prompt in enumerate(PROMPTS):
            answer = ask(client, prompt)
            problem = difference(number, expected[number], answer)
            if not problem and (answer.decision != "disaggregated" or len(answer.instances) != 2):
                problem = f"answer {number} was not handed from P to D: {answer.decision} {answer.decision_reason}"
            if problem:
                return fail(problem)
            print(
                f"answer {number}: {len(answer.token_ids)} tokens as in the local run, by {', '.join(answer.instances)}"
            )
    return 0


async def _load(address: str, expected: list[list[int]], all_stream: Callable[[], None]) -> int:
    streaming: set[int] = set()

    async def stream(client: AsyncClient, number: int) -> tuple[str, str]:
        """(what is wrong, what to tell)."""
        gap_s, at_s = 0.0, time.monotonic()
        try:
            async with client.generate(PROMPTS[number], timeout_s=TIMEOUT_S, **OPTIONS) as answer:  # type: ignore[arg-type]
                async for delta in answer:
                    now_s = time.monotonic()
                    gap_s, at_s = max(gap_s, now_s - at_s), now_s
                    if delta.first_index >= STREAMING_TOKENS:
                        streaming.add(number)
                        if len(streaming) == len(PROMPTS):
                            all_stream()
            result = answer.result
        except BiphaseError as error:
            return f"answer {number} failed: {error}", ""
        told = f"answer {number}: {len(result.token_ids)} tokens, replayed {result.replays} times, longest gap {gap_s:.1f} s"
        return difference(number, expected[number], result), told

    async with AsyncClient(address) as client:
        ends = await asyncio.gather(*(stream(client, number) for number in range(len(PROMPTS))))
    for problem, told in ends:
        if told:
            print(told)
        if problem:
            fail(problem)
    if not any("replayed 0" not in told for _, told in ends):
        return fail("nothing was replayed: the host was lost too late to matter")
    return 1 if any(problem for problem, _ in ends) else 0


def main(words: list[str]) -> int:
    match words:
        case ["wait", address, seconds]:
            return wait(address, float(seconds))
        case ["record", address, file]:
            return record(address, Path(file))
        case ["check", address, file]:
            return check(address, Path(file))
        case ["load", address, file, started]:
            return asyncio.run(_load(address, json.loads(Path(file).read_text()), Path(started).touch))
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BiphaseError as error:
        sys.exit(fail(str(error)))
