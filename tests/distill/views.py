"""Items and views of a fixed picture, and roles that answer as they are told, for tests of steps."""

from PIL import Image

from qzoom.data.synthetic.page import SceneObject
from qzoom.distill.items import Agreement, ImageRef, Item, Known, KnownQuestion, QuestionDraft, TargetRegion
from qzoom.errors import CallRefusedError

ITEM = Item(
    ImageRef("a" * 20, "x.png", 400, 200),
    TargetRegion((100, 50, 160, 90), (95, 45, 165, 95), "given", 2.0),
    QuestionDraft("What is the code on the red star?", "ocr", "rule", known="A4"),
    seed=7,
)
KNOWN = Known(
    (
        KnownQuestion("What is the code on the red star?", "A4", ((110, 60, 130, 70),), "code"),
        KnownQuestion("What is the code on the blue cross?", "C7", ((300, 60, 320, 70),), "code"),
        KnownQuestion("How many stars are there?", "2", ((100, 50, 160, 90), (10, 10, 40, 40)), "count"),
        KnownQuestion("How many crosses are there?", "1", ((102, 52, 120, 80),), "count"),
        KnownQuestion("Is there a green cross?", "no", (), "exists"),
        KnownQuestion("What is nearby?", "B9", ((95, 45, 101, 51),), "code"),
    ),
    (SceneObject("red", "star", (100, 50, 160, 90)), SceneObject("blue", "cross", (290, 40, 330, 80))),
    (("A4", (110, 60, 130, 70)), ("C7", (300, 60, 320, 70))),
)


class StillViews:
    """A grey picture with everything known about it."""

    def __init__(self, known: Known = KNOWN) -> None:
        self._known = known

    def whole(self, item: Item) -> Image.Image:
        return Image.new("RGB", (item.picture.width, item.picture.height), "grey")

    def crop(self, item: Item) -> Image.Image:
        return Image.new("RGB", (140, 100), "grey")

    def known(self, item: Item) -> Known:
        return self._known


def finished_item(picture: ImageRef, box=(10, 10, 40, 30), text="What is the code?", answer="K7", **parts) -> Item:
    """An item that could be exported."""
    values = {"kind": "ocr", "writer": "rule", "negative": False}
    values.update({key: parts.pop(key) for key in tuple(parts) if key in ("kind", "negative", "pair")})
    return Item(
        picture,
        TargetRegion(box, box, "given"),
        QuestionDraft(text, **values),
        answer=Agreement(answer, 6, 8, (("a", 3), ("b", 3))),
        **parts,
    )


class Judge:
    """Says what it is told, and keeps what it was asked."""

    name = "judge"
    model = "judge@1"

    def __init__(self, *pairs: tuple[str, str], refuses: bool = False) -> None:
        self.pairs = {frozenset(pair) for pair in pairs}
        self.refuses = refuses
        self.draft: list[tuple[str, str]] = []

    def same(self, question: str, first: str, second: str) -> bool | None:
        self.draft.append((first, second))
        if self.refuses:
            raise CallRefusedError("HTTP 413")
        return frozenset((first, second)) in self.pairs
