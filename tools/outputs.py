"""Whether two outputs of a cell say the same: numbers to a tolerance, pictures by their pixels, words exactly."""

from __future__ import annotations

import base64
import io
import math
import re
from itertools import zip_longest

import numpy as np
from PIL import Image

RTOL, ATOL = 1e-3, 1e-6
RMS = 2.0                       # of 255; one marker of a full-size figure in another place gives 3, a curve 20 and more

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)|(?<!\w)[-+]?(?:nan|inf)\b")
_EMBEDDED = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)")


def disagreement(mime: str, stored, new, *, rtol: float = RTOL, atol: float = ATOL, rms: float = RMS) -> str | None:
    """What is wrong with a new output of this type, or None where it agrees with the stored one."""
    if mime in ("image/png", "image/jpeg"):
        return _pictures_differ([stored], [new], rms)
    if not isinstance(stored, str) or not isinstance(new, str):
        return None if stored == new else f"{new!r} instead of {stored!r}"
    if problem := _pictures_differ(_EMBEDDED.findall(stored), _EMBEDDED.findall(new), rms):
        return problem
    a, b = (_EMBEDDED.sub("PICTURE", text) for text in (stored, new))
    return None if numbers_agree(a, b, rtol, atol) else f"stored:\n{a}\nnow:\n{b}"


# ------------------------------------------------------------------------------------------------- texts

def numbers_agree(stored: str, new: str, rtol: float = RTOL, atol: float = ATOL) -> bool:
    """Whether two texts are the same up to small differences of the numbers in them that are not integers.

    How many blanks stand beside a number does not count: a tensor is padded to the width of its widest entry.
    """
    if stored == new:
        return True
    if _words(stored) != _words(new):
        return False
    return all(_close(a, b, rtol, atol) for a, b in zip(_NUMBER.findall(stored), _NUMBER.findall(new), strict=True))


def _words(text: str) -> list[str]:
    return [" ".join(part.split()) for part in _NUMBER.split(text)]


def _close(a: str, b: str, rtol: float, atol: float) -> bool:
    if a == b:
        return True
    if not any(mark in (a + b).lower() for mark in ".en"):           # two integers; "n" is for nan and inf
        return False
    x, y = float(a), float(b)
    return math.isclose(x, y, rel_tol=rtol, abs_tol=atol) or (math.isnan(x) and math.isnan(y))


# ------------------------------------------------------------------------------------------------- pictures

def _pictures_differ(stored: list[str], new: list[str], rms: float) -> str | None:
    if stored == new:
        return None
    if len(stored) != len(new):
        return f"{len(new)} pictures instead of {len(stored)}"
    for number, (a, b) in enumerate(zip_longest(_decoded(stored), _decoded(new))):
        if a.shape != b.shape:
            return f"picture {number} has {b.shape[1]} x {b.shape[0]} pixels instead of {a.shape[1]} x {a.shape[0]}"
        distance = float(np.sqrt(np.mean((a - b) ** 2)))
        if distance > rms:
            return f"picture {number} differs by {distance:.1f} of 255 (root mean square); {rms:g} is allowed"
    return None


def _decoded(pictures: list[str]) -> list[np.ndarray]:
    """The pixels of pictures in base64, as they are seen.

    What is transparent shows the first picture, if that has the same size: the frames of a slider hold only what
    differs from the first.  Behind that is white.
    """
    images = [Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA") for picture in pictures]
    seen = []
    for image in images:
        ground = Image.new("RGBA", image.size, "white")
        if image.size == images[0].size:
            ground = Image.alpha_composite(ground, images[0])
        seen.append(np.asarray(Image.alpha_composite(ground, image).convert("RGB"), dtype=float))
    return seen
