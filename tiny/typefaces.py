"""Typefaces for drawn training pictures: what Debian's `fonts-*` packages have put on this machine.

Training only; held-out pictures use the faces that matplotlib ships. `apt-get install` the packages of `PACKAGES` for
the faces of the published recipe; whatever is missing is left out, and the names that were used are part of the
renderer version, so that pictures of two machines are never mixed in one pack.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from qzoom.data.synthetic.page import font_paths

FOLDER = Path("/usr/share/fonts")

PACKAGES = (
    "fonts-3270", "fonts-adf-gillius", "fonts-adf-switzera", "fonts-adf-verana", "fonts-agave",
    "fonts-anonymous-pro", "fonts-b612", "fonts-cabin", "fonts-cantarell", "fonts-clear-sans", "fonts-cmu",
    "fonts-comfortaa", "fonts-comic-neue", "fonts-courier-prime", "fonts-croscore", "fonts-crosextra-caladea",
    "fonts-crosextra-carlito", "fonts-dejavu-core", "fonts-dejavu-extra", "fonts-dustin", "fonts-fantasque-sans",
    "fonts-firacode", "fonts-freefont-ttf", "fonts-glasstty", "fonts-gnutypewriter", "fonts-go", "fonts-hack-ttf",
    "fonts-hermit", "fonts-inconsolata", "fonts-inter", "fonts-jetbrains-mono", "fonts-karla", "fonts-lato",
    "fonts-league-mono", "fonts-levien-typoscript", "fonts-liberation", "fonts-lmodern", "fonts-manrope",
    "fonts-monofur", "fonts-mononoki", "fonts-nanum-coding", "fonts-noto-mono", "fonts-ocr-a", "fonts-ocr-b",
    "fonts-open-sans", "fonts-opendin", "fonts-oxygen", "fonts-paratype", "fonts-pc", "fonts-pc-extra",
    "fonts-play", "fonts-quattrocento", "fonts-roadgeek", "fonts-roboto-unhinted", "fonts-sil-andika",
    "fonts-sil-gentium-basic", "fonts-texgyre", "fonts-tlwg-mono-ttf", "fonts-tlwg-typewriter-ttf", "fonts-tuffy",
    "fonts-ubuntu-title", "fonts-urw-base35", "fonts-vollkorn", "fonts-yanone-kaffeesatz",
)  # fmt: skip

_LEFT_OUT = (
    "italic",
    "oblique",
    "symbol",
    "dingbat",
    "z003",
    "math",
    "d050000l",
    "black",
    "thin",
    "extralight",
    "icon",
)
_LIKE_TILLS = ("mono", "courier", "typewriter", "ocr", "3270", "tty", "pc", "code", "hermit", "agave", "inconsolata")


@lru_cache(maxsize=1)
def typefaces() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of all usable faces, and of those that look like a till's (fixed pitch), each in a fixed order."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.rglob("*")):
        name = path.name.lower()
        if path.suffix.lower() not in (".ttf", ".otf") or any(word in name for word in _LEFT_OUT):
            continue
        if printable(str(path)):
            found.setdefault(path.name, str(path))
    every = (*font_paths("train"), *found.values())
    tills = tuple(p for p in every if any(word in Path(p).name.lower() for word in _LIKE_TILLS) or "cmtt" in p)
    return every, tills or every


def printable(path: str) -> bool:
    """Whether the face opens and draws letters, digits and punctuation, each in its own way."""
    from PIL import ImageFont

    try:
        face = ImageFont.truetype(path, 24, layout_engine=ImageFont.Layout.BASIC)
        missing = bytes(face.getmask("\uffff"))
        drawn = [bytes(face.getmask(char)) for char in "AaRg08$:./-%(&#@"]
    except (OSError, ValueError):
        return False
    return all(shape and shape != missing for shape in drawn) and len(set(drawn)) == len(drawn)


def typeface_digest() -> str:
    """Eight hex digits of the names of all faces."""
    names = "\n".join(Path(path).name for path in typefaces()[0])
    return hashlib.sha256(names.encode()).hexdigest()[:8]
