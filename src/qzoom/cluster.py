"""Ray, started for one job unless it runs already; it reports nowhere and shows no dashboard."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

from qzoom.errors import ConfigError, StopRunError

Part = Literal["data", "serve"]
"""A library of Ray, which `ray` itself does not import."""


def start_ray(part: Part, address: str = "", cpus: int = 1, advice: str = "") -> tuple[Any, bool]:
    """The `ray` module, connected, and whether Ray was started or joined here (then shut it down).

    Args:
        part: what the caller uses of Ray; the other one, whose import takes long, stays unread.
        address: of a running cluster, or "auto" for this machine's; empty starts Ray here.
        cpus: processors that a Ray started here may use.
        advice: added to the error when Ray is not installed, e.g. what to use instead.

    Raises:
        ConfigError: Ray is not installed, or its cluster cannot be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray

        import_module(f"ray.{part}")
    except ImportError as error:
        raise ConfigError(f"This needs Ray: pip install 'qzoom[ray]'{advice}.") from error
    own = not ray.is_initialized()
    if own:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        options |= {"address": address} if address else {"include_dashboard": False, "num_cpus": cpus}
        try:
            ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray did not start ({' '.join(str(error).split())[:200]}).") from error
    return ray, own


@contextmanager
def ray_running(part: Part, address: str = "", cpus: int = 1, advice: str = "") -> Iterator[Any]:
    """The `ray` module, connected until the block ends; arguments and errors as in `start_ray` (StopRunError: Ray gave
    a task of the block up, for example since its process had no memory left)."""
    ray, own = start_ray(part, address, cpus, advice)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        last = next(filter(None, reversed(str(error).splitlines())), type(error).__name__).strip()[:300].rstrip(".")
        raise StopRunError(f"Ray gave the run up ({last}); its log says more.") from error
    finally:
        if own:
            ray.shutdown()


def ray_data(ray: Any, items: list[Any], blocks: int) -> Any:
    """A quiet dataset of items that keeps their order. `blocks`: most pieces that are worked on and returned as
    wholes."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_items(items, override_num_blocks=max(1, min(len(items), blocks)))
