"""What a client may ask for, and what it means once defaults are filled in. Pure.

Every refusal is an InvalidRequest (or UnknownModel) with one line that names the value and the limit, and no prompt
text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from biphase.protos.errors import InvalidRequest, UnknownModel
from biphase.protos.values import Sampling
from biphase.router.config import RequestLimits

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSampling:
    """Sampling as the client gave it; None where it gave nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as the client sent it."""

    request_id: str = ""
    model: str = ""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[tuple[str, str], ...] | None = None
    sampling: AskedSampling = field(default_factory=AskedSampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the deployment can hold: the shortest context and the largest empty instance that are known."""

    vocab_size: int
    max_model_len: int
    num_blocks: int | None = None
    """Of the largest decode instance; None while none is known."""
    block_size: int = 1

    @property
    def max_output_tokens(self) -> int:
        """The longest output there can be, after a prompt of one token."""
        if self.num_blocks is None:
            return self.max_model_len
        return min(self.max_model_len, self.num_blocks * self.block_size)


def check_asked(asked: Asked, *, served_name: str, limits: RequestLimits, has_chat_template: bool) -> None:
    """Everything that can be told before the prompt is tokenized."""
    if asked.model not in ("", served_name):
        raise UnknownModel(f"model {_short(asked.model)} is not served here; {served_name!r} is")
    if len(asked.request_id) > limits.max_request_id_chars:
        raise InvalidRequest(
            f"request_id has {len(asked.request_id)} characters, the limit is {limits.max_request_id_chars}"
        )
    if not asked.request_id.isprintable():
        raise InvalidRequest("request_id has characters that cannot be printed")
    if asked.text is None and asked.token_ids is None and asked.chat is None:
        raise InvalidRequest("no prompt was given; one of text, token_ids, chat is needed")
    if asked.text == "":
        raise InvalidRequest("the prompt's text is empty, at least 1 token is needed")
    if asked.token_ids is not None and not asked.token_ids:
        raise InvalidRequest("the prompt has 0 token ids, at least 1 is needed")
    if asked.chat is not None:
        _check_chat(asked.chat, has_chat_template)
    _check_sampling(asked.sampling)
    _check_stops(asked.sampling.stop, limits)


def _check_chat(chat: Sequence[tuple[str, str]], has_chat_template: bool) -> None:
    if not has_chat_template:
        raise InvalidRequest("chat messages were given, but the model has no chat template; send text or token ids")
    if not chat:
        raise InvalidRequest("the chat has 0 messages, at least 1 is needed")
    for index, (role, _) in enumerate(chat):
        if not role:
            raise InvalidRequest(f"chat message {index} has an empty role; system, user and assistant are common ones")


def _check_sampling(sampling: AskedSampling) -> None:
    _check_range("temperature", sampling.temperature, low=0.0)
    _check_range("top_p", sampling.top_p, low=0.0, high=1.0, above_low=True)
    _check_range("min_p", sampling.min_p, low=0.0, high=1.0)
    if sampling.top_k is not None and sampling.top_k < 0:
        raise InvalidRequest(f"top_k is {sampling.top_k}, at least 0 (off) is needed")
    if sampling.max_tokens is not None and sampling.max_tokens <= 0:
        raise InvalidRequest(f"max_tokens is {sampling.max_tokens}, at least 1 is needed")
    if sampling.min_tokens is not None and sampling.min_tokens < 0:
        raise InvalidRequest(f"min_tokens is {sampling.min_tokens}, at least 0 is needed")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise InvalidRequest(f"seed is {sampling.seed}, it is within 0..{MAX_SEED}")
    if (
        sampling.min_tokens is not None
        and sampling.max_tokens is not None
        and sampling.min_tokens > sampling.max_tokens
    ):
        raise InvalidRequest(f"min_tokens is {sampling.min_tokens}, above max_tokens, which is {sampling.max_tokens}")


def _check_range(
    name: str, value: float | None, *, low: float, high: float = math.inf, above_low: bool = False
) -> None:
    if value is None:
        return
    inside = math.isfinite(value) and low <= value <= high and not (above_low and value == low)
    if not inside:
        bounds = (
            f"at least {low:g} and finite"
            if high == math.inf
            else f"within {'(' if above_low else '['}{low:g}, {high:g}]"
        )
        raise InvalidRequest(f"{name} is {value:g}, it has to be {bounds}")


def _check_stops(stops: Sequence[str], limits: RequestLimits) -> None:
    if len(stops) > limits.max_stop_strings:
        raise InvalidRequest(f"{len(stops)} stop strings were given, the limit is {limits.max_stop_strings}")
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop string {index} is empty, at least 1 character is needed")
        if len(stop) > limits.max_stop_chars:
            raise InvalidRequest(
                f"stop string {index} has {len(stop)} characters, the limit is {limits.max_stop_chars}"
            )


def resolve(
    asked: AskedSampling,
    prompt_ids: Sequence[int],
    *,
    capacity: Capacity,
    limits: RequestLimits,
    model_defaults: Mapping[str, float],
    drawn_seed: int,
) -> Sampling:
    """Check the tokenized prompt against what the deployment holds, and fill in what the client left open.

    ``model_defaults`` are the model's own generation defaults; ``drawn_seed`` serves a request that named none.
    """
    num_prompt = len(prompt_ids)
    if num_prompt == 0:
        raise InvalidRequest("the prompt has 0 tokens, at least 1 is needed")
    _check_vocabulary("the prompt's token id", prompt_ids, capacity.vocab_size)
    if len(asked.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            f"{len(asked.stop_token_ids)} stop token ids were given, the limit is {limits.max_stop_token_ids}"
        )
    _check_vocabulary("stop token id", asked.stop_token_ids, capacity.vocab_size)
    if num_prompt > capacity.max_model_len:
        raise InvalidRequest(f"the prompt has {num_prompt} tokens, the context holds {capacity.max_model_len}")
    min_tokens = asked.min_tokens or 0
    max_tokens = asked.max_tokens
    if max_tokens is None:
        left = capacity.max_model_len - num_prompt
        if capacity.num_blocks is not None:
            left = min(left, capacity.num_blocks * capacity.block_size - num_prompt + 1)
        max_tokens = max(1, min(max(limits.default_max_tokens, min_tokens), left))
        if min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {min_tokens}, but the context of {capacity.max_model_len} leaves {max_tokens}"
                f" after {num_prompt} prompt tokens"
            )
    _check_fits(num_prompt, max_tokens, capacity)
    return Sampling(
        temperature=_first(asked.temperature, model_defaults.get("temperature"), 1.0),
        top_k=int(_first(asked.top_k, model_defaults.get("top_k"), 0)),
        top_p=_first(asked.top_p, model_defaults.get("top_p"), 1.0),
        min_p=_first(asked.min_p, model_defaults.get("min_p"), 0.0),
        seed=drawn_seed if asked.seed is None else asked.seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=asked.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(asked.stop_token_ids)),
    )


def _check_vocabulary(what: str, ids: Sequence[int], vocab_size: int) -> None:
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(f"{what} {largest} is outside the vocabulary of {vocab_size}")


def _check_fits(num_prompt: int, max_tokens: int, capacity: Capacity) -> None:
    """The last token is never computed, so a request needs KV of prompt + max_tokens - 1 tokens."""
    needed = num_prompt + max_tokens - 1
    parts = f"prompt + max_tokens - 1 is {num_prompt} + {max_tokens} - 1 = {needed} tokens"
    if needed > capacity.max_model_len:
        raise InvalidRequest(f"{parts}, the context holds {capacity.max_model_len}")
    if capacity.num_blocks is not None:
        blocks = -(-needed // capacity.block_size)
        if blocks > capacity.num_blocks:
            raise InvalidRequest(
                f"{parts} or {blocks} blocks of {capacity.block_size}, the largest instance has {capacity.num_blocks}"
            )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
