"""`python -m biphase.prefill_worker`: one prefill instance as a process of its own."""

from biphase.engine.worker_main import run_worker
from biphase.prefill_worker.serve import serve
from biphase.protos.process import leave


def main() -> None:
    leave(run_worker("prefill", serve))


if __name__ == "__main__":
    main()
