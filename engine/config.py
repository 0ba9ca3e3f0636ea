"""Settings of one engine. Plain values; defaults live here once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str
    """GGUF file, Hugging Face directory, or hub name."""
    served_name: str = ""
    """Name that requests use; empty: the file's or directory's name."""
    device: str = "cpu"
    dtype: str = "float32"
    block_size: int = 32
    """Tokens per KV block."""
    max_model_len: int | None = None
    """Prompt and output together, in tokens; None: the model's own limit."""
    kv_memory_bytes: int | None = None
    """None: 20 % of free memory / instances_on_host, at most 4 GiB."""
    num_kv_blocks: int | None = None
    """Overrides kv_memory_bytes."""
    threads: int | None = None
    """Of torch; None: cores / instances_on_host, at least 1."""
    instances_on_host: int = 1
    weights_cache: str | None = None
    """Folder of converted weights; None: BIPHASE_WEIGHTS_CACHE, else ~/.cache/biphase/weights."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, its value and its bound."""
        if self.device != "cpu":
            raise ValueError(f"device {self.device!r} is not supported; there is: cpu")
        if self.dtype != "float32":
            raise ValueError(f"dtype {self.dtype!r} is not supported on {self.device}; there is: float32")
        for name in ("block_size", "instances_on_host"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("max_model_len", "kv_memory_bytes", "num_kv_blocks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
