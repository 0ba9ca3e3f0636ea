"""On a child's PYTHONPATH: instances and router without a model, so that cluster tests start in a second.

They are real processes that speak the real link and membership protocols; only the engine is missing. Python imports a
module of this name at start-up; it answers imports of the services with the light ones.
"""

import importlib.abc
import importlib.util
import sys

_LIGHT = {
    "biphase.prefill_worker.serve": "light_worker",
    "biphase.decode_worker.serve": "light_worker",
    "biphase.router.serve": "light_router",
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
        light = _LIGHT.get(fullname)
        if light is None:
            return None
        found = importlib.util.find_spec(light)
        assert found is not None and found.origin is not None
        return importlib.util.spec_from_file_location(fullname, found.origin)


sys.meta_path.insert(0, _Finder())
