"""Which part of each tensor a rank needs: rows or columns of its heads, features and experts, of its layers. Pure.

Column-parallel matrices (q/k/v, gate/up) are cut by rows, row-parallel ones (attention output, down) by columns, embedding
and head by the vocabulary; norms and routers are whole on every rank of their stage. A rank counts its layers from 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from biphase.engine.checkpoint.layout import EngineTensor, engine_tensors
from biphase.engine.model_config import ModelConfig
from biphase.protos.parallel_plan import ParallelPlan, even_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """``runs`` of ``tensor`` along ``axis``, one behind the other, as ``name``. Neighbouring runs are one."""

    name: str
    tensor: EngineTensor
    axis: int
    runs: tuple[range, ...]

    @property
    def is_whole(self) -> bool:
        return self.runs == (range(self.tensor.shape[self.axis]),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A rank's part of a model."""

    plan: ParallelPlan
    rank: int

    @staticmethod
    def whole() -> "Shard":
        """All of it."""
        return Shard(plan=ParallelPlan(), rank=0)

    def reason_against(self, config: ModelConfig) -> str | None:
        """Why the plan cannot hold this model: one line, or None where it can."""
        return self.plan.reason_against(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size,
            num_experts=config.num_experts,
        )

    def cuts(self, config: ModelConfig) -> Iterator[Cut]:
        """Of every tensor that this rank needs, in the order in which a forward pass reads them."""
        plan = self.plan
        layers = plan.layers_of(self.rank, config.num_layers)
        is_first, is_last = plan.stage_of(self.rank) == 0, plan.stage_of(self.rank) == plan.pp - 1
        for tensor in engine_tensors(config):
            scope, _, kind = tensor.name.rpartition(".")
            if scope:
                layer = int(scope.removeprefix("layers."))
                if layer in layers:
                    yield self._cut(f"layers.{layer - layers.start}.{kind}", kind, tensor, config)
            elif (is_first and kind == "embed") or (is_last and (kind != "embed" or config.tie_word_embeddings)):
                yield self._cut(kind, kind, tensor, config)

    def vocabulary(self, config: ModelConfig) -> range:
        """The token ids of this rank's rows of embedding and head."""
        return even_part(config.vocab_size, self.plan.tp, self.plan.place_of(self.rank))

    def vocabulary_sizes(self, config: ModelConfig) -> list[int]:
        """How many token ids each place of a stage has."""
        return [len(even_part(config.vocab_size, self.plan.tp, place)) for place in range(self.plan.tp)]

    def experts(self, config: ModelConfig) -> range:
        return even_part(config.num_experts, self.plan.tp, self.plan.place_of(self.rank))

    def _cut(self, name: str, kind: str, tensor: EngineTensor, config: ModelConfig) -> Cut:
        axis, runs = self._runs(kind, tensor, config)
        return Cut(name=name, tensor=tensor, axis=axis, runs=tuple(_joined(runs)))

    def _runs(self, kind: str, tensor: EngineTensor, config: ModelConfig) -> tuple[int, list[range]]:
        tp, place, dim = self.plan.tp, self.plan.place_of(self.rank), config.head_dim
        queries = _scaled(even_part(config.num_heads, tp, place), dim)
        inter = config.intermediate_size
        match kind:
            case "embed" | "lm_head":
                return 0, [self.vocabulary(config)]
            case "qkv" | "qkv_bias":
                heads = _scaled(self.plan.kv_heads_of(self.rank, config.num_kv_heads), dim)
                keys_at = config.num_heads * dim
                values_at = keys_at + config.num_kv_heads * dim
                return 0, [queries, _shifted(heads, keys_at), _shifted(heads, values_at)]
            case "o":
                return 1, [queries]
            case "gate_up":
                features = even_part(inter, tp, place)
                return 0, [features, _shifted(features, inter)]
            case "down":
                return 1, [even_part(inter, tp, place)]
            case "experts_gate_up" | "experts_down":
                return 0, [self.experts(config)]
            case _:
                return 0, [range(tensor.shape[0])]


def _scaled(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def _joined(runs: Iterable[range]) -> Iterator[range]:
    current: range | None = None
    for run in runs:
        if current is not None and current.stop == run.start:
            current = range(current.start, run.stop)
            continue
        if current is not None:
            yield current
        current = run
    if current is not None:
        yield current
