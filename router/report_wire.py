"""The router's report as a message."""

from collections.abc import Sequence
from typing import Any

from biphase.protos import controller_pb2
from biphase.router.report import LENGTHS, TPOT_MS, TTFT_MS, Joint, Snapshot
from biphase.router.view import Pair


def report_to_proto(
    totals: Snapshot, *, broken_pairs: Sequence[tuple[Pair, str]], **present: Any
) -> controller_pb2.RouterReport:
    """``present``: the fields that are no totals of the load."""
    return controller_pb2.RouterReport(
        offered_requests=totals.offered_requests,
        offered_prompt_tokens=totals.offered_prompt_tokens,
        offered_output_tokens=totals.offered_output_tokens,
        ended=totals.ended,
        latency=_joint(totals.latency),
        running=_joint(totals.running),
        prompt_tokens=_lengths(totals.prompt_tokens),
        output_tokens=_lengths(totals.output_tokens),
        broken_pairs=[
            controller_pb2.BrokenPair(prefill=pair.prefill, decode=pair.decode, detail=detail)
            for pair, detail in broken_pairs
        ],
        **present,
    )


def _joint(value: Joint) -> controller_pb2.JointHistogram:
    if not value.missed and not any(value.counts):  # as mostly at night: thousands of zeros that nobody needs
        return controller_pb2.JointHistogram()
    return controller_pb2.JointHistogram(ttft_ms=TTFT_MS, tpot_ms=TPOT_MS, counts=value.counts, missed=value.missed)


def _lengths(counts: Sequence[int]) -> controller_pb2.Histogram:
    return controller_pb2.Histogram(bounds=LENGTHS, counts=counts)
