"""Sends the load and measures it: one asyncio task per request, started when it is due whatever the others do."""

import asyncio
import contextlib
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from biphase.client.async_client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.measured import DONE, NOT_SENT, Measured
from biphase.client.bench.prompts import Prompt, Prompts
from biphase.protos.errors import BiphaseError, one_line


@dataclass(slots=True, kw_only=True)
class Live:
    """A request in flight: what has come of it so far. Owned by its task."""

    arrival: Arrival
    prompt: Prompt
    address: str
    sent_s: float
    token_at_s: "array[float]"
    tokens: list[int]


class Runner:
    """Open-loop load over one client per address, in turn. ``measured`` and ``live`` may be read while it runs.

    At most ``max_in_flight`` requests are open: what is due beyond that is not sent and counts as an error, so that the
    load neither waits for replies nor brings its own machine down.
    """

    def __init__(
        self,
        clients: Sequence[AsyncClient],
        prompts: Prompts,
        *,
        timeout_s: float | None = None,
        max_in_flight: int = 4096,
        ignore_eos: bool = True,
    ) -> None:
        self.measured: list[Measured] = []
        self.answers: dict[int, Live] = {}
        """Done requests' prompts and tokens by index; kept when ``keep_answers`` is set."""
        self.keep_answers = False
        self.live: dict[int, Live] = {}
        self.began_at_s = time.perf_counter()
        self._clients, self._prompts = clients, prompts
        self._timeout_s, self._max_in_flight, self._ignore_eos = timeout_s, max_in_flight, ignore_eos
        self._stopped = asyncio.Event()

    def now_s(self) -> float:
        """Since the load began."""
        return time.perf_counter() - self.began_at_s

    def stop(self) -> None:
        """Send no more; what runs is read to its end."""
        self._stopped.set()

    async def run(self, arrivals: Iterable[Arrival]) -> list[Measured]:
        """Every request of ``arrivals``, measured, in the order of their ends. Cancelled, it cancels what runs, which is
        measured as far as it came."""
        self.began_at_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for arrival in arrivals:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), max(arrival.at_s - self.now_s(), 0.0))
                    break
                if len(self.live) >= self._max_in_flight:
                    self._not_sent(arrival)
                    continue
                client = self._clients[arrival.index % len(self._clients)]
                prompt = self._prompts.of(arrival)
                live = Live(
                    arrival=arrival,
                    prompt=prompt,
                    address=client.address,
                    sent_s=self.now_s(),
                    token_at_s=array("d"),
                    tokens=[],
                )
                self.live[arrival.index] = live
                tasks.create_task(self._one(client, live))
        return self.measured

    async def _one(self, client: AsyncClient, live: Live) -> None:
        prompt = live.prompt
        generation = client.generate(
            token_ids=prompt.token_ids,
            max_tokens=prompt.max_tokens,
            temperature=prompt.temperature,
            seed=prompt.seed,
            ignore_eos=self._ignore_eos,
            timeout_s=self._timeout_s,
        )
        kind, detail, cut = DONE, "", False
        try:
            async for delta in generation:
                at_s = self.now_s()
                for token in delta.token_ids:
                    live.tokens.append(token)
                    live.token_at_s.append(at_s)
        except BiphaseError as error:
            kind, detail = error.code.name, one_line(error)
        except asyncio.CancelledError:
            kind, detail, cut = "CANCELLED", "cut short by whoever measures", True
        finally:
            self.live.pop(live.arrival.index, None)
        result = generation.result if kind == DONE else None
        answer = None if prompt.answer is None else list(prompt.answer[: prompt.max_tokens])
        self.measured.append(
            Measured(
                index=live.arrival.index,
                phase=live.arrival.phase,
                due_s=live.arrival.at_s,
                sent_s=live.sent_s,
                ended_s=self.now_s(),
                token_at_s=live.token_at_s,
                input_tokens=len(prompt.token_ids),
                asked_tokens=prompt.max_tokens,
                kind=kind,
                detail=detail,
                checked=answer is not None,
                # what a failed stream has brought must be a beginning of the answer
                wrong=answer is not None and live.tokens != (answer if result else answer[: len(live.tokens)]),
                replays=getattr(result, "replays", 0),
                decision=result.decision if result else "",
                prefill_instance=result.prefill_instance if result else "",
                decode_instance=result.decode_instance if result else "",
                address=live.address,
                prefill_ms=result.timeline.prefill_ms if result else 0.0,
            )
        )
        if self.keep_answers and result:
            self.answers[live.arrival.index] = live
        if cut:
            raise asyncio.CancelledError

    def _not_sent(self, arrival: Arrival) -> None:
        now_s = self.now_s()
        self.measured.append(
            Measured(
                index=arrival.index,
                phase=arrival.phase,
                due_s=arrival.at_s,
                sent_s=now_s,
                ended_s=now_s,
                token_at_s=(),
                input_tokens=0,
                asked_tokens=arrival.output_tokens,
                kind=NOT_SENT,
                detail=f"{self._max_in_flight} requests were in flight, the most by --max-in-flight",
            )
        )
