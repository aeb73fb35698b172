import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import checkpoint_identity
from qzoom.errors import CheckpointError, ConfigError
from qzoom.serving.engines.remote import RemoteEngine
from qzoom.serving.settings import SchedulerLimits
from tests.serving.engines.simulated import Decoder, FakeServer, front, serving
from tests.serving.running import Site, chat, data_url, image_part, page, running, user

RECEIPT = Path(__file__).parents[3] / "examples" / "receipt.jpg"
IDENTITY = checkpoint_identity(find_source("tiny"))


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model)


def engine(*urls: str) -> RemoteEngine:
    return RemoteEngine(front(), SchedulerLimits(), urls, identity=IDENTITY)


@contextmanager
def sites(decoder: Decoder, count: int = 1) -> Iterator[tuple[Site, list[FakeServer], list[ExitStack]]]:
    """A front end before servers; a stack's `close` ends its server."""
    servers = [FakeServer(decoder) for _ in range(count)]
    stacks = [ExitStack() for _ in servers]
    with ExitStack() as everything:
        for stack in stacks:
            everything.callback(stack.close)
        urls = [stack.enter_context(serving(server.app)) for stack, server in zip(stacks, servers, strict=True)]
        yield everything.enter_context(running(engine(*urls))), servers, stacks


def ask(site: Site, **body: object) -> httpx.Response:
    return httpx.post(f"{site.url}/v1/chat/completions", json=chat(**body), timeout=120)


def test_answers_are_the_native_ones_streamed_and_whole(model, decoder):
    wanted = model.ask(page(), "What is the total amount?", zoom="always", max_new_tokens=8)
    body = chat(user(image_part(), "What is the total amount?"), qzoom={"zoom": "always"})
    with sites(decoder) as (site, (server,), _):
        whole = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120).json()
        streamed = httpx.post(f"{site.url}/v1/chat/completions", json=body | {"stream": True}, timeout=120).text
        looked = httpx.post(
            f"{site.url}/v1/perceive", json={k: v for k, v in body.items() if k != "max_tokens"}, timeout=120
        ).json()
        assert httpx.get(f"{site.url}/ready").json() == {"status": "ready"}
        card = httpx.get(f"{site.url}/v1/models").json()["data"][0]
        refused = ask(site, kv_transfer_params={"qzoom": {}})
    message = whole["choices"][0]["message"]
    assert message["content"] == wanted.text
    assert [r["box"] for r in message["qzoom"]["regions"]] == [list(r.box) for r in wanted.regions]
    assert whole["usage"]["completion_tokens"] == wanted.usage.completion_tokens
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    records = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(r["choices"][0]["delta"].get("content", "") for r in records) == wanted.text
    assert looked["regions"][0]["box"] == list(wanted.regions[0].box)
    assert card["max_model_len"] == 2048
    assert card["qzoom"]["zooms"] is True
    # Clients' own transfer parameters never reach an engine.
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unknown_field"
    assert {tuple(b.get("kv_transfer_params", {})) for b in server.bodies} == {(), ("qzoom",)}


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (
            "no-route",
            ConfigError,
            "has no route /inference/v1/generate; start it with: vllm serve $(qzoom vllm-args tiny)",
        ),
        ("no-plugin", ConfigError, "runs without qzoom's plug-in; install qzoom there too"),
        ("other-base", CheckpointError, "has another base model than tiny"),
        ("other-heads", CheckpointError, "has another gate and region branch than tiny"),
        ("key", ConfigError, "refuses the key; put its key into QZOOM_ENGINE_KEY"),
        ("garbage", ConfigError, "is no vLLM server"),
        ("broken", ConfigError, "answers with status 500; its log says why"),
    ],
)
def test_engines_that_cannot_be_used_are_refused_at_the_start(decoder, fault, kind, said):
    with serving(FakeServer(decoder, fault).app) as url, serving(FakeServer(decoder).app) as good:
        for urls in ((url,), (good, url)):  # one wrong engine among several, too
            with pytest.raises(kind) as caught:
                engine(*urls)
            assert said in str(caught.value)
            assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "http://127.0.0.1:9",
            "does not answer (connection refused); start it with: vllm serve $(qzoom vllm-args tiny)",
        ),
        ("localhost", "'localhost' is not an address; write http://HOST:PORT."),
    ],
)
def test_an_address_where_nothing_answers(url, said):
    with pytest.raises(ConfigError) as caught:
        engine(url)
    assert said in str(caught.value)


@pytest.mark.parametrize("fault", ["cut", "error"])
def test_an_engine_that_dies_in_the_middle_ends_the_stream_with_an_error(decoder, fault):
    with sites(decoder) as (site, (server,), _):
        server.fault = fault
        streamed = ask(site, stream=True)
        whole = ask(site)
    last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    for record in (last, whole.json()):
        assert record["error"]["code"] == "engine_down"
        assert "ended in the middle of the answer; ask again" in record["error"]["message"]
    assert whole.status_code == 503
    assert whole.headers["retry-after"] == "5"


def test_an_engine_that_went_away_or_came_back_with_other_weights(decoder):
    with sites(decoder) as (site, (server,), (stack,)):
        server.fault = "other-heads"
        changed = ask(site, qzoom={"zoom": "always"})
        stack.close()
        gone = ask(site)
        unready = httpx.get(f"{site.url}/ready")
    assert changed.status_code == gone.status_code == 503
    assert "was started again with another gate and region branch" in changed.json()["error"]["message"]
    assert gone.json()["error"]["message"] == "No engine behind this server answers now; try again in a moment."
    assert (unready.status_code, unready.json()) == (503, {"status": "no engine answers"})


def test_full_engines_are_a_full_server(decoder):
    with sites(decoder, 2) as (site, servers, stacks):
        servers[0].fault = "full"
        assert ask(site).status_code == 200  # the other one answers
        servers[1].fault = "full"
        never = {"qzoom": {"zoom": "never"}}
        full = [ask(site, **more) for more in ({}, never, {"stream": True}, never | {"stream": True})]
        stacks[1].close()
        full.append(ask(site))
    for reply in full:
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
        assert reply.json()["error"]["code"] == "queue_full"
        assert "are full; try again in a moment" in reply.json()["error"]["message"]


def test_another_engine_takes_over_and_a_picture_stays_with_its_engine(decoder):
    with sites(decoder, 2) as (site, servers, stacks):
        for server in servers:
            server.bodies.clear()
        pages: list[str] = []

        def about(url: str, question: str) -> None:
            body = chat(user(image_part(url), question), qzoom={"zoom": "never"})
            httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()

        while len(pages) < 4 or not all(server.bodies for server in servers):  # ports decide where a picture goes
            assert len(pages) < 40
            pages.append(data_url(page(f"TOTAL {len(pages)}")))
            about(pages[-1], "When?")
        for url in pages:
            about(url, "What?")
        seen = [[body["content_parts"][0]["url"] for body in server.bodies] for server in servers]
        assert sum(map(len, seen)) == 2 * len(pages)
        assert not set(seen[0]) & set(seen[1])
        stacks[0].close()
        assert all(
            httpx.post(
                f"{site.url}/v1/chat/completions", json=chat(user(image_part(url), "Who?")), timeout=120
            ).status_code
            == 200
            for url in pages
        )
