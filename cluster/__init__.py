"""Deployments: YAML, backends, controller, the biphase command."""
