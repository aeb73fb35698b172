"""No model family is named outside `backbones/`: a port is one file there, and nothing else has to learn about it."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import qzoom

PACKAGE = Path(qzoom.__file__).parent
NAMES = re.compile(
    r"qwen|llava|internvl|\blanguage_model\b|\bmodel\.visual\b|[\"']visual[\"']|visual\\\.",
    re.IGNORECASE,
)
EXEMPT = (
    "backbones/",
    "integrations/vllm/__init__.py",  # names of vLLM's own model classes
    "integrations/vllm/models.py",
    "checkpoints/upstream.py",  # hub ids of published checkpoints, which contain a family's name
)


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Code and literals without comments and docstrings: prose may name a family as an example."""
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        prose = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type != tokenize.COMMENT and not prose:
            yield token.start[0], token.line if token.type == tokenize.NAME else token.string
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            previous = token.type


def test_no_family_is_named_outside_the_backbones():
    places = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(EXEMPT):
            continue
        for number, line in code_lines(path.read_text(encoding="utf-8")):
            if NAMES.search(line):
                places.add(f"{name}:{number}: {line.strip()[:80]}")
    assert not places, "\n".join(sorted(places))
