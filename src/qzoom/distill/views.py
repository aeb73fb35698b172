"""The pictures that steps look at: decoded once while their items are worked on, then let go."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qzoom.distill.crop import cut
from qzoom.distill.pictures import Loaded, load_source
from qzoom.distill.steps import Known, KnownQuestion
from qzoom.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.records import Item, Picture

__all__ = ["PictureViews"]


class PictureViews:
    """`qzoom.distill.steps.Views` over files and drawn pictures; threads may share it.

    Args:
        questions: (root, source) of a picture to the questions that come with it.
        capacity: decoded pictures kept at once.
    """

    def __init__(
        self, questions: Mapping[tuple[str, str], tuple[KnownQuestion, ...]] | None = None, capacity: int = 4
    ) -> None:
        self._questions = questions or {}
        self._capacity = capacity
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
            return Known(self._questions.get((picture.root, picture.source), ()))
        return self._loaded(picture).known

    def keep(self, picture: Picture, loaded: Loaded) -> None:
        """Remember a picture that was just opened."""
        with self._lock:
            self._kept[picture.digest] = loaded
            self._kept.move_to_end(picture.digest)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)

    def release(self, picture: Picture) -> None:
        """Let go of a picture whose items are done."""
        with self._lock:
            self._kept.pop(picture.digest, None)

    def _loaded(self, picture: Picture) -> Loaded:
        with self._lock:
            loaded = self._kept.get(picture.digest)
            if loaded is not None:
                self._kept.move_to_end(picture.digest)
        if loaded is None:
            known = self._questions.get((picture.root, picture.source), ())
            loaded = load_source(picture.source, picture.root, known)
            self.keep(picture, loaded)
        if loaded.image.size != (picture.width, picture.height):
            raise DataError(
                f"The picture {picture.source} was changed while the run went on; start it again, so that it is read "
                "anew."
            )
        return loaded
