import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import huggingface_hub.constants
import pytest

from qzoom.checkpoints.adapter import push_to_hub, save_pretrained
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.upstream import presets_of
from qzoom.config import Preset
from tests.checkpoints import folders
from tests.checkpoints.folders import refused
from tests.checkpoints.test_adapter import change_config
from tests.llm.stub import nobody


def cached(cache: Path, repo_id: str, revision: str = "main") -> Path:
    """Where the cache keeps a repository's files at a revision."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    commit = (repo_id + revision).encode().hex().ljust(40, "0")[:40]
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    (home / "blobs").mkdir(exist_ok=True)
    (home / "snapshots").mkdir(exist_ok=True)
    return home / "snapshots" / commit


def test_folder_is_found_by_path(tmp_path):
    for given in (tmp_path, str(tmp_path)):
        source = find_source(given)
        assert (source.folder, source.is_hub, source.name) == (tmp_path, False, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "empty"), ("./no/such/folder", "no model folder ./no/such/folder"),
        ("/no/such/folder", "no model folder"), ("a/b/c", "no model folder a/b/c"), ("owner/..", "no model folder"),
        ("what is this?", "no model folder"), (Path("relative"), "no model folder relative"),
        (Path(__file__), "is a file"),
    ],
)  # fmt: skip
def test_name_that_is_no_model(name, said):
    with refused(said):
        find_source(name)


def test_names_that_are_not_cached_and_releases_that_are(cache):
    with refused("owner/name", "'v2'", "HF_HUB_OFFLINE"):
        find_source("owner/name", "v2")
    with refused("did you mean 'tiny'?"):
        find_source("tinny")
    with refused("did you mean 'YuhengSSS/Q-Zoom-Qwen3VL-4B'?"):
        find_source("YuhengSS/Q-Zoom-Qwen3VL-4B")
    made = folders.engine("qwen3_vl")
    folders.write_merged(made, cached(cache, "YuhengSSS/Q-Zoom-Qwen3VL-4B"))
    loaded = load_engine("YuhengSSS/Q-Zoom-Qwen3VL-4B")
    assert folders.same_branches(made, loaded)
    assert loaded.config.with_preset("document").gate_threshold == 0.10
    assert loaded.config.presets["high_resolution"] == Preset(0.025, 0.05)
    assert presets_of("YuhengSSS/Q-Zoom-Qwen2.5VL-7B")["high_resolution_below_2048"].gate_threshold == 0.025
    assert presets_of("copies/Q-Zoom-Qwen2.5VL-7B")["document"] == Preset(0.05, 0.125)
    assert presets_of("owner/other") == {}


def test_adapter_and_base_from_the_hub_at_their_revisions(cache, tmp_path):
    made = folders.engine("qwen2_5_vl")
    folders.write_plain(made, cached(cache, "owner/base", "v1"))
    adapter = cached(cache, "owner/adapter", "tuned")
    adapter.parent.mkdir(parents=True, exist_ok=True)
    save_pretrained(made, adapter, base_id="owner/base", base_revision="v1", compact=False)
    loaded = load_engine("owner/adapter", revision="tuned")
    assert folders.same_branches(made, loaded)
    saved = save_pretrained(loaded, tmp_path / "saved", compact=False)
    assert sorted(path.name for path in saved.iterdir()) == ["qzoom.safetensors", "qzoom_config.json"]
    base = json.loads((saved / "qzoom_config.json").read_text())["base"]
    assert (base["id"], base["revision"]) == ("owner/base", "v1")
    assert folders.same_branches(made, load_engine(saved))
    change_config(saved, lambda v: v["base"].update(revision="v7"))
    with refused("base model", "owner/base", "'v7'"):
        load_engine(saved)


class Hub(BaseHTTPRequestHandler):
    """A hub that refuses every repository, each in its way."""

    def do_GET(self) -> None:
        code = "RepoNotFound" if "missing" in self.path else "GatedRepo" if "gated" in self.path else "RevisionNotFound"
        self.send_response({"RepoNotFound": 401, "GatedRepo": 403, "RevisionNotFound": 404}[code])
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serve(server: ThreadingTCPServer | ThreadingHTTPServer) -> Iterator[str]:
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def online(cache, monkeypatch):
    """The hub's address becomes the given one."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)

    def point(url: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        file = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", file)
        huggingface_hub.utils.close_session()

    yield point
    huggingface_hub.utils.close_session()


def test_refusals_of_the_hub_are_one_sentence(online):
    with serve(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as url:
        online(url)
        for words, said in (
            (["owner/missing"], ["no model 'owner/missing'", "spelling"]),
            (["owner/gated"], ["restricted", "HF_TOKEN"]),
            (["owner/name", "v9"], ["'v9'", "branch, tag or commit"]),
        ):
            with refused(*said):
                find_source(*words)


class Drop(StreamRequestHandler):
    """A hub that takes a request and hangs up."""

    def handle(self) -> None:
        self.rfile.readline()


def test_a_hub_that_hangs_up_or_cannot_be_reached(online):
    with serve(ThreadingTCPServer(("127.0.0.1", 0), Drop)) as url:
        online(url)
        with refused("Uploading to 'owner/name' failed", "check the network"):
            push_to_hub(folders.engine("qwen3_vl"), "owner/name", base_id="owner/base", token="none")
        with refused("could not be downloaded (", "disconnected", "check the network"):
            find_source("owner/name")
    with nobody() as url:
        online(url)
        with refused("could not be downloaded", "check the network"):
            find_source("owner/name")


def test_a_base_called_tiny_is_the_embedded_model_whatever_lies_around(tmp_path, monkeypatch):
    engine = load_engine("tiny")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = save_pretrained(engine, tmp_path / "adapter", base_id="tiny")
    assert json.loads((folder / "qzoom_config.json").read_text())["base"]["id"] == "tiny"
    assert load_engine(folder).backbone.hidden_size == engine.backbone.hidden_size


class Empty(BaseHTTPRequestHandler):
    """A hub with one repository of one file."""

    def do_GET(self) -> None:
        file = {"type": "file", "path": "config.json", "oid": "1" * 40, "size": 2}
        about = {"id": "owner/name", "sha": "a" * 40, "siblings": [{"rfilename": "config.json"}]}
        answer = {} if "/resolve/" in self.path else [file] if "/tree/" in self.path else about
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_cache_that_cannot_be_written_is_no_trouble_of_the_network(online, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with serve(ThreadingHTTPServer(("127.0.0.1", 0), Empty)) as url:
        online(url)
        with refused(str(tmp_path / "file" / "hub"), "cannot be written (Not a directory)", "HF_HUB_CACHE"):
            find_source("owner/name")
