"""Settings of one engine. Plain values; defaults live here once."""

import re
from dataclasses import dataclass, replace

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "float8_e4m3fn")
LOAD_FORMATS = ("auto", "dummy")
GPU_BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str
    """GGUF file, Hugging Face directory, or hub name."""
    load_format: str = "auto"
    """``auto``: the model's files; ``dummy``: random weights of its configuration, which may be a bare config.json."""
    served_name: str = ""
    """Name that requests use; empty: the file's or directory's name."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; auto: cuda where there is one."""
    dtype: str = "auto"
    """Of weights and activations; auto: float32 on the CPU, bfloat16 on a GPU."""
    kv_dtype: str = "auto"
    """Of the KV pool; auto: as ``dtype``. ``float8_e4m3fn`` halves it on a GPU of capability 8.9 or newer."""
    block_size: int | None = None
    """Tokens per KV block; None: 32 on the CPU, 64 on a GPU."""
    max_model_len: int | None = None
    """Prompt and output together, in tokens; None: the model's own limit."""
    kv_memory_bytes: int | None = None
    """None: on the CPU 20 % of what is free / instances_on_host, at most 4 GiB; on a GPU 90 % of gpu_share of its memory,
    less what model and buffers take."""
    gpu_share: float = 1.0
    """The part of its GPU's memory that is this engine's; others on that GPU have the rest."""
    num_kv_blocks: int | None = None
    """Overrides kv_memory_bytes."""
    max_step_tokens: int = 1024
    """Tokens of the largest step; a GPU's buffers are made for it."""
    max_step_seqs: int = 64
    """Sequences of the largest step; likewise."""
    threads: int | None = None
    """Of torch; None: cores / instances_on_host, at least 1."""
    instances_on_host: int = 1
    weights_cache: str | None = None
    """Folder of converted weights; None: BIPHASE_WEIGHTS_CACHE, else ~/.cache/biphase/weights."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, its value and its bound."""
        if self.load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format {self.load_format!r} is not supported; there are: {', '.join(LOAD_FORMATS)}")
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise ValueError(f"device {self.device!r} is not supported; there are: auto, cpu, cuda, cuda:N")
        for name, known in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            value = getattr(self, name)
            allowed = ("float32",) if self.device == "cpu" else known
            if value not in ("auto", *allowed):
                there = f"on {self.device}; there is: " if self.device == "cpu" else "; there are: "
                raise ValueError(f"{name} {value!r} is not supported {there}{', '.join(allowed)}".replace(" ;", ";"))
        if self.device.startswith("cuda") and self.block_size not in (None, *GPU_BLOCK_SIZES):
            sizes = ", ".join(map(str, GPU_BLOCK_SIZES))
            raise ValueError(f"block_size is {self.block_size}, on a GPU it is one of {sizes}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share is {self.gpu_share}, it must be above 0 and at most 1")
        for name in ("instances_on_host", "max_step_tokens", "max_step_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("block_size", "max_model_len", "kv_memory_bytes", "num_kv_blocks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")

    def resolved(self, *, has_cuda: bool) -> "EngineConfig":
        """The same with nothing left to choose but memory and threads. Raises ValueError as the constructor does."""
        device = self.device
        if device == "auto":
            device = "cuda" if has_cuda else "cpu"
        on_gpu = device != "cpu"
        dtype = ("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype
        if self.kv_dtype not in ("auto", dtype, "float8_e4m3fn"):
            raise ValueError(f"kv_dtype is {self.kv_dtype!r}, with dtype {dtype} it is {dtype} or float8_e4m3fn")
        return replace(
            self,
            device=device,
            dtype=dtype,
            kv_dtype=dtype if self.kv_dtype == "auto" else self.kv_dtype,
            block_size=self.block_size or (64 if on_gpu else 32),
        )
