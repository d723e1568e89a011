"""Corpora, tokeniser and batches: from a pinned download or a folder of files to tensors of token ids.

>>> from kernelbook import data
>>> corpus = data.load_translation("bible")                               # doctest: +SKIP
>>> tokenizer = data.Tokenizer.train([side for pair in corpus.train for side in pair], 8000)  # doctest: +SKIP
"""

from .batching import pad, padding_share, token_budget_batches
from .cache import CorpusInfo, cache_dir, clear, fetch, info
from .corpora import CORPORA, Corpus, human_bytes
from .errors import DataError
from .parallel import Pair, ParallelCorpus, fingerprint
from .tokenizer import Tokenizer
from .translation import load_translation

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusInfo",
    "DataError",
    "Pair",
    "ParallelCorpus",
    "Tokenizer",
    "cache_dir",
    "clear",
    "fetch",
    "fingerprint",
    "human_bytes",
    "info",
    "load_translation",
    "pad",
    "padding_share",
    "token_budget_batches",
]
