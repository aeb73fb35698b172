import asyncio
import importlib
import os
import signal
import socket
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

pytest.importorskip("ray.serve", exc_type=ImportError)

from ray import serve

from qzoom.cli.engines import EngineOptions, ray_app
from qzoom.cli.options import ModelOptions
from qzoom.cluster import ray_running
from qzoom.errors import ConfigError
from qzoom.serving.engines.base import Job
from qzoom.serving.engines.ray import RayEngine, start_replicas
from qzoom.serving.settings import SchedulerLimits, ServerSettings
from qzoom.types import StreamEvent
from tests.serving.engines.simulated import front
from tests.serving.running import Site, chat, data_url, image_part, page, running, user, wait_until

FILE = Path(__file__).parents[3] / "deploy" / "ray-serve.yaml"


@pytest.fixture(scope="module")
def cluster():
    with ray_running("serve", cpus=3) as ray:
        yield ray


@pytest.fixture
def proxy(cluster):
    """The address of Ray Serve's own HTTP server."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxy does; nobody else gets the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


@pytest.fixture(scope="module")
def site(cluster):
    """A front end before two replicas."""
    settings = ServerSettings(model_name="tiny")
    handle = start_replicas(partial(EngineOptions().start, ModelOptions(device="cpu"), settings), settings, 2)
    with running(RayEngine(front(), handle, SchedulerLimits(queue=4))) as running_site:
        yield running_site


def ask(site: Site, *messages: dict[str, object], **more: object) -> httpx.Response:
    return httpx.post(f"{site.url}/v1/chat/completions", json=chat(*messages, **more), timeout=120)


def replicas() -> list[int]:
    """Processes of this test's replicas."""
    processes = psutil.Process().children(recursive=True)
    return [process.pid for process in processes if "ServeReplica" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_the_file_names_an_application_that_answers(proxy):
    values = yaml.safe_load(FILE.read_text())["applications"][0]
    module, _, name = values["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    serve.run(build(values["args"] | {"device": "cpu"}), name=values["name"], route_prefix=values["route_prefix"])
    assert set(serve.status().applications["qzoom"].deployments) == {d["name"] for d in values["deployments"]}
    reply = httpx.post(f"{proxy}/v1/chat/completions", json=chat(), timeout=120)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"]
    streamed = httpx.post(f"{proxy}/v1/chat/completions", json=chat(stream=True), timeout=120).text
    assert streamed.rstrip().endswith("data: [DONE]")
    assert httpx.post(f"{proxy}/v1/chat/completions", json=chat(model="other")).status_code == 404
    assert httpx.get(f"{proxy}/ready").json() == {"status": "ready"}


def test_an_unknown_argument_of_the_file_is_one_sentence():
    with pytest.raises(ConfigError, match="unknown 'modell'; did you mean 'model'"):
        ray_app({"modell": "tiny"})


@pytest.mark.parametrize("value", ["", " ", ","])
def test_an_empty_key_variable_does_not_open_the_application(monkeypatch, value):
    monkeypatch.setenv("QZOOM_API_KEY", value)
    with pytest.raises(ConfigError, match="QZOOM_API_KEY is set but empty"):
        ray_app({"device": "cpu"})


@pytest.mark.slow
def test_answers_are_the_native_ones_streamed_and_whole(site, model):
    wanted = model.ask(page(), "What is the total amount?", zoom="always", max_new_tokens=8)
    body = chat(user(image_part(), "What is the total amount?"), qzoom={"zoom": "always"})
    whole = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == wanted.text
    assert [region["box"] for region in message["qzoom"]["regions"]] == [list(r.box) for r in wanted.regions]
    streamed = httpx.post(f"{site.url}/v1/chat/completions", json=body | {"stream": True}, timeout=120).text
    assert streamed.rstrip().endswith("data: [DONE]")
    looked = {k: v for k, v in body.items() if k != "max_tokens"}
    perceived = httpx.post(f"{site.url}/v1/perceive", json=looked, timeout=120).json()
    assert perceived["regions"][0]["box"] == list(wanted.regions[0].box)
    assert httpx.get(f"{site.url}/ready").json() == {"status": "ready"}
    known = ask(site, max_tokens=2, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert len(known) == 2
    assert all(token["logprob"] <= 0 for token in known)


@pytest.mark.parametrize("streamed", [True, False])
def test_pieces_are_sent_to_those_who_read_them(site, streamed):
    engine = site.service.engine
    request = engine.model.request(page(), "What is the total?", max_new_tokens=8, ignore_eos=True, zoom="never")

    async def events() -> list[StreamEvent]:
        return [event async for event in engine.answer(Job(request, streamed=streamed))]

    found = asyncio.run_coroutine_threadsafe(events(), site.loop).result(120)
    texts = [event.text for event in found if event.kind == "text"]
    assert len(texts) > 1 if streamed else len(texts) == 1
    assert found[-1].answer.text.startswith("".join(texts))
    assert len(found[-1].answer.images) == 1


def test_refusals_of_a_replica_arrive_as_they_are(site):
    refused = ask(site, user(image_part(), "word " * 9000), max_tokens=8)
    assert refused.status_code == 400
    assert "the model reads at most" in refused.json()["error"]["message"]


def test_repeated_pictures_reach_the_replica_that_has_them(site):
    pages = [data_url(page(f"TOTAL {n}.00")) for n in range(6)]
    for question in ("What is the total amount?", "What is the date?", "Who?"):
        for number, url in enumerate(pages):
            usage = ask(site, user(image_part(url), question), qzoom={"zoom": "never"}, max_tokens=1).json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (question != "What is the total amount?"), number


def test_a_killed_replica_costs_at_most_what_it_was_answering(site):
    before = replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    pages = [user(image_part(data_url(page(f"NO {n}"))), "Who?") for n in range(6)]
    assert {ask(site, asked, max_tokens=1).status_code for asked in pages} <= {200, 503}
    wait_until(lambda: len(replicas()) == 2 and before[0] not in replicas())
    assert [ask(site, asked, max_tokens=1).status_code for asked in pages] == [200] * 6
