"""`biphase bench`, from settings to exit code."""

import asyncio
import contextlib
import json
import random
import signal
import sys
from pathlib import Path

from biphase.client.async_client import AsyncClient
from biphase.client.bench import progress, report
from biphase.client.bench.arrivals import arrivals
from biphase.client.bench.prompts import Prompts, RandomPrompts, RecordedPrompts
from biphase.client.bench.runner import Live, Runner
from biphase.client.bench.settings import Settings
from biphase.client.bench.summary import summarize
from biphase.client.bench.tokens_file import MIN_MARGIN, Recorded, Recording, read_recording, write_recording
from biphase.client.values import ServedModel
from biphase.protos.errors import SetupError

_CANDIDATES = 8
"""Recorded prompts to choose the nearest length from."""


def bench(settings: Settings) -> int:
    """Returns 0, 1 when an answer was wrong or no request was done, 130 after Ctrl-C, with the figures of what was sent."""
    recording = read_recording(settings.check_tokens) if settings.check_tokens else None
    for path in (settings.json_file, settings.record_tokens):
        if path is not None and not path.absolute().parent.is_dir():
            raise SetupError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    served, runner, interrupted = asyncio.run(_run(settings, recording))
    summary = summarize(runner.measured, settings.goals)
    print("\n".join([*report.lines(summary, settings.goals), *report.phase_lines(settings, runner.measured)]))
    if settings.json_file is not None:
        document = report.document(settings, runner.measured, served.model.name)
        _write(settings.json_file, json.dumps(document, indent=1) + "\n")
    if settings.record_tokens is not None:
        write_recording(settings.record_tokens, _recording(served, runner))
    return 130 if interrupted else 1 if summary.wrong or not summary.done else 0


async def _run(settings: Settings, recording: Recording | None) -> tuple[ServedModel, Runner, bool]:
    async with AsyncClient(settings.addresses) as client:
        served = await client.model_info()
        prompts = _prompts(settings, served, recording)
        runner = Runner(
            [client],
            prompts,
            timeout_s=settings.timeout_s,
            max_in_flight=settings.max_in_flight,
            ignore_eos=settings.ignore_eos,
        )
        runner.keep_answers = settings.record_tokens is not None
        interrupted = await _accompanied(settings, runner)
        if isinstance(prompts, RandomPrompts) and prompts.num_cut:
            context = f"the context of {served.model.max_model_len} tokens"
            words = (
                f"{prompts.num_cut} of {len(runner.measured)} requests were longer than {context} and were cut to it"
            )
            print(words, file=sys.stderr)
        return served, runner, interrupted


async def _accompanied(settings: Settings, runner: Runner) -> bool:
    """Run it, with its progress shown; whether it was interrupted. The first Ctrl-C sends no more and waits for what runs,
    the second cuts it."""
    shown = asyncio.create_task(
        progress.show(runner, planned_s=settings.planned_s, num_prompts=settings.num_prompts)
        if settings.progress
        else asyncio.sleep(0)
    )
    work = asyncio.create_task(
        runner.run(arrivals(settings.phases, random.Random(settings.seed), settings.num_prompts))
    )
    stopping = False

    def interrupted() -> None:
        nonlocal stopping
        if stopping:
            work.cancel()
        elif runner.live:
            words = f"{len(runner.live)} request{'s' if len(runner.live) > 1 else ''}"
            print(f"\nno more is sent; waiting for {words}, Ctrl-C again cuts them short", file=sys.stderr)
        stopping = True
        runner.stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await work
        return stopping
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        work.cancel()
        shown.cancel()


def _prompts(settings: Settings, served: ServedModel, recording: Recording | None) -> Prompts:
    model = served.model
    if recording is None:
        return RandomPrompts(
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            seed=settings.seed,
            salt=settings.salt,
            temperature=settings.temperature,
        )
    if recording.model_hash and model.model_hash and recording.model_hash != model.model_hash.hex():
        raise SetupError(
            f"{settings.check_tokens} was recorded with other weights of {recording.model} than {model.name} is served with"
        )
    usable = recording.usable
    unknown = sum(one.margin is None for one in usable)
    words = f"{len(usable)} of {len(recording.prompts)} recorded prompts used (margin at least {MIN_MARGIN:g})"
    print(words + (f", {unknown} of them with an unknown margin" if unknown else ""), file=sys.stderr)
    return RecordedPrompts(usable, seed=settings.seed, candidates=_CANDIDATES)


def _recording(served: ServedModel, runner: Runner) -> Recording:
    """What was answered, each prompt once; its margins are the model's secret."""
    answers: dict[tuple[int, ...], Live] = {}
    for live in runner.answers.values():
        answers.setdefault(tuple(live.prompt.token_ids), live)
    return Recording(
        model=served.model.name,
        model_hash=served.model.model_hash.hex(),
        prompts=tuple(
            Recorded(
                prompt_ids=prompt_ids,
                tokens=tuple(live.tokens),
                margin=None,
                temperature=live.prompt.temperature,
                seed=live.prompt.seed,
            )
            for prompt_ids, live in answers.items()
        ),
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error
