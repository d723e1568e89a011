"""Documents and labelled texts: what a corpus of them offers, and what makes two texts the same."""

import dataclasses
import hashlib
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import data
from kernelbook.data import duplicates, records
from kernelbook.data.tokenizer import normalise

DOCUMENTS = data.TextCorpus("toy", ["Zwei Häuser.", "Drei."], ["Ein Haus."], ["Kein Haus hier."], "directory", "")
TEXTS = data.LabelledCorpus("toy", [data.Example("good film", "good"), data.Example("bad film", "bad")],
                            [data.Example("good", "good")], [data.Example("bad, bad", "bad")], "directory", "",
                            labels=["good", "bad"])


def test_counts_do_not_depend_on_a_tokeniser():
    assert DOCUMENTS.counts("train") == data.Counts(documents=2, words=3, bytes=len("Zwei Häuser.Drei.") + 1)
    assert "train       2 documents          3 words          18 bytes" in str(DOCUMENTS)
    assert data.Counts.of([]) == (0, 0, 0)
    with pytest.raises(ValueError, match="no split 'dev'; the splits are train, valid, test"):
        DOCUMENTS.counts("dev")
    with pytest.raises(ValueError, match="no split 'dev'"):
        TEXTS.counts("dev")


def test_labels_keep_their_order_and_a_strange_one_is_refused():
    assert TEXTS.counts("train") == {"good": 1, "bad": 1} and TEXTS.counts("test") == {"good": 0, "bad": 1}
    assert list(TEXTS.counts("test")) == ["good", "bad"]
    assert "toy: 2 classes" in str(TEXTS) and "100.0 % bad" in str(TEXTS)
    with pytest.raises(data.DataError, match="test of toy has the label 'ugly', which is not among .* good, bad"):
        dataclasses.replace(TEXTS, test=[data.Example("ugly film", "ugly")])


def test_keep_works_on_every_kind_and_leaves_an_empty_split_empty():
    kept = DOCUMENTS.keep(lambda text: "Haus" in text or "Häuser" in text, "houses")
    assert kept.train == ["Zwei Häuser."] and kept.name == "toy (houses)"
    assert kept.fingerprint == data.fingerprint(kept.splits)
    without = dataclasses.replace(DOCUMENTS, train=[])
    assert without.keep(lambda text: True, "all").train == []
    with pytest.raises(data.DataError, match="no text of toy is left in valid, test after keeping those with film"):
        TEXTS.keep(lambda example: "film" in example.text, "film")


def test_the_fingerprint_is_that_of_the_records_in_their_splits_and_order():
    prints = {data.fingerprint(splits) for splits in (
        {"train": ["a", "b"], "valid": [], "test": []},
        {"train": ["b", "a"], "valid": [], "test": []},
        {"train": ["a"], "valid": ["b"], "test": []},
        {"train": ['a"]\n["train", "b'], "valid": [], "test": []},
        {"train": [data.Example("a", "b")], "valid": [], "test": []},
        {"train": [data.Example("b", "a")], "valid": [], "test": []},
        {"train": [data.Pair("a", "b")], "valid": [], "test": []},
    )}
    assert len(prints) == 7


def test_the_fingerprint_of_pairs_is_what_it_was_before_there_was_anything_else():
    splits = {"train": [data.Pair("Ein Haus.", "A house.")], "valid": [], "test": [data.Pair("Zwei", "Two")]}
    expected = hashlib.sha256(b"train\tEin Haus.\tA house.\ntest\tZwei\tTwo\n").hexdigest()
    assert data.fingerprint(splits) == expected


@given(st.text(), st.lists(st.text(max_size=4), max_size=3))
def test_a_record_survives_its_line(split, fields):
    assert json.loads(records.line(split, tuple(fields))) == [split, *fields]


@given(st.text())
def test_normal_text_comes_back_whole_so_that_words_and_bytes_can_be_counted(text):
    text = normalise(text)
    assert normalise(text) == text and unicodedata.is_normalized("NFC", text)
    tokenizer = data.Tokenizer.train(["x"], 260)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------------ the same text twice


@given(st.text())
def test_where_a_text_lies_depends_on_its_words_alone(text):
    place = records.percentile(text)
    assert 0 <= place < 100
    assert records.percentile(f"  {text} !") == place


@pytest.mark.parametrize("text, found", [
    ("So it was, and so it was.", {"so it was", "it was and", "was and so", "and so it"}),
    ("No way!", {"no way"}),
    ("", {""}),
])
def test_sequences_of_three_words(text, found):
    assert duplicates.sequences(text) == found


@pytest.mark.parametrize("text, other, near", [
    ("The cat sat on the mat today.", "the cat sat on the mat, today", True),
    ("a b c d e f", "a b c d e x", True),               # 3 of 5 sequences
    ("a b c d", "a b c x", False),                      # 1 of 3
    ("a b c d e", "a b c d x", True),                   # 2 of 4: exactly half
    ("a b c d", "a b c d e f g h", False),              # 2 of 6: quoted in a longer text
    ("no way", "No way!", True),
    ("no way", "no way out", False),
])
def test_near_duplicates(text, other, near):
    assert bool(list(duplicates.near_duplicates([text], [other]))) is near
    assert bool(list(duplicates.near_duplicates([other], [text]))) is near


@given(st.lists(st.text("abc ", max_size=24), max_size=5), st.lists(st.text("abc ", max_size=24), max_size=5))
def test_near_duplicates_are_those_of_the_definition(texts, others):
    def overlap(a, b):
        a, b = duplicates.sequences(a), duplicates.sequences(b)
        return len(a & b) / len(a | b)

    assert list(duplicates.near_duplicates(texts, others)) == [
        (i, j) for i, a in enumerate(texts) for j, b in enumerate(others) if overlap(a, b) >= 0.5]


@given(st.lists(st.text("abcd ", max_size=20), max_size=40, unique_by=records.key))
def test_splits_by_hash_share_nothing_and_lose_only_near_duplicates(texts):
    splits = duplicates.disjoint_splits(texts, 20, by=lambda t: t, text=lambda t: t)
    assert all(sorted(part, key=records.percentile) == part for part in splits.values())
    kept = [text for part in splits.values() for text in part]
    assert len(set(kept)) == len(kept) and set(kept) <= set(texts)
    for part, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not list(duplicates.near_duplicates(splits[part], splits[later]))
    lost = sorted(set(texts) - set(kept))
    others = [text for text in texts if records.percentile(text) < 40]
    assert {i for i, _ in duplicates.near_duplicates(lost, others)} == set(range(len(lost)))


def test_of_two_near_duplicates_in_different_splits_one_is_kept():
    twins = [f"a{n} b{n} c{n} d{n} e{n} {x}" for n in range(60) for x in "xy"]
    splits = duplicates.disjoint_splits(twins, 20, by=lambda t: t, text=lambda t: t)
    for part, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not list(duplicates.near_duplicates(splits[part], splits[later]))
    home = {text: split for split, part in splits.items() for text in part}
    before = {text: ("valid", "test", "train", "train", "train")[int(records.percentile(text) // 20)] for text in twins}
    rank = ("train", "valid", "test").index
    for twin in zip(twins[::2], twins[1::2], strict=True):
        last = max((before[text] for text in twin), key=rank)
        assert [home.get(text) for text in twin] == [last if before[text] == last else None for text in twin]
    assert {tuple(sorted(before[t] for t in twin)) for twin in zip(twins[::2], twins[1::2], strict=True)} >= {
        ("train", "valid"), ("test", "train"), ("test", "valid")}


def test_leakage_counts_what_valid_and_test_share_with_train():
    corpus = data.TextCorpus(
        "toy", ["The dog sees the tree.", "A house by the sea", "Nothing else at all here"],
        ["the dog sees the tree", "A house by the lake", "Something new"], ["Quite another"], "directory", "")
    assert data.leakage(corpus) == {"valid": (3, 1, 2), "test": (1, 0, 0)}
    pairs = data.ParallelCorpus("toy", [data.Pair("x", "The dog")], [data.Pair("y", "the dog!")],
                                [data.Pair("x", "a cat")], "directory", "")
    assert data.leakage(pairs) == {"valid": (1, 1, 1), "test": (1, 0, 0)}
    assert data.leakage(TEXTS)["valid"] == (1, 0, 0)
