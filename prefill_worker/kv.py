"""What the KV endpoint of a prefill rank is made of, whichever rank it is."""

from collections.abc import Callable
from dataclasses import dataclass

from biphase.engine.engine import Engine
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.faults import FaultInjector, FaultPlan
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.protos.ids import TicketId


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedKv:
    """``counters``: the service's and, in drills, what was broken on purpose."""

    service: KvService
    counters: Callable[[], dict[str, int]]


def serve_kv(
    config: WorkerConfig,
    engine: Engine,
    exports: ExportTable,
    *,
    on_ended: Callable[[ExportEnded], None],
    on_readers: Callable[[TicketId, int, int], None] = lambda ticket, num_open, epoch: None,
) -> ServedKv:
    """The service of this rank, not started. Raises SetupError for faults that make no sense."""
    injector = FaultInjector(FaultPlan.parse(config.inject_faults), engine.rank) if config.inject_faults else None
    service = KvService(
        exports=exports,
        memory=RankMemory(engine.kv_memory, engine.full_layout, engine.plan, engine.rank),
        signature=KvSignatureValue.of_engine(
            engine, instance=config.name, incarnation=config.incarnation, kv_codec=config.kv_codec
        ),
        on_ended=on_ended,
        on_readers=on_readers,
        leads=engine.rank == 0,
        overlap=config.kv_overlap,
        wrap_sink=(lambda sink: sink) if injector is None else injector.wrap,
    )

    def counters() -> dict[str, int]:
        return {**service.counters(), **({} if injector is None else injector.counters())}

    return ServedKv(service=service, counters=counters)
