"""The Dockerfile's steps, run without Docker: what is copied is enough, what is installed serves."""

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def instructions():
    """Instruction and rest of every line, continued lines joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Working folder and environment after all steps; the libraries of this environment stand for the index."""
    home = tmp_path_factory.mktemp("image")
    work, python = home / "app", home / "venv"
    venv.EnvBuilder(with_pip=True).create(python)
    subprocess.run([python / "bin" / "python", "-m", "pip", "uninstall", "-qy", "setuptools"], check=True)
    (site,) = python.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "QZOOM_"))}
    environment |= {
        "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    work.mkdir()
    for name, rest in instructions():
        if name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                goal = work / (target if target != "./" else Path(source).name)
                goal.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", ROOT / source, goal], check=True)
        elif name == "RUN":
            done = subprocess.run(rest, shell=True, cwd=work, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
    return work, environment


def test_it_serves(image):
    work, environment = image
    (command,) = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    for option, value in (("--host", "127.0.0.1"), ("--port", "0")):
        command[command.index(option) + 1] = value
    server = subprocess.Popen(
        command, cwd=work, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        url = server.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{url}/ready", timeout=60) as reply:
            assert reply.status == 200
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
            assert json.load(reply)["data"][0]["id"] == "tiny"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


def test_it_runs_the_copied_package(image):
    work, environment = image
    script = "import qzoom; print(qzoom.__file__)"
    done = subprocess.run(
        ["python", "-c", script], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert str(work.parent / "venv") in done.stdout
    assert sys.executable not in done.stdout


def test_the_package_is_copied_and_services_exist():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]}
    assert copied <= kept
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    front, engines = services["front-end"], [services["engine-0"], services["engine-1"]]
    for service in (front, *engines):
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    urls = [word.partition("=")[2] for word in front["command"] if word.startswith("--engine-url")]
    assert [url.split("//")[1].split(":")[0] for url in urls] == ["engine-0", "engine-1"] == sorted(front["depends_on"])
    command, wide = [sys.executable, "-m", "qzoom", "serve", "--help"], os.environ | {"COLUMNS": "200"}
    known = subprocess.run(command, capture_output=True, text=True, env=wide).stdout
    for word in front["command"][2:]:
        assert word.partition("=")[0] in known
