"""Draws the example documents of this folder: a till receipt and a delivery note that look like scans.

Shops, people, numbers and prices are invented. Everything comes from fixed seeds and from the typefaces that matplotlib
ships, so that the pictures can be made again:

    python examples/make_examples.py examples
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

PAPER = 250
INK = 38


@dataclass(frozen=True, slots=True)
class Item:
    """One line of goods: name, pieces and price per piece in cents."""

    name: str
    pieces: int
    price_cents: int

    @property
    def cost_cents(self) -> int:
        """Pieces times price."""
        return self.pieces * self.price_cents


GROCERIES = (
    Item("WHITE BREAD 400G", 2, 320),
    Item("FRESH MILK 1L", 1, 785),
    Item("CHICKEN EGGS 10S", 1, 640),
    Item("JASMINE RICE 5KG", 1, 2690),
    Item("CHILI SAUCE 340G", 2, 455),
    Item("GREEN TEA 25S", 1, 899),
    Item("DISH SOAP 900ML", 1, 575),
    Item("PAPER TOWEL 6S", 1, 1250),
)
PARTS = (
    Item("Copper pipe 15 mm, 3 m", 12, 1840),
    Item("Ball valve 1/2 inch", 4, 2275),
    Item("Elbow joint 90 deg", 30, 165),
    Item("Thread seal tape 12 mm", 20, 95),
    Item("Pressure gauge 0-10 bar", 2, 3980),
    Item("Pipe clamp, rubber lined", 48, 120),
    Item("Flexible hose 60 cm", 6, 1435),
)


def money(cents: int) -> str:
    """An amount as tills print it."""
    return f"{cents / 100:,.2f}"


class Sheet:
    """A sheet of paper with a pen that moves down."""

    def __init__(self, width_px: int, height_px: int) -> None:
        self.image = Image.new("L", (width_px, height_px), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y_px = 0

    def text(self, x_px: float, text: str, face: str, size_px: int, align: str = "left", *, ink: int = INK) -> None:
        """Print at the pen's height; x is the left edge, the right edge or the centre."""
        anchor = {"left": "la", "right": "ra", "centre": "ma"}[align]
        self.draw.text((x_px, self.y_px), text, font=font(face, size_px), fill=ink, anchor=anchor)

    def rule(self, left_px: int, right_px: int, dash_px: int = 0) -> None:
        """A line across, solid or dashed."""
        step = 2 * dash_px or right_px - left_px
        for x in range(left_px, right_px, step):
            self.draw.line((x, self.y_px, min(x + (dash_px or step), right_px), self.y_px), fill=INK, width=2)

    def down(self, pixels: int) -> None:
        """Move the pen."""
        self.y_px += pixels


def font(face: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A typeface that ships with matplotlib."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), size_px)


def draw_receipt() -> Image.Image:
    """A till receipt, 900 x 1900 px, printed characters about 16 px high."""
    sheet = Sheet(900, 1900)
    left, right, middle = 130, 770, 450
    sheet.down(120)
    for line, size in (("KEDAI RUNCIT MERANTI", 34), ("SDN BHD", 34)):
        sheet.text(middle, line, "DejaVuSans-Bold", size, "centre")
        sheet.down(44)
    sheet.down(6)
    for line in (
        "(CO. REG: 481207-K)",
        "NO. 27, JALAN KENANGA 3/5",
        "TAMAN SERI INDAH, 81200 JOHOR BAHRU",
        "TEL: 07-555 0182",
    ):
        sheet.text(middle, line, "DejaVuSans", 21, "centre")
        sheet.down(30)
    sheet.down(14)
    sheet.text(middle, "TAX INVOICE", "DejaVuSans-Bold", 24, "centre")
    sheet.down(46)
    for label, value in (
        ("INVOICE NO", "R-0074913"),
        ("DATE", "14/03/2019  18:42"),
        ("CASHIER", "NURUL"),
        ("TERMINAL", "02"),
    ):
        sheet.text(left, f"{label:<11}: {value}", "DejaVuSansMono", 22)
        sheet.down(32)
    sheet.down(8)
    _goods(sheet, left, right)
    _sums(sheet, left, right)
    sheet.down(30)
    for line in ("GOODS SOLD ARE NOT RETURNABLE", "THANK YOU, PLEASE COME AGAIN"):
        sheet.text(middle, line, "DejaVuSans", 20, "centre")
        sheet.down(30)
    _bars(sheet, middle - 190, 380, 70)
    return sheet.image


def _goods(sheet: Sheet, left: int, right: int) -> None:
    sheet.rule(left, right, 8)
    sheet.down(12)
    sheet.text(left, "ITEM", "DejaVuSansMono", 22)
    sheet.text(right, "RM", "DejaVuSansMono", 22, "right")
    sheet.down(36)
    sheet.rule(left, right, 8)
    sheet.down(14)
    for item in GROCERIES:
        sheet.text(left, item.name, "DejaVuSansMono", 22)
        sheet.down(30)
        sheet.text(left + 40, f"{item.pieces} X {money(item.price_cents)}", "DejaVuSansMono", 22)
        sheet.text(right, money(item.cost_cents), "DejaVuSansMono", 22, "right")
        sheet.down(36)
    sheet.rule(left, right, 8)
    sheet.down(16)


def _sums(sheet: Sheet, left: int, right: int) -> None:
    subtotal = sum(item.cost_cents for item in GROCERIES)
    total = round(subtotal / 5) * 5
    cash = 10000
    rows = (
        ("SUBTOTAL", money(subtotal), "DejaVuSansMono"),
        ("ROUNDING", money(total - subtotal), "DejaVuSansMono"),
        ("TOTAL RM", money(total), "DejaVuSansMono-Bold"),
        ("CASH", money(cash), "DejaVuSansMono"),
        ("CHANGE", money(cash - total), "DejaVuSansMono"),
    )
    for label, value, face in rows:
        sheet.text(left, label, face, 24)
        sheet.text(right, value, face, 24, "right")
        sheet.down(38)
    sheet.rule(left, right, 8)
    sheet.down(10)
    sheet.text(left, f"ITEMS: {sum(item.pieces for item in GROCERIES)}", "DejaVuSansMono", 20)
    sheet.down(36)


def _bars(sheet: Sheet, left: int, width: int, height: int) -> None:
    """Stripes that look like a bar code (they hold no code)."""
    rng = np.random.default_rng(5)
    sheet.down(30)
    x = left
    while x < left + width:
        bar = int(rng.integers(2, 7))
        sheet.draw.rectangle((x, sheet.y_px, x + bar - 1, sheet.y_px + height), fill=INK)
        x += bar + int(rng.integers(2, 7))
    sheet.down(height + 10)


def draw_note() -> Image.Image:
    """A delivery note, 1240 x 1754 px, with a ruled table in small type."""
    sheet = Sheet(1240, 1754)
    left, right = 110, 1130
    sheet.down(110)
    sheet.text(left, "Hartmann & Osei Fittings", "DejaVuSerif-Bold", 38)
    sheet.text(right, "DELIVERY NOTE", "DejaVuSans-Bold", 34, "right")
    sheet.down(56)
    sheet.text(left, "14 Canal Wharf, Milbridge MB3 7QT", "DejaVuSerif", 20)
    sheet.text(right, "No. DN-20583", "DejaVuSans", 22, "right")
    sheet.down(32)
    sheet.text(left, "Phone 0555 401 772", "DejaVuSerif", 20)
    sheet.text(right, "Date: 22 May 2024", "DejaVuSans", 22, "right")
    sheet.down(60)
    sheet.rule(left, right)
    sheet.down(26)
    for label, value in (
        ("Customer", "Adeline Fournier"),
        ("Site", "Old Mill, Block C, Unit 9"),
        ("Order", "PO-7716-B"),
        ("Driver", "K. Lindqvist"),
    ):
        sheet.text(left, label, "DejaVuSans-Bold", 20)
        sheet.text(left + 180, value, "DejaVuSans", 20)
        sheet.down(34)
    sheet.down(30)
    _table(sheet, left, right)
    sheet.down(50)
    total = sum(item.cost_cents for item in PARTS)
    for label, value, face in (
        ("Goods", money(total), "DejaVuSans"),
        ("Delivery", money(1850), "DejaVuSans"),
        ("Total", money(total + 1850), "DejaVuSans-Bold"),
    ):
        sheet.text(right - 330, label, face, 22)
        sheet.text(right - 16, value, face, 22, "right")
        sheet.down(38)
    sheet.down(150)
    sheet.rule(left, left + 380)
    sheet.down(10)
    sheet.text(left, "Received in good order (signature)", "DejaVuSans", 17)
    return sheet.image


def _table(sheet: Sheet, left: int, right: int) -> None:
    edges = (left, left + 90, left + 570, left + 690, left + 850, right)
    top = sheet.y_px
    rows = [("Pos", "Article", "Pcs", "Price", "Amount")]
    rows += [
        (str(i), item.name, str(item.pieces), money(item.price_cents), money(item.cost_cents))
        for i, item in enumerate(PARTS, start=1)
    ]
    for number, row in enumerate(rows):
        sheet.rule(left, right)
        sheet.down(11)
        face = "DejaVuSans-Bold" if number == 0 else "DejaVuSans"
        for column, text in enumerate(row):
            if column < 2:
                sheet.text(edges[column] + 12, text, face, 19)
            else:
                sheet.text(edges[column + 1] - 16, text, face, 19, "right")
        sheet.down(35)
    sheet.rule(left, right)
    for x in edges:
        sheet.draw.line((x, top, x, sheet.y_px), fill=INK, width=2)


def stamp(sheet: Image.Image, text: str, centre_px: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """The sheet in colour with a worn rubber stamp on it."""
    width, height = 330, 110
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    draw.rounded_rectangle((5, 5, width - 6, height - 6), 14, outline=210, width=6)
    draw.text((width / 2, height / 2), text, font=font("DejaVuSans-Bold", 44), fill=210, anchor="mm")
    wear = np.random.default_rng(3).random((height // 3 + 1, width // 3 + 1)) > 0.16
    worn = Image.fromarray((wear * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    mask = ImageChops.multiply(mask, worn).rotate(11, Image.Resampling.BICUBIC, expand=True)
    page = sheet.convert("RGB")
    page.paste(colour, (centre_px[0] - mask.width // 2, centre_px[1] - mask.height // 2), mask)
    return page


def scan(page: Image.Image, angle_deg: float, crease: float, seed: int) -> Image.Image:
    """The page as a cheap scanner gives it: a little turned, soft, uneven light, grain, worn ink, one fold."""
    rng = np.random.default_rng(seed)
    width, height = page.size
    page = page.rotate(angle_deg, Image.Resampling.BICUBIC, fillcolor=PAPER if page.mode == "L" else (PAPER,) * 3)
    page = page.filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(page.convert("RGB")).astype(np.float32)
    worn = rng.random((height // 2 + 1, width // 2 + 1)) < 0.04
    pixels += np.repeat(np.repeat(worn, 2, 0), 2, 1)[:height, :width, None] * (PAPER - pixels) * 0.5
    light = Image.fromarray(rng.random((5, 3)).astype(np.float32), mode="F").resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels -= (np.asarray(light) * 14.0)[:, :, None]
    rows = np.abs(np.arange(height) - crease * height)[:, None]
    fold = np.where(rows < 3, 26.0, 12.0 * np.exp(-rows / 30.0)) * (rng.random((1, width)) * 0.5 + 0.5)
    pixels -= fold[:, :, None].astype(np.float32)
    across = np.arange(width)[None, :]
    edge = 26.0 * (np.exp(-across / 14.0) + np.exp(-(width - across) / 22.0))
    pixels -= edge[:, :, None].astype(np.float32)
    pixels += (rng.standard_normal((height, width)) * 5.0)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    receipt = scan(draw_receipt(), angle_deg=0.3, crease=0.42, seed=12).convert("L")
    receipt.save(folder / "receipt.jpg", quality=82, optimize=True)
    note = scan(stamp(draw_note(), "RECEIVED", (380, 1068), (58, 74, 168)), angle_deg=-0.5, crease=0.5, seed=12)
    note.save(folder / "delivery-note.jpg", quality=80, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
