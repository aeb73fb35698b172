"""The server keeps what its own OpenAPI document promises, for requests made up from that document."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qzoom import QZoom
from qzoom.serving.settings import ServerLimits
from tests.serving.running import running

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_made_up_from_the_document(model, tmp_path):
    engine = model.engine  # more than a thousand requests are answered: each of them once, and with one token
    once = QZoom(dataclasses.replace(engine, config=engine.config.replace(reread=None)), "tiny")
    with running(once, limits=ServerLimits(max_new_tokens=1, text_chars=2000)) as site:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{site.url}/openapi.json"]
        command += ["--phases", "coverage,fuzzing", "--max-examples", "12"]
        command += [
            "--generation-deterministic", "--no-color", "--output-sanitize", "false", "--request-timeout", "120",
        ]  # fmt: skip
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.serving.schema_hooks", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        counted = site.service.metrics.text().decode()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"Operations: +9 selected / 9 total", done.stdout)
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 300
    assert not re.search(r'status="5\d\d"', counted)
    answered = re.search(r'qzoom:requests_total\{status="200"\} (\d+)', counted)
    assert answered, counted
    assert int(answered[1]) > 50
