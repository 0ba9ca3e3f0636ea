"""The asking half of scripts/demo.sh: streams answers to the terminal and prints who did what, and how long it took.

    python scripts/demo_ask.py HOST:PORT

Exit code 1 when an answer was not prefilled by one process and decoded by another.
"""

import sys

from biphase.client import BiphaseError, Client, Result, ServerInfo

QUESTIONS = (
    "What is the capital of France, and which river runs through it?",
    "Write two sentences about the sea.",
)
MAX_TOKENS = 64


def ask(client: Client, question: str) -> Result:
    """Stream one answer to the terminal."""
    print(f"\n> {question}\n", flush=True)
    messages = [{"role": "user", "content": question}]
    with client.generate(messages=messages, max_tokens=MAX_TOKENS, temperature=0.0, timeout_s=120.0) as answer:
        for delta in answer:
            print(delta.text, end="", flush=True)
    print(flush=True)
    return answer.result


def table(info: ServerInfo, results: list[Result]) -> str:
    """One column per answer, one row per figure."""

    def row(name: str, cells: list[str]) -> str:
        return f"{name:<30}" + "".join(f"{cell:>34}" for cell in cells)

    def milliseconds(values: list[float]) -> list[str]:
        return [f"{value:.1f} ms" for value in values]

    lines = [
        row("", [f"answer {number}" for number in range(1, len(results) + 1)]),
        row("prompt, output tokens", [f"{r.usage.prompt_tokens}, {r.usage.output_tokens}" for r in results]),
        row("TTFT (send to first token)", milliseconds([r.ttft_ms for r in results])),
        row("TPOT (per output token)", milliseconds([r.tpot_ms for r in results])),
        row("KV handed off", [f"{r.timeline.transfer_bytes:,} bytes" for r in results]),
        row("  pull, beside the prefill", milliseconds([r.timeline.transfer_ms for r in results])),
        row("  left after the first token", milliseconds([r.timeline.transfer_exposed_ms for r in results])),
        row("routed by", [f"{info.name} (pid {info.pid})" for _ in results]),
        row("prefilled by", [r.prefill_instance for r in results]),
        row("decoded by", [r.decode_instance for r in results]),
        row("decision", [r.decision for r in results]),
    ]
    return "\n".join(lines)


def main(address: str) -> int:
    with Client(address) as client:
        results = [ask(client, question) for question in QUESTIONS]
        print("\n" + table(client.server_info(), results), flush=True)
    alone = [
        r for r in results if r.decision != "disaggregated" or len(r.instances) != 2 or not r.timeline.transfer_bytes
    ]
    if alone:
        print(
            f"demo: {len(alone)} of {len(results)} answers were not handed from one process to another", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except BiphaseError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
