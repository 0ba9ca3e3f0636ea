"""Placement decisions. Pure: no clock, no network, no torch.

Least loaded first, by name among equals. A prompt goes to a prefill instance only when a decode instance has room for
it beyond what is promised, so that finished prompts do not pile up where nobody can take them.
"""

from biphase.router.view import (
    ClusterView,
    Disaggregated,
    InstanceKey,
    InstanceView,
    Local,
    Placement,
    PlaceRequest,
    Refuse,
    Rules,
    Wait,
)


def place(request: PlaceRequest, view: ClusterView, rules: Rules) -> Placement:
    """Where ``request`` goes now."""
    if rules.colocated:
        return _place_local(request, view, rules, reason="colocated")
    if rules.mode == "auto" and request.prompt_tokens <= rules.local_prefill_max_tokens:
        return _place_local(request, view, rules, reason="short_prompt")
    prefills = [instance for instance in view.of_role("prefill") if instance.takes_work]
    if not prefills:
        return _without_prefill(request, view, rules)
    decode: InstanceKey | None = None
    if request.max_tokens > 1:
        chosen = choose_decode(request, view)
        if chosen is None:
            return _without_decode(request, view, rules)
        decode = chosen
    open_ones = [instance for instance in prefills if _takes_prompt(instance, request.prompt_tokens)]
    if not open_ones:
        return Wait(reason="prefill_busy")
    best = min(open_ones, key=lambda instance: (instance.queued_tokens, instance.requests, instance.key))
    return Disaggregated(prefill=best.key, decode=decode, reason="prefill_ready")


def choose_decode(request: PlaceRequest, view: ClusterView) -> InstanceKey | None:
    """The least loaded decode instance with room for the prompt, or None while there is none."""
    fitting = [instance for instance in view.of_role("decode") if has_room(instance, request.prompt_tokens)]
    if not fitting:
        return None
    return min(fitting, key=lambda instance: (instance.requests, -instance.room_blocks, instance.key)).key


def has_room(instance: InstanceView, prompt_tokens: int) -> bool:
    """Whether a decode instance can take a prompt now. An empty one always can: a lone request ignores watermarks."""
    if not instance.takes_work or instance.full:
        return False
    if instance.requests == 0:
        return True
    if instance.max_num_seqs and instance.requests >= instance.max_num_seqs:
        return False
    return instance.room_blocks >= instance.blocks_for(prompt_tokens + 1)


def wait_for_decode(request: PlaceRequest, view: ClusterView, rules: Rules) -> Wait | Refuse:
    """The answer for a request that no decode instance takes now."""
    return _without_decode(request, view, rules)


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
    else:
        since_s = view.no_prefill_since_s if view.no_prefill_since_s is not None else view.now_s
    until_s = since_s + rules.no_prefill_s
    if view.now_s < until_s:
        return Wait(reason="no_prefill_alive", until_s=until_s)
    detail = f"no prefill instance has been ready for {view.now_s - since_s:.1f} s ({_known(view, 'prefill')}), and mode is strict"
    return Refuse(reason="no_prefill_alive", detail=detail)


def _without_decode(request: PlaceRequest, view: ClusterView, rules: Rules) -> Wait | Refuse:
    """No decode instance takes it: wait while one is ready or, for a bounded time, while one may come."""
    if view.no_decode_since_s is None:
        return Wait(reason="decode_busy")
    known = bool(view.of_role("decode"))
    if known and request.has_deadline:
        return Wait(reason="no_decode_alive")
    # an instance that is known but away may be back soon; where none is known, a late request waits no longer than
    # the first one did
    since_s = max(request.arrived_s, view.no_decode_since_s) if known else view.no_decode_since_s
    until_s = since_s + rules.no_decode_s
    if view.now_s < until_s:
        return Wait(reason="no_decode_alive", until_s=until_s)
    waited_s = view.now_s - view.no_decode_since_s
    return Refuse(
        reason="no_decode_alive",
        detail=f"no decode instance has been ready for {waited_s:.1f} s ({_known(view, 'decode')})",
    )


def _known(view: ClusterView, role: str) -> str:
    names = [f"{instance.key} {instance.state}" for instance in view.instances if instance.role == role]
    return ", ".join(names) if names else "none is known"
