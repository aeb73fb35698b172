import pytest

from qzoom.cluster import ray_running
from qzoom.errors import StopRunError


def test_what_ray_gives_up_is_one_sentence(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    sentence = r"Ray gave the run up \(The actor experienced an error before finishing this task\); its log says more\."
    with pytest.raises(StopRunError, match=sentence), ray_running("data"):
        raise ray.exceptions.RayActorError
