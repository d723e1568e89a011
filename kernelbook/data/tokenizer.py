"""A byte-pair tokeniser for several languages at once: no character is unknown, and text comes back whole."""

import unicodedata
from collections.abc import Iterable, Sequence

from .errors import DataError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
"""The special tokens; their ids are their places here, 0 to 3."""


def normalise(text: str) -> str:
    """Unicode normal form C, with runs of white space replaced by one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Tokenizer:
    """Byte-level byte-pair encoding with one vocabulary for all its languages.

    A text is split into words, each word into its UTF-8 bytes, and frequent neighbours are merged, in the
    order learnt from the training texts. Since every byte is in the vocabulary, no character is ever unknown;
    a text and its decoded encoding agree up to white space and Unicode normal form C. The documents of a ``TextCorpus``
    have both settled already, so that they come back exactly.

    Source: R. Sennrich, B. Haddow, A. Birch, "Neural machine translation of rare words with subword units",
    ACL 2016; on bytes, A. Radford et al., "Language models are unsupervised multitask learners", 2019.

    Attributes
    ----------
    pad_id, bos_id, eos_id, unk_id : int
        The ids of the special tokens: padding, begin and end of a sequence, and the unknown token, which
        encoding never produces.

    Examples
    --------
    >>> tokenizer = Tokenizer.train(["Ein Haus.", "Zwei Häuser."], vocabulary_size=300)
    >>> tokenizer.decode(tokenizer.encode("Ein  Haus."))
    'Ein Haus.'
    """

    pad_id, bos_id, eos_id, unk_id = range(4)
    smallest_vocabulary = len(SPECIALS) + 256
    """The special tokens and the 256 bytes: what a vocabulary holds before anything is merged."""

    def __init__(self, backend):
        """Wrap a backend of the library tokenizers; use ``Tokenizer.train`` or ``Tokenizer.from_json``."""
        from tokenizers.decoders import ByteLevel

        found = tuple(backend.id_to_token(i) for i in range(len(SPECIALS)))
        if found != SPECIALS:
            raise DataError(
                f"this is not a tokenizer of kernelbook: its first ids are {found}, expected {SPECIALS}; "
                "make one with Tokenizer.train"
            )
        # Otherwise a text that happens to contain "<eos>" would smuggle in the special token itself.
        backend.encode_special_tokens = True
        self._backend = backend
        self._bytes = ByteLevel()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int, *, min_frequency: int = 2) -> "Tokenizer":
        """Learn a vocabulary.

        Parameters
        ----------
        texts : iterable of str
            The training texts of all languages together.
        vocabulary_size : int
            At most so many tokens, the 4 special tokens and the 256 bytes included; fewer if the texts run
            out of pairs to merge.
        min_frequency : int
            Merge a pair only if it occurs at least so often.

        Returns
        -------
        Tokenizer
            The same for the same texts, whatever the number of threads.

        Raises
        ------
        ValueError
            If `vocabulary_size` is too small to hold the bytes.
        DataError
            If the texts are empty.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        if vocabulary_size < cls.smallest_vocabulary:
            raise ValueError(
                f"vocabulary_size is {vocabulary_size}, but the 4 special tokens and the 256 bytes "
                f"alone need {cls.smallest_vocabulary}"
            )
        if isinstance(texts, str):
            raise ValueError("texts must be an iterable of texts, not one text; write [text]")
        texts = [text for text in map(normalise, texts) if text]
        if not texts:
            raise DataError("there is no text to train a tokenizer on: all texts are empty")
        backend = Backend(models.BPE(unk_token=SPECIALS[cls.unk_id]))
        # A space before the first word makes it the same word as in the middle of a sentence.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocabulary_size,
                min_frequency=min_frequency,
                special_tokens=list(SPECIALS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
            length=len(texts),
        )
        return cls(backend)

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, special tokens included: ids run from 0 to this number less 1."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens; the empty list for an empty text."""
        return self._backend.encode(normalise(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts at once, in parallel: ``[encode(text) for text in texts]``."""
        # The fast form leaves out the offsets into the text, which nobody here asks for.
        texts = [normalise(text) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; special tokens are dropped.

        Bytes that are not valid UTF-8, which a model may well produce, become U+FFFD.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.
        """
        pieces = [piece for i, piece in self._known(ids) if i >= len(SPECIALS)]
        return self._bytes.decode(pieces).removeprefix(" ")

    def tokens(self, text: str) -> list[str]:
        """The pieces of a text as people read them, one for each id of ``encode(text)``.

        See ``pieces()`` for how they are written.
        """
        return self.pieces(self.encode(text))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A readable label for each id, for the axes of an attention map.

        A piece that continues a word begins with ``·``; special tokens keep their names; a space that is a piece
        of its own is shown as ``␣``, and a piece that is only part of a character as U+FFFD.

        >>> tokenizer = Tokenizer.train(["Haus und Häuser"] * 2, vocabulary_size=264)
        >>> tokenizer.pieces([tokenizer.bos_id, *tokenizer.encode("Haus")])
        ['<bos>', 'H', '·aus']

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.
        """
        labels: list[str] = []
        in_word = False
        for i, piece in self._known(ids):
            text = piece if i < len(SPECIALS) else self._bytes.decode([piece])
            label = text.removeprefix(" ") or "␣"
            begins_inside = in_word and label == text and label[:1].isalnum()
            labels.append(f"·{label}" if begins_inside else label)
            in_word = i >= len(SPECIALS) and (label[-1:].isalnum() or label.endswith("\ufffd"))
        return labels

    def to_json(self) -> str:
        """The whole tokeniser as a JSON text; ``from_json`` is its inverse."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokeniser that ``to_json`` wrote.

        Raises
        ------
        DataError
            If the text is not a tokeniser.
        """
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the backend raises bare Exception
            raise DataError(
                f"this JSON is not a tokenizer: {error}; expected what Tokenizer.to_json wrote"
            ) from None
        return cls(backend)

    def _known(self, ids: Iterable[int]) -> list[tuple[int, str]]:
        known = [(int(i), self._backend.id_to_token(int(i)) if int(i) >= 0 else None) for i in ids]
        for i, piece in known:
            if piece is None:
                raise ValueError(
                    f"token id {i} is not in the vocabulary, whose ids run from 0 to {self.vocabulary_size - 1}"
                )
        return known

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)  # the backend's own pickle forgets encode_special_tokens

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"Tokenizer(byte-level byte pairs, {self.vocabulary_size:,} tokens)"
