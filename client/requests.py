"""From a call's arguments to the request message. Checks only what the message cannot hold; the router judges the rest."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from biphase.protos import router_pb2
from biphase.protos.errors import InvalidRequest

DEFAULT_ADDRESS = "127.0.0.1:8700"


class Options(TypedDict, total=False):
    """The keyword arguments of ``generate`` besides the prompt. One that is absent or None takes the model's default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int | None
    ignore_eos: bool
    request_id: str
    model: str


def resolve_addresses(address: str | Sequence[str] | None) -> tuple[str, ...]:
    """``address``, else BIPHASE_ADDRESS, else 127.0.0.1:8700: one, a sequence, or several with commas between them.

    Raises InvalidRequest for one that names no port.
    """
    chosen = address or os.environ.get("BIPHASE_ADDRESS") or DEFAULT_ADDRESS
    named = chosen.split(",") if isinstance(chosen, str) else list(chosen)
    return tuple(dict.fromkeys(resolve_address(one.strip()) for one in named))


def resolve_address(address: str) -> str:
    """The one address, as it is. Raises InvalidRequest when it names no port."""
    scheme, separator, rest = address.partition("://")
    if separator:
        raise InvalidRequest(f"address {address!r} is not HOST:PORT: give it without {scheme}://, as in {rest!r}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidRequest(f"address {address!r} is not HOST:PORT with a port of 1 to 65535")
    return address


def generate_request(
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    options: Options,
) -> router_pb2.GenerateRequest:
    """The message of one call. Raises InvalidRequest naming the argument that the message cannot hold."""
    given = [name for name, value in _named(prompt, messages, token_ids) if value is not None]
    if len(given) != 1:
        raise InvalidRequest(f"give exactly one of prompt, messages, token_ids (given: {', '.join(given) or 'none'})")
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise InvalidRequest(f"unknown argument {unknown[0]!r}; known: {', '.join(sorted(Options.__annotations__))}")
    request = router_pb2.GenerateRequest()
    _put(request, "request_id", options.get("request_id") or "")
    _put(request, "model", options.get("model") or "")
    if prompt is not None:
        _put(request, "text", prompt, called="prompt")
    elif messages is not None:
        request.chat.SetInParent()
        _check_sequence("messages", messages)
        for index, message in enumerate(messages):
            _add_message(request.chat, index, message)
    elif token_ids is not None:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, "token_ids", token_ids)
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens"):
        value = options.get(name)
        if value is not None:
            _put(request.sampling, name, value)
    _put(request.sampling, "ignore_eos", bool(options.get("ignore_eos")))
    stop = options.get("stop") or ()
    _extend(request.sampling.stop, "stop", (stop,) if isinstance(stop, str) else stop)
    _extend(request.sampling.stop_token_ids, "stop_token_ids", options.get("stop_token_ids") or ())
    return request


def _named(prompt: object, messages: object, token_ids: object) -> tuple[tuple[str, object], ...]:
    return (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))


def _add_message(chat: router_pb2.Chat, index: int, message: Mapping[str, str]) -> None:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"messages[{index}] is of the wrong type {type(message).__name__}, not a mapping")
    if set(message) != {"role", "content"}:
        raise InvalidRequest(f"messages[{index}] has the keys {sorted(message)}, not role and content")
    target = chat.messages.add()
    _put(target, "role", message["role"])
    _put(target, "content", message["content"])


def _put(message: object, name: str, value: object, called: str = "") -> None:
    """Set a field; protobuf's own complaint (wrong type, out of range, no valid UTF-8) becomes InvalidRequest."""
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(_complaint(called or name, value, error)) from None


def _extend(field: object, name: str, values: Sequence[object]) -> None:
    _check_sequence(name, values)
    for index, value in enumerate(values):
        try:
            field.append(value)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise InvalidRequest(_complaint(f"{name}[{index}]", value, error)) from None


def _check_sequence(name: str, values: object) -> None:
    """A text is a sequence as well, of its characters, which nobody means."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InvalidRequest(f"{name} is of the wrong type {type(values).__name__}, a sequence is needed")


def _complaint(name: str, value: object, error: Exception) -> str:
    if isinstance(error, TypeError):
        return f"{name} is {value!r}, of the wrong type {type(value).__name__}"
    if isinstance(value, str):  # text may be private and long; its fault is said without quoting it
        return f"{name} is no valid text: it holds a lone surrogate, which UTF-8 cannot carry"
    return f"{name} is {value!r}, outside the range of its field"
