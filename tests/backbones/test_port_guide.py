"""The example in docs/port-a-backbone.md is what the package has: every part of it stands in the file as it is."""

import re
from pathlib import Path

import qzoom

ROOT = Path(__file__).parents[2]


def test_the_guide_shows_the_file():
    page = (ROOT / "docs" / "port-a-backbone.md").read_text(encoding="utf-8")
    source = (Path(qzoom.__file__).parent / "backbones" / "llava.py").read_text(encoding="utf-8")
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class LlavaBackbone" in block
    )
    parts = re.split(r"\n\n(?=    (?:@|def |# --))", example.rstrip())
    assert len(parts) > 10
    for line in parts[0].splitlines():
        assert line.removesuffix(":") in source
    for part in parts[1:]:
        assert part in source
