"""Where images come from (folders, question files, receipts, drawn sets), and `Views`, what steps see of them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from qzoom.data.crop import cut
from qzoom.data.questions import DRAWN, drawn_numbers, open_questions, render_drawn
from qzoom.distill.items import ImageRef, Item, Known, KnownQuestion
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.images.load import load_image, picture_digest
from qzoom.store.schema import Question

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image that has not been opened."""

    source: str  # path below `root`, or "documents:SEED", "scenes:SEED"
    root: str  # folder that a path starts from; "" for drawn pictures
    dataset: str  # where it comes from
    questions: tuple[KnownQuestion, ...] = ()  # those that come with it in a question file

    @property
    def key(self) -> str:
        """Twenty hex digits that change when the file is another one or was changed (name, size, time of change)."""
        content = [self.root, self.source]
        if self.root:
            try:
                facts = os.stat(os.path.join(self.root, self.source))
                content += [str(facts.st_size), str(facts.st_mtime_ns)]
            except OSError:
                content += ["missing"]
        return hashlib.sha256("\0".join(content).encode("utf-8", "surrogatepass")).hexdigest()[:20]


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An open image: RGB pixels and what is known about it."""

    image: PIL.Image.Image
    known: Known


def list_sources(names: Sequence[str]) -> list[ImageSource]:
    """All images of a recipe's `pictures` in their order, folders sorted by path (ConfigError: a name that means
    nothing, or a folder without pictures; DataError: a question file with a malformed line)."""
    out: list[ImageSource] = []
    for name in names:
        kind, _, rest = name.partition(":")
        if kind in DRAWN and rest:
            out += [ImageSource(f"{kind}:{number}", "", kind) for number in drawn_numbers(kind, rest)]
        elif kind == "receipts" and rest:
            out += _with_questions(name)
        elif (path := Path(name)).is_dir():
            out += _folder(path)
        elif path.is_file():
            out += _with_questions(str(path))
        else:
            raise ConfigError(
                f"pictures: {name!r} is neither a folder nor a question file; name one, or documents:FIRST:COUNT, "
                "scenes:FIRST:COUNT, receipts:FOLDER:SPLIT."
            )
    if not out:
        raise ConfigError("pictures: none are named; list at least one folder, question file or drawn set.")
    return out


def load_source(source: str, root: str, questions: Sequence[KnownQuestion] = ()) -> Loaded:
    """Decode or draw an image (ImageError: missing, damaged, of an unknown format or outside the limits)."""
    kind, _, number = source.partition(":")
    if not root and kind in DRAWN and number.isdigit():
        return _draw(kind, int(number))
    path = Path(root) / source
    if not path.is_file():
        raise ImageError(f"The picture {path} is missing; restore it or take it out of the recipe.")
    return Loaded(load_image(path).image, Known(tuple(questions)))


def scan(source: ImageSource) -> tuple[ImageRef, Loaded]:
    """Open a source and give its record (ImageError: as `load_source`)."""
    loaded = load_source(source.source, source.root, source.questions)
    width, height = loaded.image.size
    digest = picture_digest(loaded.image)
    return ImageRef(digest, source.source, width, height, source.root, source.dataset), loaded


def _folder(folder: Path) -> Iterator[ImageSource]:
    root = folder.resolve()
    found = False
    for parent, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS):
                found = True
                yield ImageSource(str((Path(parent) / name).relative_to(root)), str(root), root.name)
    if not found:
        raise ConfigError(f"pictures: the folder {folder} holds no {', '.join(EXTENSIONS)} file; name another.")


def _with_questions(name: str) -> list[ImageSource]:
    """Images of a question file, each once, with all questions about it."""
    together: dict[tuple[str, str], list[Question]] = {}
    for question in open_questions([name])[0]:
        together.setdefault((question.root, question.image), []).append(question)
    out = []
    for (root, image), questions in together.items():
        turns = [turn for question in questions for turn in question.turns]
        known = tuple(KnownQuestion(t.question, t.answers[0] if t.answers else "", t.boxes) for t in turns)
        out.append(ImageSource(image, root, questions[0].source, known))
    return out


def _draw(kind: str, number: int) -> Loaded:
    sample = render_drawn(kind, number)
    questions = tuple(KnownQuestion(q.question, q.answer, q.boxes, q.field) for q in sample.questions)
    texts = []
    for line in sample.lines:
        if line.text.strip():
            low, high = line.char_boxes_px.min(axis=0), line.char_boxes_px.max(axis=0)
            texts.append((line.text, (int(low[0]), int(low[1]), int(high[2]) + 1, int(high[3]) + 1)))
    return Loaded(sample.image.convert("RGB"), Known(questions, sample.objects, tuple(texts)))


class Views:
    """What a step may look at: images, decoded once while their items are worked on. Threads may share it.

    Images are shared: draw on copies.
    """

    def __init__(self) -> None:
        self._work = threading.local()  # files of equal content may come with other questions
        self._open: dict[str, Loaded] = {}

    def whole(self, item: Item) -> PIL.Image.Image:
        """The whole image, RGB, upright (ImageError: it is missing or cannot be decoded)."""
        return self._loaded(item.picture).image

    def crop(self, item: Item) -> PIL.Image.Image:
        """What teachers see: `crop_box` cut from the whole and enlarged by `scale` (ImageError: as `whole`; DataError:
        the item has no target)."""
        if item.target is None:
            raise DataError(f"The item {item.id} has no region to look at; run the propose step first.")
        return cut(self.whole(item), item.target.crop_box, item.target.scale)

    def known(self, item: Item) -> Known:
        """What is known about the image; only drawn images are opened for it."""
        picture = item.picture
        if picture.root:
            return Known(getattr(self._work, "questions", ()))
        return self._loaded(picture).known

    @contextmanager
    def working_on(
        self, picture: ImageRef, questions: Sequence[KnownQuestion], loaded: Loaded | None = None
    ) -> Iterator[None]:
        """Keep an image (`loaded` when it was just opened) and its questions while this thread works on its items."""
        self._work.questions = tuple(questions)
        if loaded is not None:
            self._open[picture.digest] = loaded
        try:
            yield
        finally:
            self._work.questions = ()
            self._open.pop(picture.digest, None)

    def _loaded(self, picture: ImageRef) -> Loaded:
        loaded = self._open.get(picture.digest)
        if loaded is None:
            loaded = self._open[picture.digest] = load_source(picture.source, picture.root)
        if loaded.image.size != (picture.width, picture.height):
            raise DataError(
                f"The picture {picture.source} was changed while the run went on; start it again, so that it is read "
                "anew."
            )
        return loaded
