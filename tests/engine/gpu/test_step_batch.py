"""A plan's rows: which token lies where, what padding holds, where a continued token comes from."""

import numpy as np
import torch

from biphase.engine.gpu.accelerator import Accelerator
from biphase.engine.gpu.step_batch import fill, rows_of
from biphase.engine.gpu.step_inputs import HostInputs, StepInputs
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

GREEDY = Sampling()


def inputs() -> StepInputs:
    return StepInputs(Accelerator(torch.device("cpu")), max_rows=12, max_seqs=4, table_width=6, num_buffers=2)


def poisoned(made: StepInputs) -> HostInputs:
    host = made.host()
    host.bytes_of.fill_(0x77)
    return host


def seq(
    number: int, tokens: int, start: int, blocks: list[int], *, draws: bool = True, continues: bool = False
) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(number),
        token_ids=[100 * number + i for i in range(tokens)],
        start=start,
        blocks=[BlockId(block) for block in blocks],
        sampling=GREEDY if draws else None,
        continues=continues,
    )


def test_singles_come_first_then_chunks_packed() -> None:
    plan = StepPlan(
        seqs=(seq(1, 5, 3, [7, 2, 9]), seq(2, 1, 4, [5, 0]), seq(3, 2, 0, [8], draws=False), seq(4, 1, 0, [1]))
    )
    rows = rows_of(plan)
    assert (rows.singles, rows.chunks, rows.drawing) == ((1, 3), (0, 2), (1, 3, 0))
    assert (rows.num_rows, rows.num_seqs, rows.graph) == (9, 4, False)
    assert (rows.chunk_lens, rows.chunk_contexts) == ((5, 2), (8, 2))
    host = poisoned(inputs())
    fill(host, plan, rows, {}, block_size=4, padded=rows.num_rows)
    assert host.token_ids[:9].tolist() == [200, 400, 100, 101, 102, 103, 104, 300, 301]
    assert host.sources[:9].tolist() == [-1] * 9
    assert host.positions[:9].tolist() == [4, 0, 3, 4, 5, 6, 7, 0, 1]
    assert host.slots[:9].tolist() == [0, 4, 31, 8, 9, 10, 11, 32, 33]
    assert host.context_lens[:2].tolist() == [5, 1]
    assert host.query_starts[:3].tolist() == [0, 1, 2]
    assert host.sampled_rows[:3].tolist() == [0, 1, 6]
    assert [host.block_tables[n, :2].tolist() for n in (0, 2)] == [[5, 0], [7, 2]]
    assert (host.block_tables[1, 0], host.block_tables[3, 0]) == (1, 8)


def test_a_decode_step_is_padded_with_rows_that_write_nowhere() -> None:
    plan = StepPlan(seqs=(seq(1, 1, 8, [3, 1, 2]), seq(2, 1, 0, [4])))
    rows = rows_of(plan)
    assert rows.graph
    host = poisoned(inputs())
    fill(host, plan, rows, {}, block_size=4, padded=4)
    assert host.slots[:4].tolist() == [8, 16, -1, -1]
    assert host.context_lens[:4].tolist() == [9, 1, 0, 0]
    assert host.query_starts[:5].tolist() == [0, 1, 2, 3, 4]
    assert (host.token_ids[2:4].tolist(), host.sources[2:4].tolist()) == ([0, 0], [-1, -1])


def test_a_continued_token_is_read_where_the_last_step_drew_it() -> None:
    plan = StepPlan(seqs=(seq(5, 1, 2, [0], continues=True), seq(6, 1, 2, [1])))
    host = poisoned(inputs())
    fill(host, plan, rows_of(plan), {SeqId(5): 3, SeqId(6): 0}, block_size=4, padded=2)
    assert host.sources[:2].tolist() == [3, -1]
    fill(host, plan, rows_of(plan), {SeqId(6): 0}, block_size=4, padded=2)
    assert host.sources[:2].tolist() == [-1, -1], "the step before was never launched: this token will be dropped"


def test_a_single_token_that_does_not_draw_is_no_graph_step() -> None:
    plan = StepPlan(seqs=(seq(1, 1, 0, [0], draws=False), seq(2, 1, 0, [1])))
    rows = rows_of(plan)
    assert (rows.graph, rows.drawing) == (False, (1,))
    host = poisoned(inputs())
    fill(host, plan, rows, {}, block_size=4, padded=2)
    assert host.sampled_rows[:1].tolist() == [1]


def test_buffers_take_turns_and_the_device_sees_each() -> None:
    made = inputs()
    seen = []
    for value in (1, 2, 3):
        host = made.host()
        host.token_ids[:2] = value
        host.block_tables[:2] = np.arange(8) + value
        seen.append(host.bytes_of.data_ptr())
        made.upload(2)
        assert made.token_ids[:2].tolist() == [value] * 2
        assert made.block_tables[1, :6].tolist() == list(range(value, value + 6))
    assert seen[0] != seen[1] and seen[0] == seen[2]
    assert made.block_tables[2:].sum() == 0, "rows of sequences that are not there are not sent"
