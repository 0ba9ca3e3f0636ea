"""`python -m biphase.decode_worker`: one decode instance as a process of its own."""

import sys

from biphase.decode_worker.serve import serve
from biphase.engine.worker_main import run_worker


def main() -> None:
    sys.exit(run_worker("decode", serve))


if __name__ == "__main__":
    main()
