"""What a deployment is: frozen values that the deploy file and the command line are turned into at once.

Defaults live here, once; the schema and the command line read them from here.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from biphase.cluster.router_places import RouterPlace, places_of
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.step_time import StepTime
from biphase.protos.values import Mode, Role
from biphase.router.config import RequestLimits

BackendName = Literal["ray", "process"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"]
KvTransport = Literal["auto", "grpc", "tcp", "shm", "cuda_ipc", "dist", "nixl"]
KvCodec = Literal["raw", "auto", "fp8", "int8", "int4"]
Placement = Literal["pack", "spread", "near"]

DEFAULT_PORT = 8700


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """The instances of one role. None leaves the choice to the instance, which logs and reports it.

    ``threads``, ``cpus``, ``gpus`` and ``kv_memory_bytes`` are each rank's; an instance has tp x pp of them, mostly one.
    """

    replicas: int = 1
    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Stages that the layers are divided into."""
    threads: int | None = None
    """CPU threads; None: cores / ranks on the host, at least 1."""
    cpus: float = 1.0
    """CPUs asked of Ray; 0 is allowed. The process backend places nothing and ignores it."""
    gpus: float | None = None
    """GPUs, 0 (the CPU) to 1: a fraction lies in one GPU, which other instances share. None: an equal share of what the
    instances with a number leave, at most one GPU each. Ranks of one instance have whole GPUs (``cluster/gpus.py``)."""
    kv_memory_bytes: int | None = None
    """None: on the CPU 20 % of free memory / ranks on the host, at most 4 GiB; on a GPU 90 % of its share less what
    model and buffers take."""
    block_size: int | None = None
    """Tokens per KV block; None: 32 on the CPU, 64 on a GPU."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    """Token budget of one engine step."""
    max_queued_tokens: int | None = None
    """Prompt tokens an instance queues before it answers BUSY; None: twice the step budget."""
    step_time: StepTime = field(default_factory=StepTime)
    """What a step takes, to scale by until one is fitted; not known: a guess from the batch limits."""

    @property
    def parallel(self) -> ParallelPlan:
        return ParallelPlan(tp=self.tensor_parallel_size, pp=self.pipeline_parallel_size)

    @property
    def cut(self) -> str:
        """How an instance is cut into ranks, their GPUs included. Where both roles' are the same, one turns in place; else the
        turn is a rebuild."""
        return str(self.parallel) + (f", {float(self.gpus)!r} GPUs each" if self.gpus is not None else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Everything `biphase serve` needs to know."""

    model: str
    load_format: LoadFormat = "auto"
    """``dummy``: random weights of the model's configuration; its tokenizer is the real one."""
    device: Device = "auto"
    """auto: a GPU where there is one."""
    dtype: Dtype = "auto"
    """Of weights and activations; auto: float32 on the CPU, bfloat16 on a GPU."""
    kv_dtype: KvDtype = "auto"
    """Of the KV cache; auto: as ``dtype``."""
    name: str = "biphase"
    served_model_name: str = ""
    mode: Mode = "auto"
    backend: BackendName = "ray"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    prefill: RolePlan = field(default_factory=RolePlan)
    decode: RolePlan = field(default_factory=RolePlan)
    max_model_len: int | None = None
    """Prompt and output together, in tokens; None: the model's own limit."""
    weights_cache: str | None = None
    kv_transport: KvTransport = "auto"
    """What KV moves by between instances; auto: the fastest that both ends share."""
    kv_codec: KvCodec = "raw"
    """How KV is packed on its way; auto: by measured bandwidth and codec times, per transfer."""
    kv_overlap: bool = True
    """A prompt's KV leaves while later chunks and layers are computed; False: when all is, for measuring."""
    inject_faults: str = ""
    """Faults that sending ends of KV make on purpose, for drills (``kvtransfer/faults.py``); empty: none."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """What a client may ask for and how much may wait."""
    drain_s: float = 30.0
    """How long a stop waits for running requests."""
    start_timeout_s: float = 600.0
    """An instance that is not ready by then is started again."""
    flip_grace_s: float = 30.0
    """How long what runs on an instance has to end before it turns, or stops by the policy's or a person's wish."""
    replace_after_s: float = 30.0
    """An instance that is out for being slow, or a router that is silent, for so long is killed and replaced."""
    max_replays: int = 3
    """A request that went down with more instances than this ends INTERNAL, and is logged as suspect."""
    controller_port: int = 0
    """Where the controller listens for `biphase` from other hosts; 0: any free one. On loopback but for clusters."""
    routers: tuple[RouterPlace, ...] = ()
    """As the file names them; empty: one on the head at ``host`` and ``port``."""
    placement: Placement = "pack"
    """Where instances go on several hosts. pack: on as few as there is room on; spread: prefill and decode on different
    ones, each role on many; near: prefill and decode side by side. Where that leaves no room, anywhere."""
    autoscale: str = ""
    """The policy file, or, beginning with a brace, the policy itself as JSON; empty: counts change by hand alone."""

    def plan(self, role: Role) -> RolePlan:
        return self.prefill if role == "prefill" else self.decode

    def device_of(self, role: Role) -> Device:
        """A plan that says how many GPUs means it: without one an instance does not start, instead of computing elsewhere."""
        gpus = self.plan(role).gpus
        if gpus is None:
            return self.device
        return "cuda" if gpus else "cpu"

    @property
    def turns_in_place(self) -> bool:
        """Whether an instance takes the other role with its weights loaded; else it is rebuilt."""
        return self.prefill.cut == self.decode.cut

    @property
    def router_places(self) -> tuple[RouterPlace, ...]:
        """Of all routers, at least one."""
        return places_of(self.routers, self.host, self.port)

    def router_place(self, name: str) -> RouterPlace:
        return next(place for place in self.router_places if place.name == name)

    @property
    def num_ranks(self) -> int:
        """Of all instances."""
        return sum(plan.replicas * plan.parallel.num_ranks for plan in (self.prefill, self.decode))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Deployment":
        """The inverse of to_json; raises ValueError, KeyError or TypeError for anything else."""
        values: dict[str, Any] = json.loads(text)
        return Deployment(
            **{
                **values,
                "prefill": _plan_from(values["prefill"]),
                "decode": _plan_from(values["decode"]),
                "limits": RequestLimits(**values["limits"]),
                "routers": tuple(RouterPlace(**place) for place in values.get("routers", ())),
            }
        )


def _plan_from(values: dict[str, Any]) -> RolePlan:
    return RolePlan(**{**values, "step_time": StepTime(**values.get("step_time", {}))})
