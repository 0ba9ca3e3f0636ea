"""`biphase autoscale replay`: a policy over a recorded history, offline. Prints what it would have done."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from biphase.planner.history import read_history
from biphase.planner.policy import contradiction
from biphase.planner.policy_file import load_policy
from biphase.planner.replay import Replay, Replayed
from biphase.protos.errors import SetupError, one_line


def replay(arguments: argparse.Namespace) -> int:
    policy = load_policy(Path(arguments.policy))
    path = Path(arguments.signals)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise SetupError(f"cannot read history {path}: {reason}") from error
    setup, history = read_history(lines, source=str(path))
    problem = contradiction(
        policy, gpus={"prefill": setup.prefill.gpus, "decode": setup.decode.gpus}, strict=setup.strict
    )
    if problem is not None:
        raise SetupError(f"{arguments.policy}: {problem}")
    run = Replay(policy, setup, start_s=arguments.start_s, follow=not arguments.as_recorded)
    done = run.run(history)
    if arguments.json:
        for item in done:
            print(json.dumps(_as_json(item)))
    else:
        _print_lines(done, everything=arguments.all)
    return 0


def _as_json(item: Replayed) -> dict[str, object]:
    decision = item.decision
    return {
        "at_s": item.at_s,
        "recorded": asdict(item.recorded),
        "current": asdict(decision.current),
        "target": asdict(decision.target),
        "actions": [{"action": type(action).__name__, **asdict(action)} for action in decision.actions],
        "reasons": list(decision.reasons),
        "requests_per_s": item.signals.load.requests_per_s,
        "output_tokens_per_s": item.signals.load.output_tokens_per_s,
    }


def _print_lines(done: Iterable[Replayed], *, everything: bool) -> None:
    count = actions = 0
    gpu_s = recorded_gpu_s = 0.0
    last: Replayed | None = None
    for item in done:
        count += 1
        actions += len(item.decision.actions)
        if last is not None:
            seconds = item.at_s - last.at_s
            gpu_s += seconds * last.decision.current.gpus(last.signals.setup)
            recorded_gpu_s += seconds * last.recorded.gpus(last.signals.setup)
        last = item
        if everything or (item.decision.is_news and item.decision.reasons):
            minutes, seconds_ = divmod(item.at_s, 60)
            shown = f"{item.decision.current} -> {item.decision.target}"
            print(f"{minutes:4.0f}:{seconds_:04.1f}  {shown:16}  {'; '.join(item.decision.reasons) or 'nothing to do'}")
    if last is None:
        print("the history holds no moment")
        return
    print(
        f"{count} decisions over {last.at_s / 60:.1f} minutes, {actions} actions, {gpu_s / 3600:.2f} GPU hours "
        f"({recorded_gpu_s / 3600:.2f} as recorded); at the end {last.decision.current}, recorded {last.recorded}"
    )
