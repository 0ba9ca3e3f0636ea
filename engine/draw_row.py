"""A sequence's part in a step as the sampler wants it."""

from biphase.engine.step import SeqStep
from biphase.kernels.sample import DrawRow


def draw_row(seq: SeqStep) -> DrawRow:
    """How the token after ``seq`` is chosen."""
    sampling = seq.sampling
    if sampling is None or sampling.temperature == 0:
        return DrawRow(forbid_ids=seq.forbid_ids)
    return DrawRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        branch=sampling.branch,
        position=seq.output_index,
        forbid_ids=seq.forbid_ids,
    )
