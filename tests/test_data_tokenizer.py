"""The tokeniser: text comes back whole, nothing is unknown, and special tokens cannot be smuggled in."""

import os
import pickle
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernelbook import data

TEXTS = ["Ein kleines Haus am Meer.", "Zwei Häuser, ein Königreich!", "A small house by the sea."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.train(TEXTS, 300)


@settings(max_examples=200)
@given(text=st.text())
@example(text="e\u0301 – A\u030a")  # combining accents, which normal form C composes
@example(text=" \t\u00a0 <pad><eos> 漢字 🦊\x00 ")
@example(text="")
def test_text_round_trips_up_to_white_space_and_normal_form(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " ".join(unicodedata.normalize("NFC", text).split())
    assert all(4 <= i < tokenizer.vocabulary_size for i in ids)
    assert len(tokenizer.tokens(text)) == len(ids)


@given(texts=st.lists(st.text(), max_size=4))
def test_a_batch_is_encoded_like_its_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_have_fixed_ids_and_are_dropped_by_decode(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    ids = [tokenizer.bos_id, *tokenizer.encode("Ein Haus"), tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "Ein Haus"
    assert tokenizer.pieces(ids)[0] == "<bos>" and tokenizer.pieces(ids)[-2:] == ["<pad>", "<pad>"]


def test_a_word_is_the_same_at_the_beginning_and_within(tokenizer):
    assert tokenizer.encode("Haus") == tokenizer.encode("Ein Haus")[-len(tokenizer.encode("Haus")) :]


def test_tokens_read_well():
    tokenizer = data.Tokenizer.train(TEXTS, 1000)  # more than there is to merge
    assert tokenizer.tokens("Ein Haus, Seen!") == ["Ein", "Haus", ",", "␣", "S", "·e", "·e", "·n", "!"]
    assert tokenizer.tokens("ein ü") == ["ein", "␣", "�", "�"]  # a character of two bytes never met in training


def test_training_is_deterministic_whatever_the_threads_and_hash_seeds(tokenizer):
    program = (
        "import hashlib; from kernelbook.data import Tokenizer; "
        f"print(hashlib.sha256(Tokenizer.train({TEXTS!r}, 300).to_json().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for parallel, seed in (("true", "1"), ("false", "2"))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("copied", ["json", "pickle"])
def test_a_copy_encodes_alike_and_keeps_special_tokens_out(tokenizer, copied):
    if copied == "json":
        copy = data.Tokenizer.from_json(tokenizer.to_json())
    else:
        copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and repr(copy) == repr(tokenizer)
    assert copy.encode("das <eos> Haus") == tokenizer.encode("das <eos> Haus")
    assert copy.eos_id not in copy.encode("das <eos> Haus")


def test_the_vocabulary_is_as_large_as_asked_for_or_as_the_texts_allow():
    assert data.Tokenizer.train(TEXTS, 270).vocabulary_size == 270
    assert data.Tokenizer.train(["a b"], 5000).vocabulary_size == data.Tokenizer.smallest_vocabulary


@pytest.mark.parametrize(
    "texts, size, error, words",
    [
        (TEXTS, 200, ValueError, "vocabulary_size is 200.*need 260"),
        ("one text", 300, ValueError, r"write \[text\]"),
        ([], 300, data.DataError, "no text to train"),
        (["", "  "], 300, data.DataError, "all texts are empty"),
    ],
)
def test_training_without_text_or_room_is_an_error(texts, size, error, words):
    with pytest.raises(error, match=words):
        data.Tokenizer.train(texts, size)


@pytest.mark.parametrize("bad", [-1, 300, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary.*from 0 to 299"):
        tokenizer.decode([5, bad])


def test_json_of_something_else_is_an_error():
    with pytest.raises(data.DataError, match="not a tokenizer.*to_json"):
        data.Tokenizer.from_json('{"model": 3}')
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    with pytest.raises(data.DataError, match="not a tokenizer of kernelbook"):
        data.Tokenizer.from_json(Backend(BPE()).to_str())
