"""Small items for tests of the pipeline."""

from qzoom.distill.items import Agreement, Asked, Item, Picture, Region


def finished_item(picture: Picture, box=(10, 10, 40, 30), text="What is the code?", answer="K7", **parts) -> Item:
    """An item that could be exported."""
    values = {"kind": "ocr", "asker": "rule", "negative": False}
    values.update({key: parts.pop(key) for key in tuple(parts) if key in ("kind", "negative", "pair")})
    return Item(
        picture,
        Region(box, box, "given"),
        Asked(text, **values),
        answer=Agreement(answer, 6, 8, (("a", 3), ("b", 3))),
        **parts,
    )
