"""The flags of `biphase bench`. Imports nothing heavy: the command's help is made of it."""

import argparse

DESCRIPTION = (
    "Open-loop load on a deployment: requests are sent when they are due, whatever has become of those before. "
    "Prints TTFT, TPOT, ITL and end-to-end times, throughput, errors by kind, and how many requests met the goals."
)
EPILOG = (
    "example: biphase bench --request-rate 2 --duration 60 --input-len 128 --output-len 64 --goodput ttft:500 tpot:50"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument(
        "--address",
        action="append",
        metavar="HOST:PORT",
        help="a router; several, repeated or with commas, are taken in turn",
    )
    where.add_argument("--name", help="which deployment, where several run here")

    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", type=float, default=1.0, metavar="R", help="requests per second (default 1; inf: all at once)"
    )
    load.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1: Poisson (default); less: bursts; more: even gaps"
    )
    load.add_argument(
        "--input-len",
        metavar="TOKENS",
        help="N (default 128), uniform:LEAST:MOST, normal:MEAN:SD, lognormal:MEAN:SD or empirical:FILE",
    )
    load.add_argument("--output-len", metavar="TOKENS", help="the same (default 64); end-of-sequence is ignored")
    load.add_argument("--num-prompts", type=int, metavar="N", help="end after so many (default 100 without --duration)")
    load.add_argument("--duration", type=float, metavar="S", help="send for so long")
    load.add_argument("--phases", metavar="FILE", help="rate and lengths over time, as YAML; see examples/load/")
    load.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts (default 0)")
    load.add_argument(
        "--salt",
        type=int,
        default=0,
        help="other tokens for the same load: a repeated prompt may be cached (default 0)",
    )
    load.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    load.add_argument("--respect-eos", action="store_true", help="answers may end before their length")
    load.add_argument("--timeout", type=float, metavar="S", help="the deadline of each request")
    load.add_argument(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="what is due beyond is not sent, and counted (4096)",
    )

    found = parser.add_argument_group("figures")
    found.add_argument(
        "--goodput",
        nargs="+",
        metavar="METRIC:MS",
        help="goals, as in ttft:500 tpot:50; also e2e, and itl (longest gap)",
    )
    found.add_argument("--json", metavar="FILE", help="also write everything there, every request too")
    found.add_argument("--record-tokens", metavar="FILE", help="keep prompts and answers")
    found.add_argument("--check-tokens", metavar="FILE", help="send recorded prompts, compare every answer")
    found.add_argument("--no-progress", action="store_true", help="no progress bar")
