"""Corpora in a folder of the reader's: found where they should be, and refused when files do not belong together."""

import gzip
import os

import pytest

from kernelbook import data

TEXT = {
    "train.de": "Ein Haus.\nZwei Ha\u0308user. \n\nDrei Wörter hier.\nvier\n",
    "train.en": "A house.\nTwo houses.\nskipped\nThree words here.\n \n",
    "val.de": "Ein Hund.\n",
    "val.en": "A dog.\n",
    "test_2016_flickr.de": "Eine Katze.\n",
    "test_2016_flickr.en": "A cat.\n",
}


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    """Nothing a test does here may depend on the data or the cache of the machine it runs on."""
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A tiny Multi30k, its training text gzipped."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    for name, text in TEXT.items():
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_is_read_gzipped_or_plain(folder):
    corpus = data.load_translation("multi30k", data_dir=folder)
    assert corpus.train == [
        ("Ein Haus.", "A house."),
        ("Zwei Häuser.", "Two houses."),  # normal form C, stripped
        ("Drei Wörter hier.", "Three words here."),  # pairs with a blank side are skipped
    ]
    assert corpus.valid == [("Ein Hund.", "A dog.")] and corpus.test == [("Eine Katze.", "A cat.")]
    assert (corpus.origin, corpus.source_language, corpus.target_language) == ("directory", "de", "en")
    assert corpus.train[0].source == "Ein Haus." and corpus.train[0].target == "A house."


def test_the_fingerprint_is_that_of_the_pairs_not_of_the_files(folder):
    before = data.load_translation("multi30k", data_dir=folder).fingerprint
    packed = folder / "train.de.gz"
    (folder / "train.de").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert data.load_translation("multi30k", data_dir=folder).fingerprint == before
    (folder / "val.en").write_text("A cat.\n")
    assert data.load_translation("multi30k", data_dir=folder).fingerprint != before


def test_the_folder_or_the_parent_of_several_may_be_named(folder, monkeypatch):
    expected = data.load_translation("multi30k", data_dir=folder)
    assert data.load_translation("multi30k", data_dir=folder.parent) == expected
    assert data.load_translation(data_dir=folder) == expected  # recognised by its files
    assert data.load_translation(data_dir=str(folder.parent)) == expected
    monkeypatch.setenv("KERNELBOOK_DATA", str(folder.parent))
    assert data.load_translation("multi30k") == expected


def test_an_explicit_folder_wins_over_the_variable(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELBOOK_DATA", str(folder.parent))
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="empty holds nothing of multi30k: expected train.de, train.en, val.de"):
        data.load_translation("multi30k", data_dir=tmp_path / "empty")


def test_a_package_corpus_can_be_read_from_a_folder_too(folder, monkeypatch):
    own = folder.parent / "bible"
    own.mkdir()
    for name, text in TEXT.items():
        (own / name.replace("val", "valid").replace("test_2016_flickr", "test")).write_text(text, encoding="utf-8")
    monkeypatch.setenv("KERNELBOOK_DATA", str(folder.parent))
    assert data.load_translation("bible").origin == "directory"
    with pytest.raises(data.DataError, match="may hold bible or multi30k; say which"):
        data.load_translation(data_dir=folder.parent)


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(data.DataError, match="no corpus called 'multi30'; the corpora for translation are: bible, mu"):
        data.load_translation("multi30")


def test_without_a_folder_the_reader_is_told_what_to_do():
    with pytest.raises(data.DataError, match="multi30k is not on this machine; put train.*--data-dir.*KERNELBOOK_DATA"):
        data.load_translation("multi30k")
    with pytest.raises(data.DataError, match="not in a package.*--data-dir"):
        data.fetch("multi30k")
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        data.load_translation(data_dir="nowhere")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("train.de.gz", None, r"multi30k lacks train.de \(plain or with .gz\)"),
        ("val.en", b"A dog.\nA cat.\n", "val.de has 1 lines and val.en has 2.*line n of one must translate"),
        ("val.en", b"", "val.en is empty; expected one sentence a line"),
        ("val.en", b"\n", "val.en is empty"),
        ("val.en", b"caf\xe9\n", "val.en is not UTF-8"),
        ("train.de.gz", b"plain text", "train.de.gz is not a whole gzip file.*copy it again"),
        ("train.de.gz", gzip.compress(TEXT["train.de"].encode())[:-12], "train.de.gz is not a whole gzip file"),
    ],
    ids=["missing", "lengths differ", "empty", "blank", "not UTF-8", "not gzip", "gzip truncated"],
)
def test_files_that_cannot_be_used_are_named(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(data.DataError, match=words):
        data.load_translation("multi30k", data_dir=folder)


def test_info_says_whether_the_folder_is_there(folder, monkeypatch):
    assert not data.info("multi30k").available
    assert "KERNELBOOK_DATA is not set" in str(data.info("multi30k"))
    monkeypatch.setenv("KERNELBOOK_DATA", str(folder.parent))
    found = data.info("multi30k")
    assert found.available and found.path == folder
    assert found.bytes_on_disk == sum(file.stat().st_size for file in folder.iterdir())
    (folder / "val.en").unlink()
    assert "val.en missing" in str(data.info("multi30k"))


def test_short_keeps_pairs_of_which_both_sides_are_short(folder):
    corpus = data.load_translation("multi30k", data_dir=folder)
    short = corpus.short(2)
    assert [pair.source for pair in short.train] == ["Ein Haus.", "Zwei Häuser."]
    assert short.name == "multi30k (at most 2 words)" and short.fingerprint != corpus.fingerprint
    assert "train       2 pairs          4 words de          4 words en" in short.summary()
    with pytest.raises(data.DataError, match="no pair of multi30k is left in train, valid, test"):
        corpus.short(1)
    with pytest.raises(ValueError, match="positive integer, not 0"):
        corpus.short(0)


REAL = os.environ.get("KERNELBOOK_DATA")


@pytest.mark.skipif(
    not REAL or not os.path.isdir(os.path.join(REAL, "multi30k")),
    reason="needs the real Multi30k: set KERNELBOOK_DATA to a folder that holds multi30k/",
)
def test_the_real_multi30k_has_its_published_size():
    corpus = data.load_translation("multi30k", data_dir=REAL)
    assert [len(pairs) for pairs in corpus.splits.values()] == [29_000, 1_014, 1_000]
    assert sum(len(pair.target.split()) for pair in corpus.train) == 345_020
    assert corpus.fingerprint.startswith("9802a92b8a74")
