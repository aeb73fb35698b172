"""Pictures that are none, or are meant to do harm, against a real server: refused in OpenAI's error shape, never a 500,
and the next good request is answered as before.
"""

import io
import struct
import zlib

from PIL import Image

from tests.serving.refusals import ask, chunk, expect, picture_url, png_of
from tests.serving.running import data_url


def test_what_is_no_picture(server):
    whole = data_url()
    head, _, payload = whole.partition(",")
    urls = [
        "data:",
        "data:image/png;base64,",
        "data:image/png,abc",
        "data:image/png;base64,äöü",
        whole.replace(",", ";"),
    ]
    urls += [f"{head},{cut}" for cut in (payload[:50], payload[1:], payload[::-1], payload.replace("A", "-"))]
    files = [(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), (b"<html></html>", "image/png")]
    files += [(b"%PDF-1.7 x", "application/pdf"), (b"\x00\x00\x00\x20ftypheic", "image/heic"), (b"GIF89a", "image/gif")]
    files += [(b"\x80\x04\x95cos\nsystem\n", "image/png"), (b"II*\x00\x08\x00\x00\x00", "image/tiff")]
    urls += [picture_url(data, kind) for data, kind in files]
    expect(server, [ask(url) for url in urls], 400, "invalid_image")


def test_addresses_are_not_followed(server):
    web = ["http://169.254.169.254/latest/meta-data/", "https://example.com/p.png", "http://localhost:22/", "https://"]
    web += ["http://127.0.0.1/", "HTTP://[::1]/", "https://user:pw@example.com/", "https://a\\@b.example/x", "http:x"]
    expect(server, [ask(url) for url in web], 422, "unprocessable_media")
    local = ["/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "../../x.png", "~/x.png", "\\\\host\\x", ""]
    local += ["ftp://example.com/x", "gopher://x", "javascript:1", "blob:x", "s3://b/k", "//example.com/x", "hf://x"]
    expect(server, [ask(url) for url in local], 400, "invalid_image")


def jpeg_with_scans(count):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def gif_of(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + bytes(6) + b","


def bmp_of(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def test_bombs(server):
    text_bomb = chunk(b"zTXt", b"c\x00\x00" + zlib.compress(bytes(200_000_000)))
    files = [
        png_of(60_000, 60_000),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(50_001, 1001),
        png_of(0, 0),
        png_of(1, 1),
        png_of(1, 60_000),
        png_of(60_000, 2),
        png_of(300, 300, rows=bytes(10)),
        png_of(30, 30, text_bomb),
        png_of(30, 30, chunk(b"iCCP", b"c\x00\x00" + zlib.compress(bytes(100_000_000)))),
        gif_of(65_535, 65_535),
        bmp_of(2**31 - 1, 2**31 - 1),
        bmp_of(40_000, -40_000),
        jpeg_with_scans(500),
        jpeg_with_scans(60_000),
    ]
    expect(server, [ask(picture_url(data)) for data in files], 400, "invalid_image")
