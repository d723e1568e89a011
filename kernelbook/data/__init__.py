"""Corpora, tokeniser and batches: from a pinned download or a folder of files to tensors of token ids.

>>> from kernelbook import data
>>> corpus = data.load_translation("bible")                               # doctest: +SKIP
>>> tokenizer = data.Tokenizer.train([side for pair in corpus.train for side in pair], 8000)  # doctest: +SKIP

There are pairs of sentences for translation, documents for language modelling (``load_text``), and labelled texts for
classification (``load_labelled``); and images for one-shot classification (``load_images``).
"""

from .batching import pad, padding_share, token_budget_batches
from .cache import CorpusInfo, cache_dir, clear, fetch, info
from .corpora import CORPORA, TASKS, Corpus, human_bytes
from .duplicates import Leakage, leakage
from .errors import DataError
from .images import ImageCorpus, Images
from .loading import load_images, load_labelled, load_text, load_translation
from .parallel import ParallelCorpus
from .records import Example, Pair, SplitCorpus, fingerprint
from .texts import Counts, LabelledCorpus, TextCorpus
from .tokenizer import Tokenizer

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusInfo",
    "Counts",
    "DataError",
    "Example",
    "ImageCorpus",
    "Images",
    "LabelledCorpus",
    "Leakage",
    "Pair",
    "ParallelCorpus",
    "SplitCorpus",
    "TASKS",
    "TextCorpus",
    "Tokenizer",
    "cache_dir",
    "clear",
    "fetch",
    "fingerprint",
    "human_bytes",
    "info",
    "leakage",
    "load_images",
    "load_labelled",
    "load_text",
    "load_translation",
    "pad",
    "padding_share",
    "token_budget_batches",
]
