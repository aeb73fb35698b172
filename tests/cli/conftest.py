"""The real command, in this process and in one of its own, and a picture to ask about."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.cli.main import run
from tests.tiny_models import engine


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def is_one_sentence(self) -> bool:
        """Whether nothing but one line on standard error was said."""
        lines = self.err.splitlines()
        return self.out == "" and len(lines) == 1 and lines[0].startswith("qzoom") and "Traceback" not in self.err

    def refuses(self, code: int, *parts: str) -> None:
        """This exit code, and one sentence on standard error that holds these parts."""
        assert self.code == code, self.err
        assert self.is_one_sentence, self.out + self.err
        assert [part for part in parts if part not in self.err] == [], self.err


Command = Callable[..., Result]


@pytest.fixture
def here(capsys):
    """Run the command line in this process."""

    def call(*words: str | Path) -> Result:
        capsys.readouterr()
        code = run([str(word) for word in words])
        caught = capsys.readouterr()
        return Result(code, caught.out, caught.err)

    return call


@pytest.fixture(scope="session")
def apart():
    """Run the command line in a process of its own."""

    def call(*words: str | Path, stdin: bytes = b"", env: dict[str, str] | None = None) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "qzoom", *map(str, words)],
            input=stdin,
            capture_output=True,
            env=os.environ | (env or {}),
            timeout=300,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Qwen3-VL with gate and region branch, its base beside them."""
    return save_pretrained(engine("qwen3_vl"), tmp_path_factory.mktemp("models") / "random", include_base=True)


@pytest.fixture(scope="session")
def headless(tmp_path_factory):
    plain = engine("qwen3_vl", heads=False)
    return save_pretrained(plain, tmp_path_factory.mktemp("models") / "plain", include_base=True)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A small page with a few words; its name holds spaces and quotes."""
    page = Image.new("RGB", (420, 640), "white")
    draw = ImageDraw.Draw(page)
    for row, text in enumerate(("CORNER SHOP", "Bread 2.40", "Milk 1.15", "TOTAL 3.55")):
        draw.text((40, 60 + 130 * row), text, fill="black", font_size=30)
    path = tmp_path_factory.mktemp("pictures") / "my page 'one'.png"
    page.save(path)
    return path
