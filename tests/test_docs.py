"""What the documents promise exists: commands, options, Python, links."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from qzoom.cli.main import app

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


def test_options_named_in_tables_exist():
    verbs = typer.main.get_command(app).commands
    known = set().union(
        *(options_of(v) for verb in verbs.values() for v in (verb, *getattr(verb, "commands", {}).values()))
    )
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(--[a-z][a-z-]+)", text))
    assert len(named) > 12
    assert named <= known


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)}
    assert {"demo", "test", "parity"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
