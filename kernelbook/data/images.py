r"""Drawings of characters, for tasks with one example of each class.

**Omniglot** (Lake, Salakhutdinov and Tenenbaum, Science 350, 2015): characters of many alphabets, each drawn once by
each of 20 people, black on white, 105 x 105. Read from three archives in a folder, which stay packed:
``images_background_small1.zip`` and ``images_background_small2.zip`` hold five alphabets each, ``all_runs.zip`` the 20
runs of its authors' one-shot test, which have alphabets of their own.

1. *Ink.* A pixel is ink where it is darker than half of white. Ink is 1, paper 0.
2. *Classes.* A class is a character of an alphabet, ``Greek/character01``. Greek and Latin are in both archives: a
   character of the same name must have the same drawings in both, pixel by pixel, and is kept once.
3. *Splits.* The sha256 of the name decides: 15 % of the characters are valid, 15 % test, the rest train. No character
   is in two splits, but the alphabets are the same, and so are the people who drew them. The order is that of names.
4. *Runs.* A harder test, of alphabets that occur in no split: in each run 20 characters of one alphabet, of each the
   drawing to learn from and the one to classify. Two runs may have the same alphabet and then perhaps the same
   characters, which no name tells: compare characters within a run only.
5. *Size.* 32 x 32: a pixel is the share of ink in the square that it covers (``reduce``). That is the antialiasing: no
   stroke is lost between pixels, and the share of ink of the whole does not change.

**Result.** 5,840 drawings, of which 1,000 occur twice: 242 characters of 8 alphabets and 4,840 drawings. Of the
characters 173 are train, 35 valid, 34 test. The runs have 400 characters and 800 drawings.

**Digits.** The 1,797 handwritten digits that come with scikit-learn, 8 x 8, brought to 32 x 32 by bilinear
interpolation. They stand in for Omniglot where it is absent: 4 to 9 are train (1,077), 2 and 3 valid (360), 0 and 1
test (360). With six classes to learn from they are no substitute. For a system trained on Omniglot, telling 0 from 1 in
this test set is a task of another distribution.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .records import percentile

SIZE = 32
"""Height and width of the images, in pixels."""

ORIGINAL_SIZE = 105
"""Height and width of Omniglot's drawings."""

HELD_OUT_PERCENT = 15
"""The share of Omniglot's characters that is valid, and the share that is test."""

DIGITS = {"train": "456789", "valid": "23", "test": "01"}
"""Which digits each split of the stand-in has."""

BACKGROUND = ("images_background_small1.zip", "images_background_small2.zip")
RUNS = "all_runs.zip"

_CHARACTER = re.compile(r"(?:[^/]+/)?(?P<name>[^/]+/character\d+)/(?P<drawing>\d+_\d+)\.png")
_RUN = re.compile(r"(?:all_runs/)?(?P<name>run\d+/(?:training/class|test/item)\d+)(?P<drawing>)\.png")
_LABELS = re.compile(r"(?:all_runs/)?run\d+/class_labels\.txt")
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Images:
    """Images of equal size, by class.

    Attributes
    ----------
    pixels : Tensor
        Between 0 and 1; ink is 1.
    classes : Tensor
        The number of each image's class. They do not decrease: the images of a class stand together.
    names : list of str
        What the classes are called.
    groups : list of str
        Where each class belongs: its alphabet, or its run.
    groups_differ : bool
        Whether classes of different groups are known to be different.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or a class has no image.
    """

    pixels: Float[Tensor, "images size size"] = field(repr=False)
    classes: Int[Tensor, "images"] = field(repr=False)
    names: list[str]
    groups: list[str] = field(repr=False)
    groups_differ: bool = True

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if len(shape) != 3 or shape[1] != shape[2] or tuple(self.classes.shape) != shape[:1]:
            raise ValueError(f"expected pixels of shape (images, size, size) and as many classes, but the shapes are "
                             f"{shape} and {tuple(self.classes.shape)}")
        if len(self.groups) != len(self.names) or len(set(self.names)) != len(self.names):
            raise ValueError(f"expected one group for each of {len(self.names)} names, and no name twice")
        if self.classes.unique_consecutive().tolist() != list(range(len(self.names))):
            raise ValueError(f"classes must be 0, ..., 0, 1, ..., 1 up to {len(self.names) - 1}, each at least once")

    def __len__(self) -> int:
        return len(self.pixels)

    def counts(self) -> Int[Tensor, "classes"]:
        """How many images each class has."""
        return self.classes.bincount(minlength=len(self.names))

    def only(self, names: Sequence[str]) -> Self:
        """The images of some classes, which are numbered in the order given.

        Raises
        ------
        ValueError
            If there is no class of such a name.
        """
        if strange := [name for name in names if name not in self.names]:
            raise ValueError(f"there is no class {strange[0]!r}; the classes are {', '.join(self.names[:20])}"
                             f"{', ...' if len(self.names) > 20 else ''}")
        numbers = [self.names.index(name) for name in names]
        parts = [(self.classes == number).nonzero()[:, 0] for number in numbers]
        chosen = torch.cat([*parts, torch.zeros(0, dtype=torch.long, device=self.classes.device)])
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.long, device=self.classes.device)
        return type(self)(self.pixels[chosen], torch.arange(len(numbers), device=sizes.device).repeat_interleave(sizes),
                          list(names), [self.groups[number] for number in numbers], self.groups_differ)

    def rotated(self) -> Self:
        """Four times as many classes, for training: each class, and the same turned by 90, 180 and 270 degrees.

        A turned character counts as another one of another alphabet, ``Greek@90/character01``. Of a character that is
        the same when turned, such as a circle, this makes classes that cannot be told apart.
        """
        turns = [("" if k == 0 else f"@{90 * k}", k) for k in range(4)]

        def mark(name: str, turn: str) -> str:
            first, slash, rest = name.partition("/")
            return f"{first}{turn}{slash}{rest}"

        return type(self)(torch.cat([self.pixels.rot90(k, (1, 2)) for _, k in turns]),
                          torch.cat([self.classes + k * len(self.names) for _, k in turns]),
                          [mark(name, turn) for turn, _ in turns for name in self.names],
                          [mark(group, turn) for turn, _ in turns for group in self.groups], self.groups_differ)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(self.pixels.to(device), self.classes.to(device), self.names, self.groups, self.groups_differ)


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """Images in three splits that have no class in common.

    Attributes
    ----------
    name : str
        The name of the corpus.
    train, valid, test : Images
        The images.
    runs : Images or None
        For Omniglot, the drawings of the authors' one-shot test.
    origin : str
        Where they came from: ``"directory"``, or ``"installed"`` with a package that this library needs anyway.
    fingerprint : str
        sha256 of the drawings as they were read; it goes into every result record.
    licence, citation : str
        Terms of the images, and whom to cite.
    stands_in_for : str
        The corpus that would have been read if it were on this machine; empty if this one was asked for.
    """

    name: str
    train: Images = field(repr=False)
    valid: Images = field(repr=False)
    test: Images = field(repr=False)
    runs: Images | None = field(repr=False)
    origin: str
    fingerprint: str
    licence: str = ""
    citation: str = ""
    stands_in_for: str = ""

    noun: ClassVar[str] = "image"

    @property
    def splits(self) -> dict[str, Images]:
        """What there is by name: train, valid, test, and runs if there are any."""
        found = {"train": self.train, "valid": self.valid, "test": self.test}
        return found if self.runs is None else found | {"runs": self.runs}

    def summary(self) -> str:
        """Counts of classes and images, one line a split, below the name."""
        instead = f", in place of {self.stands_in_for}" if self.stands_in_for else ""
        source = {"directory": "a directory", "installed": "scikit-learn"}[self.origin]
        lines = [f"{self.name}: images, from {source}{instead}, sha256 {self.fingerprint[:12]}"]
        for split, images in self.splits.items():
            lines.append(f"  {split:<5} {len(images.names):>5,} classes  {len(set(images.groups)):>3,} groups  "
                         f"{len(images):>6,} images")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


# ----------------------------------------------------------------------------------------------------------- Omniglot


def read_omniglot(folder: Path) -> tuple[dict[str, Images], str]:
    """Omniglot from its three archives.

    Parameters
    ----------
    folder : Path
        Where they lie.

    Returns
    -------
    dict of Images
        Under ``"train"``, ``"valid"``, ``"test"`` and ``"runs"``.
    str
        The fingerprint: sha256 of all names and all ink, split by split.

    Raises
    ------
    DataError
        If an archive is missing, damaged or another one, if something in it is not a drawing, if a character lacks
        drawings, or differs between the archives, or if there are too few characters for a split.
    """
    if missing := [name for name in (*BACKGROUND, RUNS) if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which omniglot needs; copy the archives there as they "
                        "are, without unpacking them")
    characters: dict[str, NDArray] = {}
    for name in BACKGROUND:
        for character, drawings in _characters(folder / name).items():
            if not np.array_equal(characters.setdefault(character, drawings), drawings):
                raise DataError(f"{folder / name} has other drawings of {character} than the archive before it; the "
                                "two belong together: copy both again")
    parts: dict[str, dict[str, NDArray]] = {"train": {}, "valid": {}, "test": {}}
    for character in sorted(characters):
        place = percentile(character)
        split = "valid" if place < HELD_OUT_PERCENT else "test" if place < 2 * HELD_OUT_PERCENT else "train"
        parts[split][character] = characters[character]
    if empty := [split for split, part in parts.items() if not part]:
        raise DataError(f"{folder} has too few characters, {len(characters)}: none is left for {', '.join(empty)}")
    parts["runs"] = _runs(folder / RUNS)
    return {split: _images(part, split != "runs") for split, part in parts.items()}, _fingerprint(parts)


def _images(part: Mapping[str, NDArray], groups_differ: bool) -> Images:
    names = list(part)
    sizes = torch.tensor([len(drawings) for drawings in part.values()])
    pixels = torch.cat([reduce(torch.from_numpy(drawings)) for drawings in part.values()])
    return Images(pixels, torch.arange(len(names)).repeat_interleave(sizes), names,
                  [name.partition("/")[0] for name in names], groups_differ)


def _fingerprint(parts: Mapping[str, Mapping[str, NDArray]]) -> str:
    digest = hashlib.sha256()
    for split, part in parts.items():
        for name, drawings in part.items():
            digest.update(json.dumps([split, name, list(drawings.shape), str(drawings.dtype)]).encode())
            digest.update(np.ascontiguousarray(drawings).tobytes())
    return digest.hexdigest()


def reduce(ink: Tensor, size: int = SIZE) -> Float[Tensor, "images size size"]:
    r"""Smaller images: each pixel is the mean of the square that it covers, :math:`AXA^\top`.

    :math:`A_{ij}` is the share of the old pixel :math:`j` in the new pixel :math:`i`; old pixels that lie on an edge
    count for both sides in proportion. Rows of :math:`A` sum to 1, columns to `size` over the old size.

    Parameters
    ----------
    ink : Tensor
        ``(images, n, n)`` with `n` at least `size`.
    size : int
        The new height and width.
    """
    n = ink.shape[-1]
    edges = torch.arange(size + 1, dtype=torch.float64) * n / size
    old = torch.arange(n, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)
    A = (overlap.clamp(min=0) * size / n).float()
    return (A @ ink.float() @ A.T).clamp(0, 1)


def _characters(path: Path) -> dict[str, NDArray]:
    """The drawings of each character, in the order of their files."""
    found: dict[str, dict[str, NDArray]] = {}
    for match, drawing in _drawings(path, _CHARACTER, "ALPHABET/characterNN/NNNN_NN.png"):
        found.setdefault(match["name"], {})[match["drawing"]] = drawing
    most = max(map(len, found.values()))
    if lacking := [name for name, drawings in found.items() if len(drawings) < most]:
        raise DataError(f"{path} has {len(found[lacking[0]])} of {most} drawings of {lacking[0]}; copy the file again")
    return {name: np.stack([drawings[key] for key in sorted(drawings)]) for name, drawings in found.items()}


def _runs(path: Path) -> dict[str, NDArray]:
    """The two drawings of each character of each run: the one to learn from, then the one to classify."""
    drawings = {match["name"]: drawing
                for match, drawing in _drawings(path, _RUN, "runNN/training/classNN.png and runNN/test/itemNN.png")}
    pairs: dict[str, NDArray] = {}
    with _archive(path) as archive:
        texts = [_read(path, archive, member).decode("ascii", "replace")
                 for member in archive.infolist() if _LABELS.fullmatch(member.filename)]
    for line in filter(None, "\n".join(texts).splitlines()):
        item, _, known = (word.removesuffix(".png") for word in line.partition(" "))
        name = known.replace("training/", "")
        if item not in drawings or known not in drawings or name in pairs or item.split("/")[0] != known.split("/")[0]:
            raise DataError(f"{path} says in a class_labels.txt {line!r}, but there is no such pair of drawings, or "
                            "one is in two pairs; copy the file again")
        pairs[name] = np.stack([drawings[known], drawings.pop(item)])
    if len(drawings) != len(pairs):
        raise DataError(f"{path} has {len(drawings) - len(pairs)} drawings that no class_labels.txt names; copy the "
                        "file again")
    return dict(sorted(pairs.items()))


def _drawings(path: Path, pattern: re.Pattern, expected: str) -> Iterator[tuple[re.Match, NDArray]]:
    """The images of an archive: the parts of their names, and where there is ink."""
    some = False
    with _archive(path) as archive:
        for member in archive.infolist():
            name = member.filename
            if not name.endswith(".png") or name.startswith("__MACOSX/"):
                continue
            if not (match := pattern.fullmatch(name)):
                raise DataError(f"{path} holds {name}; expected {expected}: it is another archive")
            some = True
            yield match, _decode(f"{name} in {path}", _read(path, archive, member))
    if not some:
        raise DataError(f"{path} holds no {expected}: it is another archive")


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise DataError(f"{path} is no zip archive, or was truncated ({error}); copy the file again") from error


def _read(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except _DAMAGE as error:
        raise DataError(f"{member.filename} in {path} is damaged ({error}); copy the file again") from error


def _decode(what: str, content: bytes) -> NDArray:
    """1 where there is ink, 0 on paper."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            size = image.size
            if size == (ORIGINAL_SIZE, ORIGINAL_SIZE):      # before it is unpacked, whatever size it claims
                return (np.asarray(image.convert("L")) < 128).astype(np.uint8)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{what} is not a PNG image ({error}); copy the file again") from error
    raise DataError(f"{what} has {size[0]} x {size[1]} pixels; expected {ORIGINAL_SIZE} x {ORIGINAL_SIZE}")


# ------------------------------------------------------------------------------------------------------------- digits


def read_digits() -> tuple[dict[str, Images], str]:
    """The digits of scikit-learn, in splits by digit; and their fingerprint.

    Returns
    -------
    dict of Images
        Under ``"train"``, ``"valid"`` and ``"test"``.
    str
        sha256 of the names and of the pixels as they come.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    parts = {split: {digit: found.images[found.target == int(digit)].astype(np.uint8) for digit in digits}
             for split, digits in DIGITS.items()}
    splits = {}
    for split, part in parts.items():
        small = torch.from_numpy(np.concatenate(list(part.values()))).float() / 16
        pixels = F.interpolate(small[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
        sizes = torch.tensor([len(images) for images in part.values()])
        splits[split] = Images(pixels, torch.arange(len(part)).repeat_interleave(sizes), list(part),
                               ["digits"] * len(part))
    return splits, _fingerprint(parts)
