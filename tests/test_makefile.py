import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path):
    """A project folder that is set up already, with this environment as its own."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


def make(project, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "QZOOM"))}
    return subprocess.run(
        ["make", *words], cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", ['it\'s a "page".png', "price $HOME $(x) `y` 100%.png", "-dash.png", "a;b&c|d.png"])
def test_odd_names_arrive_as_typed(project, name):
    done = make(project, "demo", f"IMAGE={name}")
    assert done.returncode == 2
    assert name in done.stderr or name in done.stderr.replace("\\'", "'")
    assert "Cannot read" in done.stderr


def test_demo_answers_and_draws(project):
    shutil.copy(ROOT / "examples" / "receipt.jpg", project / "my 'first' page.jpg")
    done = make(
        project, "demo", "IMAGE=my 'first' page.jpg", 'QUESTION=What is the "total" amount, $5?', "SAVE=a b/demo.png"
    )
    assert done.returncode == 0, done.stderr
    assert (project / "a b" / "demo.png").stat().st_size > 10_000
    assert "gate" in done.stderr
    assert "visual tokens" in done.stderr


def test_targets_have_help_and_say_what_they_need(project):
    done = make(project, "parity")
    assert done.returncode == 2
    assert "make parity REFERENCE=DIR" in done.stderr
    listed = {line.split()[1] for line in make(project, "help").stdout.splitlines()}
    declared = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert listed == set(declared.split()[1:])


def test_an_old_python_is_refused_before_anything_is_installed(project):
    (project / ".venv" / ".ready").unlink()
    old = project / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(project, "setup", f"PYTHON={old}")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (project / ".venv" / ".ready").exists()
