import numpy as np

from qzoom.plots.text import ACCENTS, COARSE, INK, MUTED, PAPER, font, font_folder


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_fonts_and_readable_texts():
    assert (font_folder() / "DejaVuSans.ttf").is_file()
    assert font(20).getname() == ("DejaVu Sans", "Book")
    assert font(20, "bold").getname() == ("DejaVu Sans", "Bold")
    assert font(40).getlength("abc") > 1.8 * font(20).getlength("abc")
    for colour, least in ((INK, 12), (MUTED, 4.5), (COARSE, 4.5), (ACCENTS[0], 3)):
        assert (luminance(PAPER) + 0.05) / (luminance(colour) + 0.05) >= least
