import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("qzoom-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter whose qzoom comes from the wheel and whose other libraries are those of this environment."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.EnvBuilder(with_pip=False).create(home)
    interpreter = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, capture_output=True, timeout=300, check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return interpreter


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.file_size for info in archive.infolist() if "/assets/tiny/" in info.filename)
    assert {name.split("/")[0] for name in names} == {"qzoom", "qzoom-0.1.0.dist-info"}
    assert any(name.startswith("qzoom/assets/tiny/") and name.endswith(".safetensors") for name in names)
    assert {
        "qzoom/py.typed",
        "qzoom/evaluation/report.html.jinja",
        "qzoom/serving/page/index.html",
        "qzoom/serving/page/app.js",
        "qzoom/serving/page/examples/receipt.jpg",
        "qzoom/recipes/qwen3-vl-4b/regions.yaml",
    } <= set(names)
    assert "qzoom-0.1.0.dist-info/licenses/LICENSE" in names
    assert size <= 24_000_000


def test_what_an_index_shows_leads_nowhere_else(wheel):
    """An index has neither the repository's files nor an address for them."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("qzoom-0.1.0.dist-info/METADATA").decode()
    shown = metadata.partition("\n\n")[2]
    assert shown.startswith("# qzoom\n")
    assert "Description-Content-Type: text/markdown" in metadata
    assert re.findall(r"\]\(|<img|<a |\bsrc=", shown) == []
    assert "Project-URL" not in metadata
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert set(re.findall(r"`([a-z]+)`", shown.partition("| Extra")[2].partition("\n\n")[0])) == extras - {"dev"}


def test_installed_recipes_are_copied_and_run(python, tmp_path):
    def qzoom(*words):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [python.parent / "qzoom", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    listed = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in qzoom("recipes").stdout.splitlines())
    assert len(listed) > 40
    assert [name for name, command in listed.items() if not re.match("qzoom |accelerate ", command)] == []
    missing = qzoom("train", "regions", "--recipe", "recipes/tiny/regions.yaml", "--dry-run")
    assert "copy it with: qzoom recipes copy tiny/regions" in missing.stderr
    assert qzoom("recipes", "copy", "tiny/regions").returncode == 0
    planned = qzoom("train", "regions", "--recipe", "recipes/tiny/regions.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "not there yet: runs/tiny-labels/regions" in planned.stdout


def test_installed_wheel_answers(python, tmp_path):
    page = Image.new("RGB", (400, 600), "white")
    ImageDraw.Draw(page).text((40, 300), "TOTAL 12.50", fill="black", font_size=32)
    page.save(tmp_path / "page.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    where = [python, "-c", "import qzoom; print(qzoom.__file__)"]
    source = subprocess.run(
        where, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert Path(source.strip()).is_relative_to(python.parents[1])

    command = [python.parent / "qzoom", "ask", "page.png", "What is the total amount?", "--json", "--quiet"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(values["text"], str)
    assert values["usage"]["coarse_tokens"] > 0
    assert values["image_sizes_px"] == [[400, 600]]
