"""Drawings of characters from packed archives, and the digits that stand in for them."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kernelbook import data
from kernelbook.data import images
from kernelbook.data.images import Images
from kernelbook.data.records import percentile

ONE, TWO, RUNS = "images_background_small1.zip", "images_background_small2.zip", "all_runs.zip"
ALPHABETS = {ONE: ("Greek", "Korean"), TWO: ("Greek", "Latin")}
PEOPLE, CHARACTERS = 3, 12


def png(ink, mode="1"):
    file = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert(mode).save(file, "PNG")
    return file.getvalue()


def drawing(*names):
    """Where there is ink, the same for the same names only."""
    rng = np.random.default_rng([ord(c) for c in "/".join(map(str, names))])
    return rng.random((105, 105)) < 0.05


def omniglot(mode="1"):
    """The members of a tiny set of the three archives."""
    members = {archive: {} for archive in (ONE, TWO, RUNS)}
    for archive, alphabets in ALPHABETS.items():
        top = archive.removesuffix(".zip")
        for alphabet in alphabets:
            for c in range(1, CHARACTERS + 1):
                for person in range(1, PEOPLE + 1):
                    name = f"{top}/{alphabet}/character{c:02}/{100 + c:04}_{person:02}.png"
                    members[archive][name] = png(drawing(alphabet, c, person), mode)
    for run in ("run01", "run02"):
        lines = []
        for item, c in ((1, 2), (2, 1)):
            members[RUNS][f"{run}/test/item{item:02}.png"] = png(drawing(run, "test", item), mode)
            members[RUNS][f"{run}/training/class{c:02}.png"] = png(drawing(run, "training", c), mode)
            lines.append(f"{run}/test/item{item:02}.png {run}/training/class{c:02}.png\n")
        members[RUNS][f"{run}/class_labels.txt"] = "".join(lines).encode()
    return members


def write(folder, members, method=zipfile.ZIP_DEFLATED):
    folder.mkdir(parents=True, exist_ok=True)
    for archive, content in members.items():
        with zipfile.ZipFile(folder / archive, "w", method) as file:
            for name, member in content.items():
                file.writestr(name, member)
    return folder


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data" / "omniglot", omniglot())


def test_every_character_is_read_once_and_is_in_one_split(folder):
    corpus = data.load_images("omniglot", data_dir=folder)
    names = [set(part.names) for part in corpus.splits.values()]
    assert [len(part) for part in names] == [22, 5, 9, 4] and len(set.union(*names)) == 40     # Greek once: 3 x 12 + 4
    for split, part in corpus.splits.items():
        assert part.counts().tolist() == [2 if split == "runs" else PEOPLE] * len(part.names)
        assert part.groups == [name.split("/")[0] for name in part.names]
        assert part.groups_differ is (split != "runs")
    assert str(corpus).startswith(f"omniglot: images, from a directory, sha256 {corpus.fingerprint[:12]}")
    assert (corpus.origin, corpus.stands_in_for, corpus.licence) == ("directory", "", "MIT")
    assert "train    22 classes    3 groups      66 images" in str(corpus)


def test_the_name_decides_so_that_no_character_moves_when_others_come(folder):
    corpus = data.load_images("omniglot", data_dir=folder)
    for name in (name for split, part in corpus.splits.items() if split != "runs" for name in part.names):
        expected = "valid" if percentile(name) < 15 else "test" if percentile(name) < 30 else "train"
        assert name in corpus.splits[expected].names


def test_a_drawing_keeps_its_place_its_ink_and_its_class(folder):
    corpus = data.load_images("omniglot", data_dir=folder)
    part = corpus.train
    for name in ("Greek/character03", "Latin/character09"):
        alphabet, c = name.split("/character")
        found = part.pixels[part.classes == part.names.index(name)]
        expected = torch.stack([torch.from_numpy(drawing(alphabet, int(c), p + 1)) for p in range(PEOPLE)])
        assert torch.equal(found, images.reduce(expected))
    runs, expected = corpus.runs, (drawing("run02", "training", 1), drawing("run02", "test", 2))
    found = runs.pixels[runs.classes == runs.names.index("run02/class01")]
    assert torch.equal(found, images.reduce(torch.from_numpy(np.stack(expected))))      # class_labels.txt pairs them


@given(st.integers(32, 110), st.integers(1, 32), st.integers(0, 10_000))
def test_a_pixel_is_the_mean_of_what_it_covers(n, size, seed):
    ink = torch.rand(2, n, n, generator=torch.Generator().manual_seed(seed)) < 0.3
    found = images.reduce(ink, size)
    # By definition: cut each pixel into size x size pieces, then take means of n x n of them.
    fine = ink.double().repeat_interleave(size, 1).repeat_interleave(size, 2)
    expected = fine.view(2, size, n, size, n).mean((2, 4))
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
    assert torch.allclose(found.mean((1, 2)), ink.float().mean((1, 2)), atol=1e-5)


def test_the_fingerprint_is_that_of_the_drawings_not_of_the_files(tmp_path, folder):
    before = data.load_images("omniglot", data_dir=folder)
    members = {archive: dict(reversed(content.items())) for archive, content in omniglot("RGB").items()}
    again = data.load_images(data_dir=write(tmp_path / "again", members, zipfile.ZIP_STORED))
    assert again.fingerprint == before.fingerprint and torch.equal(again.test.pixels, before.test.pixels)
    members[ONE]["images_background_small1/Korean/character05/0105_02.png"] = png(drawing("another"))
    changed = data.load_images(data_dir=write(tmp_path / "again", members))
    assert changed.fingerprint != before.fingerprint


def test_the_folder_is_found_or_the_digits_stand_in(folder, monkeypatch, tmp_path):
    expected = data.load_images("omniglot", data_dir=folder).fingerprint
    assert data.load_images(data_dir=str(folder.parent)).fingerprint == expected
    corpus = data.load_images()
    assert (corpus.name, corpus.origin, corpus.stands_in_for) == ("digits", "installed", "omniglot")
    assert "from scikit-learn, in place of omniglot" in str(corpus)
    monkeypatch.setenv("KERNELBOOK_DATA", str(folder.parent))
    assert data.load_images().fingerprint == data.load_images("omniglot").fingerprint == expected
    info = data.info("omniglot")
    assert (info.status, info.available, info.path) == ("found", True, folder)
    (folder / RUNS).unlink()
    assert data.info("omniglot").problem == "all_runs.zip missing"
    with pytest.raises(data.DataError, match="lacks all_runs.zip, which omniglot needs"):
        data.load_images()                                  # a damaged folder is no reason to take something else
    with pytest.raises(data.DataError, match="holds nothing of omniglot: expected images_background_small1.zip, "
                                             "images_background_small2.zip, all_runs.zip, there"):
        data.load_images(data_dir=tmp_path)
    monkeypatch.delenv("KERNELBOOK_DATA")
    with pytest.raises(data.DataError, match="omniglot is not on this machine; put images_background_small1.zip, "):
        data.load_images("omniglot")
    with pytest.raises(data.DataError, match="not read from a folder.*leave it out"):
        data.load_images("digits", data_dir=folder)
    with pytest.raises(data.DataError, match="no corpus called 'mnist'; .* for one-shot are: digits, omniglot"):
        data.load_images("mnist")
    with pytest.raises(data.DataError, match="digits is not in a package.*comes with scikit-learn"):
        data.fetch("digits")


LATIN = "images_background_small2/Latin/character04/0104_01.png"
GREEK = "images_background_small2/Greek/character04/0104_01.png"
LABELS = "run01/class_labels.txt"


@pytest.mark.parametrize("archive, changes, words", [
    (TWO, {LATIN: b"no image"}, "Latin/character04/0104_01.png in .*small2.zip is not a PNG image .*copy the file"),
    (TWO, {LATIN: png(drawing(1))[:-60]}, "0104_01.png in .*small2.zip is not a PNG image"),
    (TWO, {LATIN: png(np.ones((28, 28)))}, "0104_01.png in .*small2.zip has 28 x 28 pixels; expected 105 x 105"),
    (TWO, {LATIN: None}, "small2.zip has 2 of 3 drawings of Latin/character04"),
    (TWO, {GREEK: png(drawing(1))}, "small2.zip has other drawings of Greek/character04 than the archive before it"),
    (ONE, {"faces/one.png": png(drawing(1))}, "small1.zip holds faces/one.png; expected ALPHABET/character"),
    (RUNS, {LABELS: b"run01/test/item01.png run01/training/class07.png\n"}, "training/class07.png', but there is "
     "no such pair"),
    (RUNS, {LABELS: b"run01/test/item01.png run02/training/class01.png\n"}, "there is no such pair of drawings"),
    (RUNS, {LABELS: 2 * b"run01/test/item01.png run01/training/class01.png\n"}, "or one is in two pairs"),
    (RUNS, {LABELS: None}, "all_runs.zip has 4 drawings that no class_labels.txt names"),
    (RUNS, {"run01/test/item01.png": None}, "there is no such pair"),
])
def test_archives_that_cannot_be_used(tmp_path, archive, changes, words):
    members = omniglot()
    members[archive] |= changes
    members[archive] = {name: content for name, content in members[archive].items() if content is not None}
    with pytest.raises(data.DataError, match=words):
        data.load_images(data_dir=write(tmp_path / "omniglot", members))


def test_archives_that_are_damaged(folder):
    whole = (folder / ONE).read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"a page of HTML"):
        (folder / ONE).write_bytes(content)
        with pytest.raises(data.DataError, match="small1.zip is no zip archive, or was truncated .*copy the file"):
            data.load_images(data_dir=folder)
    altered = bytearray(whole)
    for place in range(len(whole) // 3, len(whole) // 3 + 40):
        altered[place] ^= 0xFF
    (folder / ONE).write_bytes(altered)
    with pytest.raises(data.DataError, match=r"small1.*\.png in .*small1.zip is damaged"):
        data.load_images(data_dir=folder)
    (folder / ONE).write_bytes((folder / RUNS).read_bytes())
    with pytest.raises(data.DataError, match="small1.zip holds run01/test/item01.png; expected ALPHABET/"):
        data.load_images(data_dir=folder)


def test_too_few_characters_and_none(tmp_path):
    members = omniglot()
    few = {name: content for name, content in members[ONE].items() if "Korean/character01" in name}
    with pytest.raises(data.DataError, match="too few characters, 1: none is left for"):
        data.load_images(data_dir=write(tmp_path / "few", members | {ONE: few, TWO: few}))
    with pytest.raises(data.DataError, match="small1.zip holds no ALPHABET/characterNN"):
        data.load_images(data_dir=write(tmp_path / "none", members | {ONE: {"readme.txt": b""}}))


def test_digits_are_split_by_digit():
    corpus = data.load_images("digits")
    assert {split: part.names for split, part in corpus.splits.items()} == {
        "train": list("456789"), "valid": list("23"), "test": list("01")}
    assert [len(part) for part in corpus.splits.values()] == [1_077, 360, 360]
    assert corpus.stands_in_for == "" and corpus.runs is None
    for part in corpus.splits.values():
        assert part.pixels.shape[1:] == (32, 32) and 0 <= part.pixels.min() and part.pixels.max() <= 1
    # Ink is 1, as in Omniglot: a 0 has a hole in the middle, a 1 has none.
    middle = [corpus.test.pixels[corpus.test.classes == c, 12:20, 12:20].mean() for c in (0, 1)]
    assert middle[0] < 0.2 < 0.7 < middle[1]


def some(names="abc"):
    pixels = torch.rand(2 * len(names), 4, 4, generator=torch.Generator().manual_seed(0))
    return Images(pixels, torch.arange(len(names)).repeat_interleave(2), [f"A/{name}" for name in names],
                  ["A"] * len(names))


def test_classes_can_be_chosen():
    three = some()
    two = three.only(["A/c", "A/a"])
    assert two.names == ["A/c", "A/a"] and two.classes.tolist() == [0, 0, 1, 1]
    assert torch.equal(two.pixels, three.pixels[[4, 5, 0, 1]])
    assert len(three.only([])) == 0
    with pytest.raises(ValueError, match="no class 'A/d'; the classes are A/a, A/b, A/c"):
        three.only(["A/d"])


def test_turned_characters_are_other_characters():
    once, four = some(), some().rotated()
    assert four.names[3:5] == ["A@90/a", "A@90/b"] and len(four.names) == len(set(four.names)) == 12
    assert sorted(set(four.groups)) == ["A", "A@180", "A@270", "A@90"]
    assert torch.equal(four.only(once.names).pixels, once.pixels)
    upside_down = four.only([name.replace("A/", "A@180/") for name in once.names])
    assert torch.equal(upside_down.pixels, once.pixels.flip(1, 2)) and torch.equal(upside_down.classes, once.classes)


@pytest.mark.parametrize("change, words", [
    ({"pixels": torch.zeros(6, 4, 5)}, "expected pixels of shape"),
    ({"classes": torch.zeros(5, dtype=torch.long)}, "as many classes"),
    ({"classes": torch.tensor([0, 1, 2, 0, 1, 2])}, "classes must be 0, ..., 0, 1"),
    ({"classes": torch.tensor([0, 0, 1, 1, 1, 1])}, "each at least once"),
    ({"names": ["A/a", "A/a", "A/b"]}, "no name twice"),
    ({"groups": ["A"]}, "one group for each"),
])
def test_images_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        Images(**(vars(some()) | change))


REAL = os.environ.get("KERNELBOOK_DATA")


@pytest.mark.skipif(
    not REAL or not os.path.isdir(os.path.join(REAL, "omniglot")),
    reason="needs the real Omniglot: set KERNELBOOK_DATA to a folder that holds omniglot/",
)
def test_the_real_omniglot_has_its_published_size():
    corpus = data.load_images("omniglot", data_dir=REAL)
    assert {split: (len(part.names), len(part)) for split, part in corpus.splits.items()} == {
        "train": (173, 3_460), "valid": (35, 700), "test": (34, 680), "runs": (400, 800)}
    assert all(len(set(corpus.splits[split].groups)) == 8 for split in ("train", "valid", "test"))
    assert corpus.fingerprint.startswith("0523a2b25e48")
    pixels = torch.cat([part.pixels for part in corpus.splits.values()])
    assert len({image.numpy().tobytes() for image in pixels}) == 4_840 + 800       # nothing occurs twice
    assert 0.08 < pixels.mean() < 0.084                                            # one minus the usual mean, 0.922
