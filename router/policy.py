"""Placement decisions. Pure: no clock, no network, no torch.

Least loaded first, by name among equals. A prompt goes to a prefill instance only when a decode instance has room for
it beyond what is promised, so that finished prompts do not pile up where nobody can take them.
"""

from collections.abc import Set as AbstractSet
from dataclasses import replace

from biphase.router.view import (
    ClusterView,
    Disaggregated,
    InstanceKey,
    InstanceView,
    Local,
    Pair,
    Placement,
    PlaceRequest,
    Refuse,
    Rules,
    Wait,
)

DEADLINE_MARGIN_S = 0.1
"""A request that waits for a decode instance is refused this long before its deadline, so that its client hears why."""


def place(request: PlaceRequest, view: ClusterView, rules: Rules, *, off: AbstractSet[str] = frozenset()) -> Placement:
    """Where ``request`` goes now. Generations of the weights never mix: prefill and decode are of one. ``off``: those that
    somebody waits for who came before it and can go to no other."""
    if request.generation is not None:
        if request.generation in off:
            return Wait(reason="replay_first", alone=True)
        if _generation_gone(request, view):
            return _without_generation(request, view, rules)
        way = _place_within(request, view.of_generation(request.generation), rules)
        if isinstance(way, Wait) and len(view.generations) > 1:  # who may go to another generation need not wait for it
            return replace(way, alone=True)
        return way
    generations = view.generations
    if len(generations) <= 1:
        return _place_within(request, view, rules)
    ways = [_place_within(request, view.of_generation(one), rules) for one in generations if one not in off]
    best = min(ways, key=lambda way: _preference(way, view), default=None)
    if off.isdisjoint(generations) and best is not None:
        return best
    if isinstance(best, Disaggregated | Local):
        return best
    return Wait(reason="replay_first", until_s=best.until_s if isinstance(best, Wait) else None)


def _preference(way: Placement, view: ClusterView) -> tuple[int, float, str]:
    """Among generations: both phases before one, the least loaded first; a wait that is over sooner, a refusal last."""
    match way:
        case Disaggregated():
            chosen = next(one for one in view.instances if one.key == way.prefill)
            return 0, chosen.queued_tokens, chosen.key
        case Local():
            chosen = next(one for one in view.instances if one.key == way.decode)
            return 1, chosen.requests, chosen.key
        case Wait():
            return 2, float("inf") if way.until_s is None else way.until_s, way.reason
    return 3, 0.0, way.reason


def _place_within(request: PlaceRequest, view: ClusterView, rules: Rules) -> Placement:
    """Where it goes among instances of one generation."""
    prefills = [instance for instance in view.of_role("prefill") if instance.takes_work]
    if rules.colocated and not prefills:
        return _place_local(request, view, rules, reason="colocated")
    if rules.mode == "auto" and request.prompt_tokens <= rules.local_prefill_max_tokens:
        return _place_local(request, view, rules, reason="short_prompt")
    if not prefills:
        return _without_prefill(request, view, rules)
    if request.max_tokens > 1 and not _fitting(request, view):
        return _without_decode(request, view, rules)
    prefills.sort(key=lambda instance: (instance.queued_tokens, instance.requests, instance.key))
    busy = False
    for prefill in prefills:
        decode = choose_decode(request, view, prefill.key) if request.max_tokens > 1 else None
        if decode is None and request.max_tokens > 1:
            continue  # none with room that it reaches
        if _takes_prompt(prefill, request.prompt_tokens):
            return Disaggregated(prefill=prefill.key, decode=decode, reason="prefill_ready")
        busy = True
    if busy:
        return Wait(reason="prefill_busy")
    if rules.mode == "auto":
        return _place_local(request, view, rules, reason="no_pair")
    return _without_pair(request, view, rules)


def choose_decode(request: PlaceRequest, view: ClusterView, prefill: InstanceKey | None = None) -> InstanceKey | None:
    """The least loaded decode instance with room for the prompt, and in reach of ``prefill``; None while there is none."""
    if request.generation is not None:
        view = view.of_generation(request.generation)
    fitting = _fitting(request, view)
    if prefill is not None and view.broken:
        fitting = [one for one in fitting if Pair(prefill=prefill, decode=one.key) not in view.broken]
    if not fitting:
        return None
    return min(fitting, key=lambda instance: (instance.requests, -instance.room_blocks, instance.key)).key


def _fitting(request: PlaceRequest, view: ClusterView) -> list[InstanceView]:
    return [instance for instance in view.of_role("decode") if has_room(instance, request.prompt_tokens)]


def has_room(instance: InstanceView, prompt_tokens: int) -> bool:
    """Whether a decode instance can take a prompt now. An empty one always can: a lone request ignores watermarks."""
    if not instance.takes_work or instance.full:
        return False
    if instance.requests == 0:
        return True
    if instance.max_num_seqs and instance.requests >= instance.max_num_seqs:
        return False
    return instance.room_blocks >= instance.blocks_for(prompt_tokens + 1)


def wait_for_decode(
    request: PlaceRequest, view: ClusterView, rules: Rules, prefill: InstanceKey | None = None
) -> Wait | Refuse:
    """The answer for a request with a ticket of ``prefill`` that no decode instance takes now."""
    if request.generation is not None:
        if _generation_gone(request, view):
            return _without_generation(request, view, rules)
        view = view.of_generation(request.generation)
    if in_reach(request, view, prefill):
        return Wait(reason="decode_busy", until_s=view.retry_s)
    if _fitting(request, view):
        return _without_pair(request, view, rules)
    return _without_decode(request, view, rules)


def in_reach(request: PlaceRequest, view: ClusterView, prefill: InstanceKey | None) -> list[InstanceView]:
    """Decode instances that could pull what ``prefill`` has of the request, those without room now too."""
    if request.generation is not None:
        view = view.of_generation(request.generation)
    takers = [one for one in view.of_role("decode") if one.takes_work]
    if prefill is None:
        return takers
    return [one for one in takers if Pair(prefill=prefill, decode=one.key) not in view.broken]


def _takes_prompt(instance: InstanceView, prompt_tokens: int) -> bool:
    if instance.full:
        return False
    if instance.queued_tokens == 0 or instance.max_queued_tokens == 0:
        return True
    return instance.queued_tokens + prompt_tokens <= instance.max_queued_tokens


def _place_local(request: PlaceRequest, view: ClusterView, rules: Rules, reason: str) -> Placement:
    decode = choose_decode(request, view)
    return _without_decode(request, view, rules) if decode is None else Local(decode=decode, reason=reason)


def _without_prefill(request: PlaceRequest, view: ClusterView, rules: Rules) -> Placement:
    """No prefill instance takes work: local in mode auto, at most a short wait in mode strict."""
    connecting = [
        instance.since_s + rules.no_prefill_s
        for instance in view.of_role("prefill")
        if instance.state == "connecting" and view.now_s < instance.since_s + rules.no_prefill_s
    ]
    if connecting:
        return Wait(reason="prefill_connecting", until_s=min(connecting))
    if rules.mode == "auto":
        return _place_local(request, view, rules, reason="no_prefill_alive")
    if any(instance.state == "ready" for instance in view.of_role("prefill")):
        since_s = request.arrived_s  # all that are there are draining
    else:  # of another generation there may be some
        since_s = view.no_prefill_since_s if view.no_prefill_since_s is not None else request.arrived_s
    until_s = since_s + rules.no_prefill_s
    if view.now_s < until_s:
        return Wait(reason="no_prefill_alive", until_s=until_s)
    detail = f"no prefill instance has been ready for {view.now_s - since_s:.1f} s ({_known(view, 'prefill')}), and mode is strict"
    return Refuse(reason="no_prefill_alive", detail=detail)


def _without_decode(request: PlaceRequest, view: ClusterView, rules: Rules) -> Wait | Refuse:
    """No decode instance takes it: wait while one is ready or, for a bounded time, while one may come."""
    if any(instance.takes_work for instance in view.of_role("decode")):
        return Wait(reason="decode_busy")
    # an instance that is known but away may be back soon, and a replay's client is in mid-sentence; else a late request
    # waits no longer than the first one did
    since_s = view.no_decode_since_s
    if since_s is None or view.of_role("decode") or request.is_replay:
        since_s = max(request.arrived_s, since_s or 0.0)
    detail = f"({_known(view, 'decode')})"
    return _wait_until(request, view, rules, reason="no_decode_alive", since_s=since_s, detail=detail)


def _without_pair(request: PlaceRequest, view: ClusterView, rules: Rules) -> Wait | Refuse:
    """Both are there, but KV does not come through: wait until a pair may be tried again."""
    pairs = ", ".join(sorted(f"{pair.prefill}-{pair.decode}" for pair in view.broken))
    detail = f"that a prefill instance with room reaches ({pairs} broken)"
    answer = _wait_until(request, view, rules, reason="no_pair", since_s=request.arrived_s, detail=detail)
    if isinstance(answer, Wait) and view.retry_s is not None:
        return replace(answer, until_s=min(view.retry_s, answer.until_s or view.retry_s))
    return answer


def _wait_until(
    request: PlaceRequest, view: ClusterView, rules: Rules, *, reason: str, since_s: float, detail: str
) -> Wait | Refuse:
    """No decode instance: wait up to the deadline, and without one up to no_decode_s from ``since_s``."""
    until_s = since_s + rules.no_decode_s
    if request.deadline_s is not None:
        until_s = request.deadline_s - DEADLINE_MARGIN_S
    if view.now_s < until_s:
        return Wait(reason=reason, until_s=until_s)
    away_s = view.no_decode_since_s if view.no_decode_since_s is not None else request.arrived_s
    return Refuse(reason=reason, detail=f"no decode instance has been ready for {view.now_s - away_s:.1f} s {detail}")


def _generation_gone(request: PlaceRequest, view: ClusterView) -> bool:
    """Whether what it began on is being replaced: nothing of it is left to decode on, but there is of another."""
    decodes = [instance for instance in view.of_role("decode") if not instance.draining]
    others = [instance.generation != request.generation for instance in decodes]
    return bool(others) and all(others)


def _without_generation(request: PlaceRequest, view: ClusterView, rules: Rules) -> Wait | Refuse:
    until_s = request.arrived_s + rules.no_generation_s
    if view.now_s < until_s:
        return Wait(reason="no_generation", until_s=until_s, alone=True)
    there = ", ".join(repr(generation) for generation in view.generations)
    detail = f"it began on generation {request.generation!r}, of which no decode instance is left (there is {there})"
    return Refuse(reason="no_generation", detail=detail, aborted=True)


def _known(view: ClusterView, role: str) -> str:
    names = [f"{instance.key} {instance.state}" for instance in view.instances if instance.role == role]
    return ", ".join(names) if names else "none is known"
