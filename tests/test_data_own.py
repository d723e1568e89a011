"""A reader's own texts, and the known ones in folders: which files are meant, how they are read, what is refused."""

import gzip
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import data
from kernelbook.data import corpora, directory, records

LOADERS = {"translation": data.load_translation, "language-modelling": data.load_text,
           "classification": data.load_labelled}


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    """Nothing a test does here may depend on the data or the cache of the machine it runs on."""
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of files from texts or bytes."""

    def make(name, /, **files):
        path = tmp_path / "data" / name
        path.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            file = file.replace("__", ".")
            content = content if isinstance(content, bytes) else content.encode()
            (path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
        return path

    return make


# ---------------------------------------------------------------------------------------------- language modelling


def test_documents_are_what_blank_lines_separate(folder):
    path = folder("poems", train__txt="\n Two  roads\ndiverged. \n\n\nWhose woods\r\n",
                  valid__txt__gz="Cafe\u0301.\nTea.\n", test__txt="\ufeffLast.")
    corpus = data.load_text(data_dir=path)
    assert corpus.train == ["Two roads diverged.", "Whose woods"]
    assert corpus.valid == ["Café.", "Tea."]        # no blank line: each line is one
    assert corpus.test == ["Last."]
    assert (corpus.name, corpus.origin, corpus.licence) == ("poems", "directory", "not known: the reader's own text")


@pytest.mark.parametrize("named", ["folder", "file"])
def test_one_file_is_split_by_a_hash_of_the_documents(folder, named):
    documents = [f"Document {n} of\nmany." for n in range(200)] + ["DOCUMENT 7, of many!"]
    path = folder("notes", anything__txt="\n\n".join(documents))
    corpus = data.load_text(data_dir=path if named == "folder" else path / "anything.txt")
    assert corpus.name == ("notes" if named == "folder" else "anything")
    assert {split: len(part) for split, part in corpus.splits.items()} == {"train": 156, "valid": 19, "test": 26}
    for lower, split in enumerate(("valid", "test")):
        assert all(10 * lower <= records.percentile(text) < 10 * lower + 10 for text in corpus.splits[split])
    (home,) = [part for part in corpus.splits.values() if "Document 7 of many." in part]
    assert "DOCUMENT 7, of many!" in home           # the same words, the same split
    assert data.leakage(corpus)["test"].exact == 0


def test_articles_of_wikitext_begin_with_their_titles(folder):
    text = (" \n = First = \n \n Some text . \n \n = = Part = = \n \n More = text = here . \n \n = Second one = \n \n"
            " Text .\n")
    path = folder("wikitext-2", train__txt=text, valid__txt=text, test__txt=text)
    corpus = data.load_text("wikitext-2", data_dir=path)
    assert corpus.train == ["= First = Some text . = = Part = = More = text = here .", "= Second one = Text ."]
    assert data.load_text(data_dir=path) == corpus and corpus.licence.startswith("CC BY-SA")
    assert data.load_text(data_dir=folder("wikitext-mine", train__txt=text, valid__txt=text, test__txt=text)).train == (
        corpus.train)


def test_without_a_training_text_there_is_only_evaluation(folder):
    path = folder("wikitext-2", valid__txt=" = A = \n\nText", test__txt=" = B = \n\nText")
    with pytest.raises(data.DataError, match="lacks train.txt .*without which nothing can be trained; put train.txt"):
        data.load_text("wikitext-2", data_dir=path)
    corpus = data.load_text("wikitext-2", data_dir=path, evaluation_only=True)
    assert (corpus.train, corpus.valid, corpus.test) == ([], ["= A = Text"], ["= B = Text"])
    assert "train       0 documents" in str(corpus)
    (path / "test.txt").unlink()
    with pytest.raises(data.DataError, match="lacks train.txt, test.txt"):
        data.load_text("wikitext-2", data_dir=path, evaluation_only=True)
    with pytest.raises(data.DataError, match="dev.txt, but no train.txt, without which nothing can be trained"):
        data.load_text(data_dir=folder("held out", dev__txt="text"))
    many = "\n".join(f"Devotion {n}." for n in range(100))     # only begins like the name of a split
    assert len(data.load_text(data_dir=folder("prayers", devotions__txt=many)).train) == 77


# -------------------------------------------------------------------------------------------------- classification


def test_labelled_lines(folder):
    path = folder("reviews", train__tsv="good\tA  fine film.\n\nbad\tA dull film,\u2028really\n",
                  valid__tsv="bad\tNo\r\n", test__tsv="label\ttext\ngood\tYes\n")
    corpus = data.load_labelled(data_dir=path)
    assert corpus.labels == ["bad", "good"] and corpus.name == "reviews"
    assert corpus.train == [("A fine film.", "good"), ("A dull film, really", "bad")]
    assert corpus.valid == [("No", "bad")] and corpus.test == [("Yes", "good")]


def test_labelled_columns_quoted(folder):
    lines = "".join(f'"text {n}, with ""quotes"" and\na line end",{n % 3}\n' for n in range(100))
    corpus = data.load_labelled(data_dir=folder("sheet", train__csv="Text,Label\n" + lines))
    assert corpus.labels == ["0", "1", "2"]
    assert sum(map(len, corpus.splits.values())) == 100 and len(corpus.valid) == 4
    assert corpus.train[0] == ('text 2, with "quotes" and a line end', "2")


def test_known_labels_have_names_and_an_order(folder, monkeypatch):
    path = folder("sst2", train__txt="1 a fine film .\n0 dull\n", dev__txt="1 yes\n", test__txt="0 no\n")
    corpus = data.load_labelled("sst2", data_dir=path.parent)
    assert corpus.labels == ["negative", "positive"]
    assert corpus.train == [("a fine film .", "positive"), ("dull", "negative")]
    assert data.load_labelled(data_dir=path) == corpus
    assert data.load_labelled(data_dir=path.rename(path.parent / "elsewhere")) == corpus    # by its dev.txt


def test_trec_has_no_valid_and_one_strange_character(folder):
    lines = "".join(f"{n % 6} What is {n} ?\n" for n in range(100)).encode()
    path = folder("trec", train__txt=lines + b"4 a sister\xf0city\n", test__txt="5 How far ?\n")
    corpus = data.load_labelled(data_dir=path)
    assert corpus.labels == ["description", "entity", "abbreviation", "human", "location", "number"]
    assert len(corpus.train) == 88 and len(corpus.valid) == 13 and corpus.test == [("How far ?", "number")]
    assert ("a sisterðcity", "location") in corpus.train + corpus.valid
    utf8 = folder("trec", train__txt=lines + "4 a sisterðcity\n".encode())
    assert data.load_labelled(data_dir=utf8) == corpus


# ----------------------------------------------------------------------------------------------------- translation

FRENCH, GERMAN = "Une maison.\nDeux.\n", "Ein Haus.\nZwei.\n"


@pytest.mark.parametrize("name, direction", [
    ("news", ("de", "fr")), ("news-fr-de", ("fr", "de")), ("fr-de", ("fr", "de")), ("de-fr", ("de", "fr")),
    ("afr-de", ("de", "fr")),
])
def test_aligned_files_in_any_two_languages(folder, name, direction):
    path = folder(name, **{f"{split}__{end}": text for split in ("train", "valid", "test")
                           for end, text in (("fr", FRENCH), ("de", GERMAN))})
    corpus = data.load_translation(data_dir=path)
    assert (corpus.source_language, corpus.target_language) == direction and corpus.name == name
    assert corpus.train[0] == tuple({"de": "Ein Haus.", "fr": "Une maison."}[language] for language in direction)
    assert f"{direction[0]} to {direction[1]}" in str(corpus)


def test_two_aligned_files_alone_are_split_by_the_target(folder):
    path = folder("pair", **{"train__pt-BR": "".join(f"Frase {n % 90}\n" for n in range(100)),
                             "train__en": "".join(f"Sentence {n % 90}\n" for n in range(100))})
    corpus = data.load_translation(data_dir=path)
    assert (corpus.source_language, corpus.target_language) == ("en", "pt-BR")
    assert [len(part) for part in corpus.splits.values()] == [78, 14, 8]
    assert data.leakage(corpus)["test"].exact == data.leakage(corpus)["valid"].exact == 0


# ---------------------------------------------------------------------------------------- names, and what is not clear


def test_a_name_finds_the_folder_again(folder, monkeypatch):
    path = folder("my poems", train__txt="a\nb", valid__txt="c", test__txt="d")
    corpus = data.load_text(data_dir=path)
    assert corpus.name == "my_poems"
    assert data.load_text("my_poems", data_dir=path) == corpus == data.load_text("my_poems", data_dir=path.parent)
    monkeypatch.setenv("KERNELBOOK_DATA", str(path.parent))
    assert data.load_text("my_poems") == corpus
    monkeypatch.chdir(path)
    assert data.load_text(data_dir=".") == corpus
    with pytest.raises(data.DataError, match="no corpus called 'my_poem'; the corpora for language-m.* are: wiki"):
        data.load_text("my_poem")
    with pytest.raises(data.DataError, match="no corpus called 'my_poems'"):
        data.load_labelled("my_poems")              # there are no labels in it


def test_an_own_corpus_is_not_taken_for_a_known_one(folder):
    path = folder("bible", train__txt="a\nb", valid__txt="c", test__txt="d")
    assert data.load_text(data_dir=path).name == "own-bible"
    path = folder("wikipedia", train__txt="a\nb", valid__txt="c", test__txt="d")
    assert data.load_text(data_dir=path).name == "wikipedia" == data.load_text("wikipedia", data_dir=path.parent).name


@pytest.mark.parametrize("name", list(data.CORPORA))
def test_a_corpus_for_another_task_is_refused(name):
    for task, load in LOADERS.items():
        if task != data.CORPORA[name].task:
            with pytest.raises(data.DataError, match=f"{name} is a corpus for .*; those for {task} are: "):
                load(name)


@pytest.mark.parametrize("task, files, words", [
    ("translation", {}, "holds no corpus for translation; expected train.X and train.Y"),
    ("translation", {"train__de": "a"}, "has train.de; expected two files, one for each language"),
    ("translation", {"train__de": "a", "train__en": "b", "train__fr": "c"}, "expected two files"),
    ("translation", {"train__de": "a", "train__en": "b", "dev__de": "c", "dev__en": "d"},
     "has dev.de, dev.en; call the files for validation and test valid.de and test.de"),
    ("translation", {"train__de": "a\nb", "train__en": "c", "test__de": "d", "test__en": "e"},
     "train.de has 2 lines and .*train.en has 1.* line n of one must"),
    ("translation", {"train__de": "a\n", "train__en": "b\n", "valid__de": "a\n", "test__de": "a", "test__en": "b"},
     "lacks valid.en"),
    ("translation", {"train__de": "a\n", "train__en": "b\n"},
     "has too few pairs to train with, 1: nothing is left for .* add text, or files"),
    ("language-modelling", {}, "holds no corpus for language-modelling; expected train.txt .*or a single text file"),
    ("language-modelling", {"a__txt": "a", "b__txt": "b"}, "holds no corpus for language-modelling"),
    ("language-modelling", {"a__txt": "one\n\ntwo"}, "has too few documents to train with, 2: nothing is left"),
    ("language-modelling", {"train__txt": " \n\n"}, "train.txt is empty; expected text"),
    ("language-modelling", {"train__txt": b"caf\xe9"}, "train.txt is not UTF-8"),
    ("language-modelling", {"train__txt": "a", "test_2016__txt": "b"}, "has test_2016.txt; call the files"),
    ("classification", {}, "holds no corpus for classification; expected train.tsv"),
    ("classification", {"train__tsv": "a\tb", "train__csv": "a,b"}, "has train.tsv and train.csv; expected one"),
    ("classification", {"train__tsv": "a\tb\nno label here\n"}, "train.tsv line 2 has 1 column; expected a label, a"),
    ("classification", {"train__tsv": "a\tb\tc\n"}, "train.tsv line 1 has 3 columns; expected a label, a tab and a te"),
    ("classification", {"train__tsv": "a\tb\n \t \u00a0\tb\n"}, "line 2 has 1 column"),
    ("classification", {"train__csv": 'a,b\n,c\n'}, "train.csv line 2 has no label; expected a label, a comma"),
    ("classification", {"train__csv": 'a,b\na," "\n'}, "train.csv line 2 has no text"),
    ("classification", {"train__csv": 'a,b\na,"b\n'}, "train.csv line 2 is not CSV"),
    ("classification", {"train__tsv": "label\ttext\n"}, "train.tsv has no line but its first"),
    ("classification", {"train__tsv": "a\tb\n", "valid__tsv": "a\tc\n", "test__tsv": "a\td"},
     "all texts of mine have the same label, 'a'"),
    ("classification", {"train__tsv": "a\tb\nc\td", "valid__tsv": "e\tc\n", "test__tsv": "a\td"},
     "valid of mine has the label 'e', which is not among its classes a, c"),
    ("classification", {"train__tsv": b"a\tb\nc\td\xe9"}, "train.tsv is not UTF-8"),
])
def test_files_that_cannot_be_used(folder, task, files, words):
    with pytest.raises(data.DataError, match=words):
        LOADERS[task](data_dir=folder("mine", **files))


@pytest.mark.parametrize("name, files, words", [
    ("sst2", {"train__txt": "1 good\n2 bad\n"}, "train.txt line 2 begins with '2', which is no label of sst2; its "
     r"labels are 0 \(negative\), 1 \(positive\)"),
    ("sst2", {"train__txt": "1 good\nbad\n"}, "train.txt line 2 has 1 column; expected a label, a space and a text"),
    ("sst2", {"dev__txt": ""}, "dev.txt is empty"),
    ("sst2", {"dev__txt__gz": b"", "dev__txt": "1 a"}, "dev.txt.gz is empty"),
    ("trec", {"test__txt": None}, "lacks test.txt .*which trec needs"),
    ("wikitext-2", {"train__txt": "no title\n"}, "train.txt has no line = Title = between blank lines"),
    ("wikitext-2", {"train__txt": "stray\n\n = A = \n\ntext"}, "train.txt line 1 stands before the first article"),
])
def test_known_files_that_cannot_be_used(folder, name, files, words):
    whole = {"sst2": "1 good\n0 bad\n", "trec": "".join(f"{n % 6} question {n}\n" for n in range(60)),
             "wikitext-2": " = A = \n\ntext"}[name]
    corpus = data.CORPORA[name]
    path = folder(name, **{file.replace(".", "__"): whole for file in corpora.file_names(corpus)})
    LOADERS[corpus.task](name, data_dir=path)
    for file, content in files.items():
        if content is None:
            (path / file.replace("__", ".")).unlink()
        else:
            folder(name, **{file: content})
    with pytest.raises(data.DataError, match=words):
        LOADERS[corpus.task](name, data_dir=path)


def test_what_lies_elsewhere_is_not_found(folder, tmp_path):
    for load in LOADERS.values():
        with pytest.raises(data.DataError, match="nowhere is not a folder"):
            load(data_dir="nowhere")
    with pytest.raises(data.DataError, match="notes.txt is a file; expected train.X and train.Y"):
        data.load_translation(data_dir=folder("a", notes__txt="x") / "notes.txt")
    folder("sst2", train__txt="1 a")
    folder("trec", train__txt="1 a")
    with pytest.raises(data.DataError, match="may hold sst2 or trec; say which"):
        data.load_labelled(data_dir=tmp_path / "data")
    with pytest.raises(data.DataError, match="sst2 is not on this machine; put train.txt.*--data-dir"):
        data.load_labelled("sst2")


def test_info_says_which_files_are_missing(folder, monkeypatch):
    path = folder("wikitext-2", valid__txt="a", test__txt="b")
    monkeypatch.setenv("KERNELBOOK_DATA", str(path.parent))
    found = data.info("wikitext-2")
    assert (found.status, found.available, found.bytes_on_disk) == ("incomplete", False, 2)
    assert "train.txt missing" in str(found) and "to get it put train.txt[.gz]" in str(found)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, texts):
    """Whatever characters there are: lines end at a line feed only."""
    texts = [text.replace("\n", " ").replace("\ufeff", "").strip() or "x" for text in texts]
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes("\n".join(texts).encode())
    assert directory.read_lines(path) == [directory.unicodedata.normalize("NFC", text).strip() for text in texts]


# --------------------------------------------------------------------------------------------------- the real folders

REAL = os.environ.get("KERNELBOOK_DATA")


@pytest.mark.parametrize("name, sizes, fingerprint", [
    ("sst2", [6_920, 872, 1_821], "da4e42b7b450"),
    ("trec", [4_934, 518, 500], "bddcab674c3e"),
    ("wikitext-2", [0, 60, 60], "b37f3b7302d3"),
])
def test_the_real_folders_have_their_published_sizes(name, sizes, fingerprint):
    if not REAL or not os.path.isdir(os.path.join(REAL, name)):
        pytest.skip(f"needs the real {name}: set KERNELBOOK_DATA to a folder that holds {name}/")
    if name == "wikitext-2":
        corpus = data.load_text(name, data_dir=REAL, evaluation_only=True)
        if corpus.train:
            pytest.skip("the training text is here too")
        # Published counts have the end of each line as one more word.
        assert (corpus.counts("valid").words, corpus.counts("test").words) == (217_646 - 3_760, 245_569 - 4_358)
    else:
        corpus = data.load_labelled(name, data_dir=REAL)
    assert [len(part) for part in corpus.splits.values()] == sizes
    assert corpus.fingerprint.startswith(fingerprint)
    if name == "trec":      # the numbers of the file mean the types that the collection was published with
        assert ("Who was Galileo ?", "human") in corpus.test
        both = [corpus.counts("train")[label] + corpus.counts("valid")[label] for label in corpus.labels]
        assert both == [1_162, 1_250, 86, 1_223, 835, 896]
