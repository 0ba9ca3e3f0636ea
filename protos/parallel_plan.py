"""How an instance's model lies on its ranks: tensor x pipeline parallelism. Pure arithmetic, shared by both ends.

Rank ``r`` of an instance is stage ``r // tp`` of the pipeline and place ``r % tp`` in that stage: the ranks of one stage,
which exchange activations twice a layer, are neighbours. Stages have consecutive layers, the first ones one more where the
layers do not divide. Query heads, intermediate features and experts are cut evenly over a stage; KV heads too, and where
there are fewer of them than places each lies on tp / num_kv_heads neighbouring places (Megatron-LM, arXiv 1909.08053 and
2104.04473).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """``tp`` places per stage, ``pp`` stages. Raises ValueError for less than 1 of either."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, value in (("tensor_parallel_size", self.tp), ("pipeline_parallel_size", self.pp)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def stage_of(self, rank: int) -> int:
        return rank // self.tp

    def place_of(self, rank: int) -> int:
        return rank % self.tp

    def rank_at(self, *, stage: int, place: int) -> int:
        return stage * self.tp + place

    def layers_of(self, rank: int, num_layers: int) -> range:
        """The layers of a rank's stage."""
        return even_part(num_layers, self.pp, self.stage_of(rank))

    def kv_heads_of(self, rank: int, num_kv_heads: int) -> range:
        """The KV heads that a rank holds; several ranks of a stage hold the same one where tp exceeds them."""
        place = self.place_of(rank)
        if self.tp <= num_kv_heads:
            return even_part(num_kv_heads, self.tp, place)
        head = place * num_kv_heads // self.tp
        return range(head, head + 1)

    def reason_against(
        self,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        intermediate_size: int,
        num_experts: int = 0,
    ) -> str | None:
        """Why a model of these sizes cannot be cut so: one line with both numbers, or None where it can."""
        tp = self.tp
        for name, value in (
            ("attention heads", num_heads),
            ("intermediate features", 0 if num_experts else intermediate_size),
        ):
            if value % tp:
                return f"tensor_parallel_size {tp} does not divide the model's {value} {name}"
        if num_kv_heads % tp and tp % num_kv_heads:
            return f"tensor_parallel_size {tp} neither divides the model's {num_kv_heads} KV heads nor is a multiple of them"
        if num_experts % tp:
            return f"tensor_parallel_size {tp} does not divide the model's {num_experts} experts"
        if self.pp > num_layers:
            return f"pipeline_parallel_size {self.pp} is more than the model's {num_layers} layers"
        return None

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp}"


def even_part(total: int, parts: int, index: int) -> range:
    """Part ``index`` of ``total`` things cut into ``parts`` runs of like size, the larger ones first."""
    size, larger = divmod(total, parts)
    start = index * size + min(index, larger)
    return range(start, start + size + (index < larger))
