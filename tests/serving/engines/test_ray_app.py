import importlib
import socket
from pathlib import Path

import httpx
import pytest
import yaml

pytest.importorskip("ray.serve", exc_type=ImportError)

from ray import serve

from qzoom.cli.engines import ray_app
from qzoom.cluster import ray_running
from qzoom.errors import ConfigError
from tests.serving.running import chat

FILE = Path(__file__).parents[3] / "deploy" / "ray-serve.yaml"


@pytest.mark.slow
def test_the_file_names_an_application_that_answers():
    values = yaml.safe_load(FILE.read_text())["applications"][0]
    module, _, name = values["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    with socket.socket() as held, ray_running(cpus=3):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxy does; nobody else gets the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(values["args"] | {"device": "cpu"}), name=values["name"], route_prefix=values["route_prefix"])
        url = f"http://127.0.0.1:{port}"
        assert set(serve.status().applications["qzoom"].deployments) == {d["name"] for d in values["deployments"]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=chat(), timeout=120)
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["message"]["content"]
        streamed = httpx.post(f"{url}/v1/chat/completions", json=chat(stream=True), timeout=120).text
        assert streamed.rstrip().endswith("data: [DONE]")
        assert httpx.post(f"{url}/v1/chat/completions", json=chat(model="other")).status_code == 404
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_an_unknown_argument_of_the_file_is_one_sentence():
    with pytest.raises(ConfigError, match="unknown 'modell'; did you mean 'model'"):
        ray_app({"modell": "tiny"})
