"""The gRPC services that any server is expected to have, where their packages are installed: health and reflection.

A worker on a bare GPU machine has neither and works all the same; whoever asks it gets UNIMPLEMENTED.
"""

import logging
from typing import Any

import grpc.aio

_log = logging.getLogger(__name__)


class StandardServices:
    """Adds them to ``server``, beside its own ``service``; call it before the server starts."""

    def __init__(self, server: grpc.aio.Server, service: str) -> None:
        self._service = service
        self._checks: Any = None
        names = [service]
        missing = []
        try:
            from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        except ImportError:
            missing.append("health checks (grpcio-health-checking)")
        else:
            self._checks = health.aio.HealthServicer()
            self._states = health_pb2.HealthCheckResponse
            health_pb2_grpc.add_HealthServicer_to_server(self._checks, server)
            names.append(health.SERVICE_NAME)
        try:
            from grpc_reflection.v1alpha import reflection
        except ImportError:
            missing.append("reflection (grpcio-reflection)")
        else:
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        if missing:
            _log.info("not served, as not installed: %s", ", ".join(missing))

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told from now on."""
        if self._checks is not None:
            state = self._states.SERVING if serving else self._states.NOT_SERVING
            await self._checks.set("", state)
            await self._checks.set(self._service, state)
