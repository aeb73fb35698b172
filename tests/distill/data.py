"""Pictures with printed codes and a question file about them, and recipes that rules can run."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


def code_of(picture: int, place: int) -> str:
    return f"K{picture}{place}Z"


def make_pictures(folder: Path, count: int = 4, places: int = 2, first: int = 0) -> Path:
    """Grey pictures with a code in each place; gives the question file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for picture in range(first, first + count):
        image = Image.new("RGB", (400, 300), (120 + picture, 130, 140))
        draw = ImageDraw.Draw(image)
        for place in range(places):
            x, y = 40 + 120 * place, 30 + 60 * place
            draw.rectangle((x, y, x + 59, y + 39), fill="white")
            draw.text((x + 8, y + 10), code_of(picture, place), fill="black")
            question = f"Which code stands at place {place} of sheet {picture}?"
            values = {"id": f"{picture}-{place}", "image": f"{picture}.png", "question": question}
            lines.append({**values, "answer": code_of(picture, place), "boxes": [[x, y, x + 60, y + 40]]})
        image.save(folder / f"{picture}.png")
    path = folder / f"questions-{first}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_values(*pictures: str | Path, **changes: Any) -> dict[str, Any]:
    """A recipe of rules alone."""
    values: dict[str, Any] = {
        "pictures": [str(name) for name in pictures],
        "propose": {"select": {"min_side_px": 10}},
        "roles": {"teachers": [{"by": "rule", "name": "a"}, {"by": "rule", "name": "b"}]},
        "export": {"validation": 0.0},
        "workers": 2,
    }
    return values | changes
