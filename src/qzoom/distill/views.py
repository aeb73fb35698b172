"""The pictures that steps look at: decoded once while their items are worked on, then let go."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qzoom.distill.crop import cut
from qzoom.distill.items import Known, KnownQuestion
from qzoom.distill.pictures import Loaded, load_source
from qzoom.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.items import Item, Picture

__all__ = ["PictureViews"]


class PictureViews:
    """`qzoom.distill.items.Views` over files and drawn pictures; threads may share it.

    Args:
        capacity: decoded pictures kept at once.
    """

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._questions: dict[str, tuple[KnownQuestion, ...]] = {}
        self._kept: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()

    def whole(self, item: Item) -> Image:
        """See `Views.whole`."""
        return self._loaded(item.picture).image

    def crop(self, item: Item) -> Image:
        """See `Views.crop`."""
        if item.region is None:
            raise DataError(f"The item {item.id} has no region to look at; run the propose step first.")
        return cut(self.whole(item), item.region.crop_box, item.region.scale)

    def known(self, item: Item) -> Known:
        """See `Views.known`; nothing is decoded for it unless the picture is a drawn one."""
        picture = item.picture
        if picture.root:
            return Known(self._questions.get(picture.digest, ()))
        return self._loaded(picture).known

    @contextmanager
    def working_on(
        self, picture: Picture, questions: Sequence[KnownQuestion], loaded: Loaded | None = None
    ) -> Iterator[None]:
        """Keep a picture at hand for as long as its items are worked on.

        Args:
            picture: which.
            questions: those that come with it.
            loaded: its pixels, when it was just opened.
        """
        with self._lock:
            self._questions[picture.digest] = tuple(questions)
        if loaded is not None:
            self._keep(picture, loaded)
        try:
            yield
        finally:
            with self._lock:
                self._questions.pop(picture.digest, None)
                self._kept.pop(picture.digest, None)

    def _keep(self, picture: Picture, loaded: Loaded) -> None:
        with self._lock:
            self._kept[picture.digest] = loaded
            self._kept.move_to_end(picture.digest)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)

    def _loaded(self, picture: Picture) -> Loaded:
        with self._lock:
            loaded = self._kept.get(picture.digest)
            if loaded is not None:
                self._kept.move_to_end(picture.digest)
        if loaded is None:
            loaded = load_source(picture.source, picture.root)
            self._keep(picture, loaded)
        if loaded.image.size != (picture.width, picture.height):
            raise DataError(
                f"The picture {picture.source} was changed while the run went on; start it again, so that it is read "
                "anew."
            )
        return loaded
