"""How one server behaves: its name, keys, limits and times."""

from __future__ import annotations

from dataclasses import dataclass, field

from qzoom.errors import ConfigError
from qzoom.images.fetch import FetchPolicy
from qzoom.serving.auth import check_keys
from qzoom.serving.limits import ServerLimits
from qzoom.serving.scheduler import SchedulerLimits

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one server.

    Args:
        model_name: what clients call the model.
        api_keys: any of them opens the server; none leaves it open to all.
        limits: what one request may cost.
        scheduler: how many run and wait.
        fetch: which hosts pictures may be fetched from; none by default.
        deadline_s: seconds that one request may take from its first byte to its last.
        drain_s: seconds that running requests get to finish when the server stops.
        beat_s: seconds without a sign of life of the worker after which /ready says no.

    Raises:
        ConfigError: a name or key that cannot be used, or a time that is not above 0.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    deadline_s: float = 120.0
    drain_s: float = 30.0
    beat_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.model_name.strip() or not self.model_name.isprintable():
            raise ConfigError("The served model name must be a printable text that is not empty.")
        check_keys(self.api_keys)
        for name in ("deadline_s", "drain_s", "beat_s"):
            value = getattr(self, name)
            least_ok = value >= 0 if name == "drain_s" else value > 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not least_ok or value > 86_400:
                raise ConfigError(f"{name} must be seconds above 0, at most a day, not {value!r}.")
