import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.routing import Route

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def run(site, tmp_path):
    shutil.copy(ROOT / "examples" / "receipt.jpg", tmp_path)

    def runner(text: str, name: str, *command: str) -> str:
        assert "http://127.0.0.1:8000" in text
        (tmp_path / name).write_text(text.replace("http://127.0.0.1:8000", site.url), encoding="utf-8")
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            [*command, name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return runner


@pytest.fixture(scope="module")
def answers(model):
    picture = ROOT / "examples" / "receipt.jpg"
    return {zoom: model.ask(picture, "What is the date?", zoom=zoom).text for zoom in ("auto", "always")}


def test_curl(run, answers):
    if shutil.which("curl") is None or shutil.which("base64") is None:
        pytest.skip("curl or base64 is missing")
    (text,) = (text for text in snippets("sh") if "curl" in text)
    said = json.loads(run(text, "ask.sh", "sh"))
    assert said["choices"][0]["message"]["content"] == answers["auto"]


def test_python(run, answers):
    whole, streamed, _ = snippets("python")
    lines = run(whole, "whole.py", sys.executable).splitlines()
    assert lines[0] == answers["auto"]
    assert "'zoomed': True" in lines[1]
    looked, text = run(streamed, "streamed.py", sys.executable).splitlines()
    assert looked.startswith("looks at [[")
    assert text == answers["always"]


def test_python_by_schema(run):
    pytest.importorskip("llguidance")
    assert re.fullmatch(
        r"date='\d\d/\d\d/\d{4}' kind='(receipt|letter)'", run(snippets("python")[2], "parsed.py", sys.executable)
    )


def test_javascript(run, answers):
    if shutil.which("node") is None:
        pytest.skip("Node is missing")
    (text,) = snippets("js")
    assert run(text, "ask.mjs", "node") == answers["always"]


def test_the_routes_that_are_named_exist(site):
    named = set(re.findall(r"`(?:POST )?(/[a-z0-9/._]+)`", GUIDE))
    assert len(named) >= 7
    assert named <= {route.path for route in site.server.config.app.routes if isinstance(route, Route)}
