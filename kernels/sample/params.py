"""A step's draws on the device: one record of fixed size per row, then what varies in length, in one int32 buffer that
a single copy uploads. Owned by one engine; filled on the host, read by the kernels. Knows no kernel and no logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch

from biphase.kernels.sample.draw_row import MAX_TOP_LOGPROBS, DrawRow
from biphase.kernels.sample.filters import min_p_floor


class RowFlag(IntFlag):
    """What a row needs; a kernel leaves a row whose flag is off at once. 0: a padding row."""

    ACTIVE = 1
    DRAWN = 2
    TOP_K = 4
    TOP_P = 8
    LOGPROBS = 16
    PENALISED = 32
    EDITED = 64


RECORD = np.dtype(
    {
        "names": (
            names := [
                *("flags", "top_k", "num_top", "late_row", "temperature", "floor"),
                *("repetition", "frequency", "presence", "mask_start"),
                *("prompt_start", "prompt_end", "output_start", "output_end"),
                *("bias_start", "bias_end", "forbid_start", "forbid_end"),
                *("seed", "branch", "position", "top_p", "min_p"),
            ]
        ),
        "formats": ["<i4"] * 4 + ["<f4"] * 5 + ["<i4"] * 9 + ["<u8"] * 3 + ["<f8"] * 2,
        "offsets": list(range(0, 18 * 4, 4)) + list(range(72, 112, 8)),
        "itemsize": 128,
    }
)
"""``late_row``: the entry of ``late_ids`` with an output token that the host has not seen yet, or -1. ``*_start``,
``*_end``: words of the buffer. A bias is two words, id and float32 value; ``mask_start`` is -1 without a mask."""

WORDS = RECORD.itemsize // 4
FIELD_WORD = {name: RECORD.fields[name][1] // 4 for name in names}  # type: ignore[index]
_FLOOR_OFF = np.finfo(np.float32).min
_NUM_STAGING = 2


@dataclass(slots=True)
class _Staging:
    host: torch.Tensor
    copied: torch.cuda.Event | None


class SampleParams:
    """``fill`` writes a step's rows; ``words`` is what the kernels read. Rows past the last filled are padding.

    ``extra_words``: room for histories, biases, forbidden ids and masks of all rows together.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device, extra_words: int = 1 << 20) -> None:
        self.max_rows, self.vocab_size = max_rows, vocab_size
        size = max_rows * WORDS + extra_words
        self.words = torch.zeros(size, dtype=torch.int32, device=device)
        self._staging = [
            _Staging(
                host=torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda"),
                copied=torch.cuda.Event() if device.type == "cuda" else None,
            )
            for _ in range(_NUM_STAGING if device.type != "meta" else 0)
        ]
        self.has_filters = False
        """Whether a row asked for top-k, top-p or log-probabilities, which need the whole vocabulary in one place."""
        self.last_late_row = -1
        """The highest entry of ``late_ids`` that a row takes."""

    def fill(self, rows: Sequence[DrawRow], late_rows: Sequence[int] | None = None) -> None:
        """Upload ``rows``, row i for logits row i. ``late_rows``: per row the entry of the launcher's ``late_ids``
        that holds the row's last output token, not yet in ``output_ids``; -1 for none.

        Waits only if the copy before the last one has not run yet. Raises ValueError naming what is out of range.
        """
        if len(rows) > self.max_rows:
            raise ValueError(f"rows has {len(rows)} entries, at most {self.max_rows} fit")
        staging = self._staging[0]
        self._staging = [*self._staging[1:], staging]
        if staging.copied is not None:
            staging.copied.synchronize()
        used = _write(staging.host.numpy(), self.max_rows, self.vocab_size, rows, late_rows)
        self.has_filters = any(_filtered(row) for row in rows)
        self.last_late_row = max(late_rows, default=-1) if late_rows is not None else -1
        self.words[:used].copy_(staging.host[:used], non_blocking=True)
        if staging.copied is not None:
            staging.copied.record()

    def rows(self, late_ids: torch.Tensor | None = None) -> list[DrawRow | None]:
        """What the kernels read, as rows; None where padding. Reads the device: for the reference and for tests."""
        words = self.words.cpu().numpy()
        late = None if late_ids is None else late_ids.cpu().numpy()
        records = words[: self.max_rows * WORDS].view(RECORD)
        return [_read(words, record, self.vocab_size, late) for record in records]


def _filtered(row: DrawRow) -> bool:
    return row.temperature > 0 and (row.top_k > 0 or row.top_p < 1) or row.logprobs is not None


def _flags(row: DrawRow, vocab_size: int) -> int:
    drawn = row.temperature > 0
    flags = RowFlag.ACTIVE
    for on, flag in (
        (drawn, RowFlag.DRAWN),
        (drawn and 0 < row.top_k < vocab_size, RowFlag.TOP_K),
        (drawn and row.top_p < 1, RowFlag.TOP_P),
        (row.logprobs is not None, RowFlag.LOGPROBS),
        (row.penalised, RowFlag.PENALISED),
        (row.edited, RowFlag.EDITED),
    ):
        if on:
            flags |= flag
    return int(flags)


def _write(
    words: np.ndarray, max_rows: int, vocab_size: int, rows: Sequence[DrawRow], late_rows: Sequence[int] | None
) -> int:
    """Returns the number of words used."""
    records = words[: max_rows * WORDS].view(RECORD)
    records[len(rows) :] = np.zeros((), dtype=RECORD)
    live = records[: len(rows)]
    live["flags"] = [_flags(row, vocab_size) for row in rows]
    live["top_k"] = [min(row.top_k, vocab_size) for row in rows]
    live["num_top"] = [min(row.logprobs or 0, vocab_size) for row in rows]
    live["late_row"] = -1 if late_rows is None else late_rows
    live["temperature"] = [row.temperature for row in rows]
    live["floor"] = [min_p_floor(row.min_p) if row.min_p > 0 else _FLOOR_OFF for row in rows]
    live["repetition"] = [row.repetition_penalty for row in rows]
    live["frequency"] = [row.frequency_penalty for row in rows]
    live["presence"] = [row.presence_penalty for row in rows]
    live["mask_start"] = -1
    for name in ("seed", "branch", "position", "top_p", "min_p"):
        live[name] = [getattr(row, name) for row in rows]
    for start, end in (("prompt_start", "prompt_end"), ("output_start", "output_end")):
        live[start] = live[end] = 0
    for start, end in (("bias_start", "bias_end"), ("forbid_start", "forbid_end")):
        live[start] = live[end] = 0
    used = max_rows * WORDS
    for index, row in enumerate(rows):
        if (row.logprobs or 0) > MAX_TOP_LOGPROBS:
            raise ValueError(f"logprobs is {row.logprobs} in row {index}, at most {MAX_TOP_LOGPROBS}")
        if row.edited:
            used = _write_edits(words, used, live, index, row, vocab_size)
    return used


def _write_edits(words: np.ndarray, used: int, records: np.ndarray, index: int, row: DrawRow, vocab_size: int) -> int:
    parts: list[tuple[str, np.ndarray]] = []
    if row.penalised:
        if row.repetition_penalty != 1:
            parts.append(("prompt", np.asarray(row.prompt_ids, dtype=np.int32)))
        parts.append(("output", np.asarray(row.output_ids, dtype=np.int32)))
    if row.logit_bias:
        bias = np.array(list(row.logit_bias), dtype=[("id", "<i4"), ("value", "<f4")])
        parts.append(("bias", bias.view(np.int32)))
    if row.forbid_ids:
        parts.append(("forbid", np.array(row.forbid_ids, dtype=np.int32)))
    if row.allowed is not None:
        num_words = -(-vocab_size // 32)
        if len(row.allowed) != num_words:
            raise ValueError(f"allowed has {len(row.allowed)} words in row {index}, expected {num_words}")
        parts.append(("mask", np.ascontiguousarray(row.allowed).view(np.int32)))
    for name, values in parts:
        end = used + len(values)
        if end > len(words):
            raise ValueError(f"{name} of row {index} ends at word {end} of a sampling buffer of {len(words)}")
        words[used:end] = values
        records[f"{name}_start"][index] = used
        if name != "mask":
            records[f"{name}_end"][index] = end
        used = end
    return used


def _read(words: np.ndarray, record: np.void, vocab_size: int, late: np.ndarray | None) -> DrawRow | None:
    flags = RowFlag(int(record["flags"]))
    if not flags:
        return None
    output = words[record["output_start"] : record["output_end"]]
    if record["late_row"] >= 0 and late is not None:
        output = np.append(output, late[record["late_row"]])
    bias = words[record["bias_start"] : record["bias_end"]].view([("id", "<i4"), ("value", "<f4")])
    mask_start = int(record["mask_start"])
    return DrawRow(
        temperature=float(record["temperature"]),
        top_k=int(record["top_k"]),
        top_p=float(record["top_p"]),
        min_p=float(record["min_p"]),
        seed=int(record["seed"]),
        branch=int(record["branch"]),
        position=int(record["position"]),
        forbid_ids=tuple(words[record["forbid_start"] : record["forbid_end"]].tolist()),
        repetition_penalty=float(record["repetition"]),
        frequency_penalty=float(record["frequency"]),
        presence_penalty=float(record["presence"]),
        prompt_ids=words[record["prompt_start"] : record["prompt_end"]],
        output_ids=output,
        logit_bias=tuple((int(token), float(value)) for token, value in bias.tolist()),
        allowed=None if mask_start < 0 else words[mask_start : mask_start + -(-vocab_size // 32)],
        logprobs=int(record["num_top"]) if RowFlag.LOGPROBS in flags else None,
    )
