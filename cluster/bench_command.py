"""`biphase bench`: finds the deployment, leaves the load to the client's own generator."""

import argparse
import os

from biphase.client.bench.command import bench
from biphase.client.bench.settings import settings_of
from biphase.client.requests import DEFAULT_ADDRESS, resolve_address
from biphase.cluster.run_dir import served
from biphase.cluster.status_command import chosen
from biphase.protos.errors import SetupError


def run_bench(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 when an answer was wrong or no request was done."""
    return bench(settings_of(arguments, _addresses(arguments)))


def _addresses(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The routers meant: given, else of the environment, else of the deployment that runs here."""
    given = arguments.address or ()
    if not given and arguments.name is None:
        given = (os.environ.get("BIPHASE_ADDRESS") or (DEFAULT_ADDRESS if not served() else ""),)
    addresses = [word.strip() for text in given for word in text.split(",") if word.strip()]
    if not addresses:
        _, record = chosen(arguments.name)
        if not record.router_address:
            raise SetupError(f"deployment {record.name} is not ready yet ({record.state})")
        addresses = [record.router_address]
    return tuple(resolve_address(address) for address in addresses)
