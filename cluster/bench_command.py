"""`biphase bench`: finds the deployment, leaves the load to the client's own generator."""

import argparse
import os

from biphase.client.bench.command import bench
from biphase.client.bench.settings import settings_of
from biphase.client.requests import DEFAULT_ADDRESS, resolve_addresses
from biphase.cluster.run_dir import served
from biphase.cluster.status_command import chosen
from biphase.protos.errors import SetupError


def run_bench(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 when an answer was wrong or no request was done."""
    return bench(settings_of(arguments, _addresses(arguments)))


def _addresses(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The routers meant: given, else of the environment, else of the deployment that runs here."""
    given = ",".join(arguments.address or ())
    if not given and arguments.name is None:
        given = os.environ.get("BIPHASE_ADDRESS") or (DEFAULT_ADDRESS if not served() else "")
    if not given:
        _, record = chosen(arguments.name)
        if not record.router_address:
            raise SetupError(f"deployment {record.name} is not ready yet ({record.state})")
        given = record.router_address
    return resolve_addresses(given)
