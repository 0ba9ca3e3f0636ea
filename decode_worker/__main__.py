"""`python -m biphase.decode_worker`: one decode instance as a process of its own."""

from biphase.decode_worker.serve import serve
from biphase.engine.worker_main import run_worker
from biphase.protos.process import leave


def main() -> None:
    leave(run_worker("decode", serve))


if __name__ == "__main__":
    main()
