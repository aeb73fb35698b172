import os

import numpy as np
import pytest
from PIL import Image

from qzoom.distill.items import Item
from qzoom.distill.pictures import ImageSource, Views, list_sources, scan
from qzoom.errors import ConfigError, ImageError
from qzoom.images.load import picture_digest
from tests.distill.data import make_pictures


def test_sources_are_listed(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "notes.txt", "b/.hidden/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    names = [source.source for source in list_sources([str(tmp_path)])]
    assert names == ["a.webp", "b/1.jpg", "b/2.PNG", "b/.hidden/3.png"]
    source = list_sources(["scenes:4:2"])[1]
    picture, loaded = scan(source)
    assert (picture.source, picture.dataset) == ("scenes:5", "scenes")
    assert loaded.known.objects
    codes = {question.answer for question in loaded.known.questions if question.field == "code"}
    assert codes <= {text for text, _ in loaded.known.texts}
    again, _ = scan(source)
    assert again == picture


def test_a_question_file_gives_each_picture_once_with_its_questions(tmp_path):
    sources = list_sources([str(make_pictures(tmp_path, 2, places=3))])
    assert [(one.source, len(one.questions)) for one in sources] == [("0.png", 3), ("1.png", 3)]
    assert sources[1].questions[2].boxes == ((280, 150, 340, 190),)


def test_digest_is_of_pixels_and_key_of_the_file(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(2, 8, 3)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    digests = {scan(ImageSource(name, str(tmp_path), "x"))[0].digest for name in ("a.png", "b.bmp")}
    assert digests == {picture_digest(image)}
    assert picture_digest(Image.fromarray(pixels.reshape(4, 4, 3))) not in digests
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    source = ImageSource("a.png", str(tmp_path), "x")
    before = source.key
    assert source.key == before
    os.utime(path, (1, 1))
    assert source.key != before


def test_names_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor a question file"):
        list_sources([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="holds no"):
        list_sources([str(tmp_path)])
    with pytest.raises(ConfigError, match="kept for evaluation"):
        list_sources([f"scenes:{2**31}:1"])


def test_views_decode_a_picture_once_while_it_is_worked_on(tmp_path):
    make_pictures(tmp_path, 1)
    source = ImageSource("0.png", str(tmp_path), "x")
    picture, _ = scan(source)
    views = Views()
    item = Item(picture)
    with views.working_on(picture, source.questions):
        first = views.whole(item)
        (tmp_path / "0.png").unlink()
        assert views.whole(item) is first
    with pytest.raises(ImageError, match="missing"):
        views.whole(item)
