import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.exceptions import TyperException

from qzoom.cli.main import app, run
from tests.pdfs import of_pictures

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def options_of(command):
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def qzoom_commands():
    verbs = typer.main.get_command(app).commands
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                match = re.search(r"\bqzoom (.*)", re.split(r"\s+# ", line)[0])
                if match:
                    yield page.name, verbs, shlex.split(match.group(1))


def test_commands_and_options_exist():
    seen = 0
    for page, verbs, words in qzoom_commands():
        assert words[0] in verbs, (page, words)
        command = verbs.get(" ".join(words[:2]), verbs[words[0]])
        known = options_of(getattr(command, "commands", {}).get(words[-1] if len(words) < 2 else words[1], command))
        assert {w for w in words if re.match("--?[a-z]", w)} <= known, (page, words)
        seen += 1
    assert seen >= 8


def test_options_of_tables_and_make_targets_exist():
    verbs = typer.main.get_command(app).commands
    known = options_of(typer.main.get_command(app)).union(
        *(options_of(v) for verb in verbs.values() for v in (verb, *getattr(verb, "commands", {}).values()))
    )
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(--[a-z][a-z-]+)", text))
    assert len(named) > 12
    assert named <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)}
    assert {"demo", "test", "parity"} <= named <= targets


def test_named_files_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:tests|recipes|benchmarks)/[\w/.-]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), (page.name, name)


def test_command_lines_can_be_parsed():
    """Values of the right type, nothing missing: everything but running them."""
    for page, verbs, words in qzoom_commands():
        if "copy" in words or not {"[", "..."}.isdisjoint(words):
            continue
        pair = " ".join(words[:2])
        command, rest = (verbs[pair], words[2:]) if pair in verbs else (verbs[words[0]], words[1:])
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        rest = rest[: next((i for i, word in enumerate(rest) if word in ("|", ">", "&", "&&", "\\")), len(rest))]
        try:
            command.make_context(words[0], list(rest))
        except typer.Exit:  # --help
            continue
        except TyperException as error:
            pytest.fail(f"{page}: qzoom {' '.join(words)}: {error.format_message()}")


ELSEWHERE = ("serving.md", "port-a-backbone.md")  # checked by tests/serving and tests/backbones/test_port_guide.py
PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]


@pytest.fixture(scope="module")
def named_files(tmp_path_factory):
    """The files that examples name."""
    folder = tmp_path_factory.mktemp("named")
    receipt = Image.open(ROOT / "examples" / "receipt.jpg")
    (folder / "examples").mkdir()
    for name in ("examples/receipt.jpg", "receipt.jpg", "contract.jpg", "page.png", "page1.png", "page2.png"):
        receipt.save(folder / name)
    for name in ("a.png", "b.png"):
        receipt.resize((300, 400)).save(folder / name)
    (folder / "contract.pdf").write_bytes(of_pictures([receipt.resize((300, 400))] * 9, dpi=100))
    return folder


@pytest.fixture
def desk(named_files, tmp_path, monkeypatch):
    """A folder with the files that examples name."""
    shutil.copytree(named_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, desk):
    """All blocks of a page, in order, in one program; released checkpoints are stood in for by the embedded model."""
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(re.sub(r'"YuhengSSS/[^"]+"', '"tiny"', block), page.name, "exec"), namespace)


RUN = ("ask", "perceive", "models", "recipes", "doctor")


def runnable():
    """Command lines, with the first page that shows each, whose model is the embedded one and whose files are there."""
    lines = {tuple(words): page for page, _, words in reversed(list(qzoom_commands())) if words[0] in RUN}
    elsewhere = {"-", "|", "--model"}
    return [(page, words) for words, page in lines.items() if elsewhere.isdisjoint(words) and "https" not in str(words)]


def test_commands_that_need_no_data_run(desk, capsys):
    assert len(runnable()) >= 8
    for page, words in runnable():
        code = run(list(words))
        assert code == 0, (page, words, capsys.readouterr().err)
    assert (desk / "answer.png").exists()
    assert (desk / "recipes" / "qwen3-vl-4b" / "regions.yaml").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=lambda page: page.name)
def test_json_examples_are_json(page):
    for block in blocks(page, "json"):
        lines = block.strip().splitlines()
        for text in lines if all(line.startswith("{") for line in lines) else [block]:
            json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
