"""`biphase update`: bring a running deployment to another deploy file."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from biphase.cluster.controller_call import CONTROLLER_VARIABLE, controller_of
from biphase.cluster.deploy_schema import load_deployment
from biphase.cluster.deployment import Deployment


def update(arguments: argparse.Namespace) -> int:
    """Returns 1 where it was paused."""
    from biphase.protos import controller_pb2

    path = Path(arguments.deploy_file)
    deployment = checked_update(path, load_deployment(path), arguments)
    request = controller_pb2.UpdateRequest(
        deployment=deployment.to_json(),
        dry_run=arguments.dry_run,
        allow_downtime=arguments.allow_downtime,
        grace_s=arguments.grace_s or 0.0,
    )
    done = False
    try:
        with controller_of(arguments) as controller:
            for reply in controller.Update(request, timeout=None):
                print(reply.text, flush=True)
                done = reply.done
    except KeyboardInterrupt:
        print("an update that has begun goes on; `biphase events --follow` shows how", file=sys.stderr)
        raise
    return 0 if done else 1


def checked_update(path: Path, deployment: Deployment, arguments: argparse.Namespace) -> Deployment:
    """The file's deployment as `serve` would take it. What it does not say of the routers stays as it is served here."""
    from biphase.cluster.serve_command import checked
    from biphase.cluster.status_command import chosen
    from biphase.cluster.updating import FIXED

    on_this_host = False
    if not (arguments.controller or os.environ.get(CONTROLLER_VARIABLE)):
        said = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        arguments.name = arguments.name or (deployment.name if "name" in said else None)
        running = chosen(arguments.name)[0].deployment()
        kept = {key: getattr(running, key) for key in FIXED if key not in said}
        deployment = replace(deployment, **kept)
        on_this_host = running.backend == "process"
    return checked(deployment, on_this_host=on_this_host)
