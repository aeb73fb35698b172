"""Small PDFs, written by hand: pages of text, with what a test adds to their objects."""

import io
import zlib

from PIL import Image


def pdf(texts, *, size=(300, 200), catalog="", page="", extra=(), trailer="", packed=False):
    """A PDF with one page of one large text each.

    `catalog`, `page` and `trailer` are added to these dictionaries; `extra` are further objects, whose numbers begin
    at 10 + 2 * pages. Object 1 is the catalog, 2 the tree of pages, 3 the font; pages are 10, 12, ...
    """
    objects = {3: b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"}
    for i, text in enumerate(texts):
        content = f"BT /F 24 Tf 20 {size[1] - 60} Td ({text}) Tj ET".encode()
        filters = ""
        if packed:
            content, filters = zlib.compress(content), "/Filter/FlateDecode"
        objects[11 + 2 * i] = b"<</Length %d%s>>stream\n%s\nendstream" % (len(content), filters.encode(), content)
        box = f"/MediaBox[0 0 {size[0]} {size[1]}]/Resources<</Font<</F 3 0 R>>>>"
        objects[10 + 2 * i] = f"<</Type/Page/Parent 2 0 R{box}/Contents {11 + 2 * i} 0 R{page}>>".encode()
    for i, body in enumerate(extra):
        objects[10 + 2 * len(texts) + i] = body if isinstance(body, bytes) else body.encode()
    kids = " ".join(f"{10 + 2 * i} 0 R" for i in range(len(texts)))
    objects[1] = f"<</Type/Catalog/Pages 2 0 R{catalog}>>".encode()
    objects[2] = f"<</Type/Pages/Kids[{kids}]/Count {len(texts)}>>".encode()
    out, places = bytearray(b"%PDF-1.7\n"), {}
    for number, body in sorted(objects.items()):
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start, count = len(out), max(objects) + 1
    out += b"xref\n0 %d\n" % count
    for number in range(count):
        out += b"%010d %05d %c \n" % (places.get(number, 0), 0 if number in places else 65535, b"fn"[number in places])
    ending = f"trailer\n<</Size {count}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF\n"
    return bytes(out) + ending.encode()


def locked():
    """Pages that only a password opens."""
    key = "00" * 32
    encrypt = f"<</Filter/Standard/V 1/R 2/P -4/O<{key}>/U<{key}>>>"
    return pdf(["a"], extra=[encrypt], trailer=f"/Encrypt 12 0 R/ID[<{key[:32]}><{key[:32]}>]")


def of_pictures(pictures, dpi=72):
    """A PDF whose pages are pictures, as scanners write them."""
    out = io.BytesIO()
    first, *rest = [picture if isinstance(picture, Image.Image) else Image.open(picture) for picture in pictures]
    first.convert("RGB").save(out, "PDF", save_all=True, append_images=[p.convert("RGB") for p in rest], resolution=dpi)
    return out.getvalue()
