"""Draws the example pictures of the web page: small JPEGs, each with a question that the page offers.

The documents are those of this folder, the form and the shapes come from fixed seeds that no training draws from:

    python examples/make_page_examples.py src/qzoom/serving/page/examples
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from qzoom.data.synthetic.documents import render_document
from qzoom.data.synthetic.page import HELD_OUT_SEEDS
from qzoom.data.synthetic.scenes import render_scene

EXAMPLES = Path(__file__).resolve().parent
SEED = HELD_OUT_SEEDS.start + 5000


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    for name, quality in (("receipt.jpg", 62), ("delivery-note.jpg", 58)):
        with Image.open(EXAMPLES / name) as picture:
            picture.save(folder / name, quality=quality, optimize=True)
    card = render_document(SEED, kind="form", reword=False)
    card.image.save(folder / "card.jpg", quality=60, optimize=True)
    shapes = render_scene(SEED, width_px=1400, height_px=1050, reword=False)
    shapes.image.save(folder / "shapes.jpg", quality=60, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
