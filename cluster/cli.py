"""The `biphase` command: arguments in, one function per subcommand out. Imports neither torch nor Ray."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from biphase.client.bench import flags as bench_flags
from biphase.cluster import admin_parsers
from biphase.cluster.controller_call import add_whom
from biphase.cluster.deployment import Dtype, KvCodec, KvDtype, KvTransport
from biphase.cluster.version import version
from biphase.protos.errors import BiphaseError, InvalidRequest, SetupError, one_line

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """No shortened flags, in the subcommands neither: a later flag would change what a script's short one means."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake; the usage is a --help away."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="biphase",
        description="Serve large language models with prefill and decode on separate instances.",
    )
    parser.set_defaults(run=None, parser=parser)
    parser.add_argument("--version", action="version", version=f"biphase {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    _add_stop(commands)
    _add_down(commands)
    _add_generate(commands)
    _add_autoscale(commands)
    _add_bench(commands)
    admin_parsers.add_commands(commands)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="start a deployment and keep it running",
        description="Start a deployment from a deploy file, from flags, or from both (flags win). Stays in the foreground; "
        "Ctrl-C drains, a second one stops at once.",
        epilog="example: biphase serve --model smollm2 --prefill 1 --decode 1",
    )
    serve.add_argument("deploy_file", nargs="?", metavar="deploy.yaml", help="what to run; see examples/")
    serve.add_argument("--model", help="GGUF file, Hugging Face directory, hub name, or smollm2 (the packaged model)")
    serve.add_argument("--load-format", choices=("auto", "dummy"), help="dummy: random weights (default auto)")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto (default): a GPU where there is one")
    serve.add_argument("--dtype", choices=get_args(Dtype), help="of weights (default: bfloat16 on a GPU, else float32)")
    serve.add_argument("--kv-dtype", choices=get_args(KvDtype), help="of the KV cache (default: as --dtype)")
    serve.add_argument("--served-model-name", help="what clients call it")
    serve.add_argument("--name", help="the deployment's name, for status and stop (default: biphase)")
    serve.add_argument("--prefill", type=int, metavar="N", help="prefill instances (default 1; 0: colocated)")
    serve.add_argument("--decode", type=int, metavar="N", help="decode instances (default 1)")
    for role in ("prefill", "decode"):
        serve.add_argument(
            f"--{role}-tp", type=int, metavar="N", help=f"ranks that share each layer of a {role} instance (default 1)"
        )
        serve.add_argument(
            f"--{role}-pp", type=int, metavar="N", help=f"pipeline stages of a {role} instance (default 1)"
        )
    serve.add_argument("--backend", choices=("ray", "process"), help="what runs the processes (default ray)")
    serve.add_argument(
        "--mode", choices=("auto", "strict"), help="strict: decode instances never prefill (default auto)"
    )
    serve.add_argument("--host", help="where the router listens (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="the router's port (default 8700; 0: any free one)")
    serve.add_argument("--threads", type=int, metavar="N", help="CPU threads per rank (default cores / ranks)")
    serve.add_argument("--cpus", type=float, metavar="N", help="CPUs per rank asked of Ray (default 1; 0 allowed)")
    serve.add_argument(
        "--gpus", type=float, metavar="N", help="GPUs per rank, 0 to 1 (default: equal shares, at most one each)"
    )
    serve.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="KV memory per rank, as in 2GiB (default 20%% of free RAM, 90%% of the GPU less the model)",
    )
    serve.add_argument("--block-size", type=int, metavar="TOKENS", help="tokens per KV block")
    serve.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and output together")
    serve.add_argument("--max-num-seqs", type=int, metavar="N", help="requests that run at once per instance")
    serve.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens per engine step")
    serve.add_argument(
        "--kv-transport",
        choices=get_args(KvTransport),
        help="what KV moves by between instances (default auto: the fastest that both ends share)",
    )
    serve.add_argument("--kv-codec", choices=get_args(KvCodec), help="how KV is packed on its way (default raw)")
    serve.add_argument(
        "--inject-faults",
        metavar="SPEC",
        help="drill: make faults in KV transfers on purpose, as in drop=0.01,corrupt=0.01,delay=0.02:50ms,seed=7",
    )
    serve.add_argument("--weights-cache", metavar="DIR", help="where converted weights are kept")
    serve.add_argument("--drain-s", type=float, metavar="S", help="how long a stop waits for running requests")
    serve.add_argument("--detach", action="store_true", help="return when ready; `biphase stop` ends it")
    serve.add_argument(
        "--wait",
        type=float,
        metavar="S",
        help="with --detach: return once the controller is up, within so many seconds; on a Ray cluster the rest waits for "
        "nodes that join later. Where the same runs already, nothing changes",
    )
    serve.set_defaults(run="serve", parser=serve)


def _add_status(commands: "argparse._SubParsersAction[_Parser]") -> None:
    status = commands.add_parser("status", help="show a running deployment and its processes")
    add_whom(status)
    status.add_argument("--json", action="store_true", help="everything, counters too, as JSON")
    status.add_argument("--watch", action="store_true", help="again at every change, until Ctrl-C")
    status.set_defaults(run="status", parser=status)


def _add_stop(commands: "argparse._SubParsersAction[_Parser]") -> None:
    stop = commands.add_parser("stop", help="drain and end a running deployment")
    stop.add_argument("--name", help="which deployment (default: the one that runs)")
    stop.add_argument("--now", action="store_true", help="do not wait for running requests")
    stop.set_defaults(run="stop", parser=stop)


def _add_down(commands: "argparse._SubParsersAction[_Parser]") -> None:
    down = commands.add_parser(
        "down",
        help="end a cluster that `ray up` has started, with what it serves",
        description="Drain and stop the deployment, `ray down`, and end Ray on the workers of a cluster of your own machines. "
        "Runs where `ray up` was run.",
        epilog="example: biphase down cluster.yaml",
    )
    down.add_argument("cluster_file", metavar="CLUSTER.yaml", help="the file that `ray up` was given")
    down.add_argument("-y", "--yes", action="store_true", help="do not ask")
    down.add_argument("--now", action="store_true", help="do not wait for running requests")
    down.add_argument("--name", help="which deployment, where several run there")
    down.set_defaults(run="down", parser=down)


def _add_generate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    generate = commands.add_parser(
        "generate",
        help="send a prompt and stream the answer",
        description="Send a prompt and stream the answer to the terminal. Ctrl-C cancels it on the server.",
        epilog='example: biphase generate "Why is the sky blue?" --max-tokens 64 --stats',
    )
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument("--address", help="HOST:PORT of a router (default: the deployment that runs)")
    generate.add_argument("--name", help="which deployment, where several run")
    kind = generate.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="as a chat message (default where the model has a template)")
    kind.add_argument("--raw", action="store_true", help="as plain text to go on with")
    generate.add_argument("--system", metavar="TEXT", help="a system message, with --chat")
    generate.add_argument(
        "--max-tokens", type=int, metavar="N", help="at most so many (default 256, less where the model's length ends)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="default 0: greedy; the server's where --top-p, --top-k, --min-p or --seed is given",
    )
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--min-p", type=float, metavar="P")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    generate.add_argument("--timeout", type=float, metavar="S", help="give up after this many seconds")
    generate.add_argument("--stats", action="store_true", help="print where the time went, afterwards")
    generate.set_defaults(run="generate", parser=generate)


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    bench = commands.add_parser(
        "bench",
        help="put load on a deployment and measure it",
        description=bench_flags.DESCRIPTION,
        epilog=bench_flags.EPILOG,
    )
    bench_flags.add_arguments(bench)
    bench.set_defaults(run="bench", parser=bench)


def _add_autoscale(commands: "argparse._SubParsersAction[_Parser]") -> None:
    autoscale = commands.add_parser("autoscale", help="try an autoscaling policy")
    autoscale.set_defaults(run=None, parser=autoscale)
    parts = autoscale.add_subparsers(dest="part", metavar="PART")
    replay = parts.add_parser(
        "replay",
        help="run a policy over a recorded history, offline",
        description="Run a policy over a recorded history of signals and print what it would have done, and why.",
        epilog="example: biphase autoscale replay --policy examples/policy.yaml --signals examples/history.jsonl",
    )
    replay.add_argument("--policy", required=True, metavar="FILE", help="a policy file, as examples/policy.yaml")
    replay.add_argument(
        "--signals", required=True, metavar="FILE", help="a recorded history, as examples/history.jsonl"
    )
    replay.add_argument("--start-s", type=float, default=30.0, metavar="S", help="how long a start takes (default 30)")
    replay.add_argument(
        "--as-recorded",
        action="store_true",
        help="decide over the instances that really ran, not those that the decisions would have led to",
    )
    replay.add_argument("--all", action="store_true", help="a line for every decision, not for news alone")
    replay.add_argument("--json", action="store_true", help="one JSON object per decision")
    replay.set_defaults(run="autoscale replay", parser=replay)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; what cannot be taken ends here, with the usage of the subcommand that was meant."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        words = arguments.run == "generate" and any(not word.startswith("-") for word in unknown)
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}" + ("; quote the prompt" if words else ""))
    if arguments.run is None:
        arguments.parser.print_help(sys.stderr)
        parser.exit(EXIT_USAGE)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit code 2."""
    arguments = _parsed(argv)
    try:
        match arguments.run:
            case "serve":
                from biphase.cluster.serve_command import serve

                return serve(arguments)
            case "status":
                from biphase.cluster.status_command import status

                return status(arguments)
            case "stop":
                from biphase.cluster.status_command import stop

                return stop(arguments)
            case admin if admin in admin_parsers.COMMANDS:
                return admin_parsers.run_command(admin, arguments)
            case "down":
                from biphase.cluster.down_command import down

                return down(arguments)
            case "bench":
                from biphase.cluster.bench_command import run_bench

                return run_bench(arguments)
            case "autoscale replay":
                from biphase.cluster.autoscale_command import replay

                return replay(arguments)
            case _:
                from biphase.cluster.generate_command import generate

                return generate(arguments)
    except (SetupError, InvalidRequest) as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except BiphaseError as error:
        print(f"biphase: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
