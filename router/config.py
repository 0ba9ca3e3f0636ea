"""Everything a router can be told. Defaults live here once; the command line and a deployment file read them."""

import math
from dataclasses import dataclass, field, fields

from biphase.protos.errors import SetupError
from biphase.protos.grpc_setup import MAX_CONTROL_MESSAGE_BYTES
from biphase.protos.values import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What a client may ask for and how much may wait. Beyond a limit a request is refused with the value and it."""

    max_queued_requests: int = 1024
    """Requests that wait for an instance."""
    max_queued_tokens: int = 1 << 20
    """Their prompt tokens together; a single longer prompt is still taken when nothing else waits."""
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    """Characters of one stop string."""
    max_stop_token_ids: int = 256
    default_max_tokens: int = 256
    """When the client names none; less where the context leaves less."""
    max_request_id_chars: int = 128
    max_message_bytes: int = MAX_CONTROL_MESSAGE_BYTES
    write_timeout_s: float = 30.0
    """A client that takes nothing for this long is cut."""
    max_buffered_tokens: int = 8192
    """Output tokens that may wait for a slow client; beyond it is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """How long the router waits for what, in seconds."""

    no_prefill_s: float = 3.0
    """Mode strict: how long no prefill instance may be there before requests end UNAVAILABLE. In both modes: how long
    a prefill instance that has just become known may take to connect before it counts as away."""
    no_decode_s: float = 30.0
    """How long a request without a deadline waits while no decode instance is there."""
    no_generation_s: float = 3.0
    """How long a request that has begun on weights of which nothing is left waits before it ends ABORTED."""
    welcome_s: float = 5.0
    """From opening a link to the instance's Welcome."""
    silence_s: float = 60.0
    """An instance that owes a request its next token and sends nothing at all for this long is given up."""
    leg_end_s: float = 10.0
    """From cancelling a leg to the instance's LegEnded; after it the leg is forgotten and logged."""
    stats_s: float = 0.1
    """How long the last reply of a finished request waits for the instances' figures."""
    drain_s: float = 20.0
    """How long live requests may go on after a stop was asked for."""
    busy_retry_s: float = 0.5
    """After a refusal the instance is asked again when its load falls, at the latest after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """One router. Members come from the controller when ``controller`` is set, else from the static addresses."""

    name: str = "router-0"
    incarnation: int = 1
    host: str = "127.0.0.1"
    advertise_host: str = ""
    """Under which address others reach it; default: host."""
    port: int = 0
    """0: any free one."""
    model: str
    """Where the tokenizer comes from: GGUF file, Hugging Face directory, or hub name."""
    served_model_name: str = ""
    """Default: what the instances call the model."""
    mode: Mode = "auto"
    """auto: a decode instance prefills by itself while no prefill instance is there; strict: never."""
    controller: str = ""
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    colocated: bool | None = None
    """Whether this deployment has no prefill instance by design, so that decode instances prefill in every mode. None:
    with static members, when ``prefill`` is empty; with a controller, no."""
    local_prefill_max_tokens: int = 0
    """Mode auto: prompts of at most this many tokens are prefilled by the decode instance."""
    max_replays: int = 3
    """A request that went down with more instances than this ends INTERNAL, and is logged as suspect."""
    replay_share: float = 0.5
    """Of what the prefilling instances queue, in tokens: how much may be prompts that are prefilled again."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    waits: Waits = field(default_factory=Waits)
    log_file: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "strict"):
            raise SetupError(f"mode is {self.mode!r}; it is one of auto, strict")
        if not 0 <= self.port <= 65535:
            raise SetupError(f"port is {self.port}; it is within 0..65535")
        if bool(self.controller) == bool(self.prefill or self.decode):
            raise SetupError("a router takes either a controller's address or those of static instances")
        if not self.controller and not self.decode:
            raise SetupError("a router with static instances needs at least one decode instance")
        if self.local_prefill_max_tokens < 0:
            raise SetupError(f"local_prefill_max_tokens is {self.local_prefill_max_tokens}; at least 0")
        if self.max_replays < 0:
            raise SetupError(f"max_replays is {self.max_replays}; at least 0")
        if not 0 < self.replay_share <= 1:
            raise SetupError(f"replay_share is {self.replay_share:g}; above 0 and at most 1")
        for part in (self.limits, self.waits):
            for item in fields(part):
                value = getattr(part, item.name)
                if not (math.isfinite(value) and value > 0):
                    raise SetupError(f"{item.name} is {value}; it is above 0")

    @property
    def is_colocated(self) -> bool:
        if self.colocated is None:
            return not self.controller and not self.prefill
        return self.colocated
