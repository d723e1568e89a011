"""Evaluation: BLEU is sacrebleu's, intervals are Student's, translations keep their order."""

import itertools
import math
from dataclasses import replace

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kernelbook.attention import weights
from kernelbook.data import Pair, ParallelCorpus, Tokenizer
from kernelbook.decoding import beam
from kernelbook.evaluation import (
    accuracy,
    attention_sample,
    baselines,
    bits_per_byte,
    bleu,
    chrf,
    holm,
    mean_interval,
    paired_difference,
    perplexity,
    translate,
)
from kernelbook.models import Transformer, TransformerConfig
from kernelbook.tasks import Translation
from kernelbook.training import Settings

PAIRS = [Pair("Der Hund sieht den Baum.", "The dog sees the tree."), Pair("Ja, sehr gern!", "Yes, very gladly!"),
         Pair("Ein Vogel ruft den Mann im Garten.", "A bird calls the man in the garden."), Pair("Nein.", "Yes."),
         Pair("Ach ja.", "Yes.")]
CORPUS = ParallelCorpus("five", PAIRS, PAIRS, PAIRS, origin="directory", fingerprint="")


@pytest.fixture(scope="module")
def translator():
    """A model that has learned its few sentences by heart."""
    tokenizer = Tokenizer.train([text for pair in PAIRS for text in pair], 300)
    torch.manual_seed(0)
    config = TransformerConfig("encoder-decoder", tokenizer.vocabulary_size, width=16, heads=2, layers=2, dropout=0.0,
                               feedforward=32, kernel="rbf", pad_id=tokenizer.pad_id)
    model, task = Transformer(config), Translation(CORPUS, tokenizer, Settings())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        optimiser.zero_grad()
        task.loss(model, list(range(len(PAIRS))), torch.device("cpu"))[0].backward()
        optimiser.step()
    return model.eval(), tokenizer


def test_bleu_is_sacrebleus():
    hypotheses, references = ["The dog sees a tree.", "Yes, very much!"], ["The dog sees the tree.", "Yes, gladly!"]
    found = bleu(hypotheses, references)
    assert found.score == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-4)
    assert bleu(references, references).score == pytest.approx(100) and "tok:13a" in found.signature
    characters = chrf(hypotheses, references)
    assert characters.score == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-4)
    assert chrf(references, references).score == pytest.approx(100) and "nc:6|nw:0" in characters.signature
    for score in (bleu, chrf):
        with pytest.raises(ValueError, match="2 and 1"):
            score(hypotheses, references[:1])


def test_trivial_systems_copy_and_repeat():
    found = baselines(PAIRS, [Pair("x", "Yes."), Pair("The tree.", "The tree.")])
    assert found == {"copy_source": bleu(["x", "The tree."], ["Yes.", "The tree."]).score,
                     "most_frequent_sentence": bleu(["Yes.", "Yes."], ["Yes.", "The tree."]).score}


def test_perplexities_compare_vocabularies_by_word_and_byte():
    text, pieces = "a b", [1 / 4, 1 / 8]            # two tokens, or the same text as one token of probability 1/32
    nats = -sum(map(math.log, pieces))
    assert perplexity(nats, 2) == pytest.approx(math.sqrt(32)) and perplexity(-math.log(1 / 32), 1) == pytest.approx(32)
    assert perplexity(nats, len(text.split())) == pytest.approx(math.sqrt(32))
    assert bits_per_byte(nats, len(text.encode())) == pytest.approx(5 / 3)
    assert perplexity(0.0, 3) == 1 and perplexity(1e6, 1) == math.inf
    for bad in (lambda: perplexity(1.0, 0), lambda: bits_per_byte(-1.0, 2), lambda: perplexity(math.nan, 2)):
        with pytest.raises(ValueError, match="must be"):
            bad()


def test_accuracy_is_the_share_that_is_right():
    assert accuracy(["a", "b", "c", "c"], ["a", "c", "c", "c"]) == 0.75
    assert accuracy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0], [0, 0]])) == 0.25
    for predicted, expected in (([1], [1, 2]), ([], []), (torch.zeros(2, 1), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="as many predictions"):
            accuracy(predicted, expected)


def test_an_interval_is_students():
    found = mean_interval([1, 2, 3, 4, 5])
    assert (found.mean, found.n, found.level) == (3, 5, 0.95)
    assert found.half_width == pytest.approx(2.7764451052 * math.sqrt(2.5 / 5), rel=1e-9)     # t(4), 97.5 %, of a table
    values, reference = [3.1, 2.4, 5.0, 4.4], [2.9, 2.5, 4.1, 4.0]
    for level in (0.5, 0.99):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
        found = mean_interval(dict(enumerate(values)), level)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
        low, high = stats.ttest_rel(values, reference).confidence_interval(level)
        found = paired_difference(values, reference, level)
        assert (found.mean, found.low, found.high) == pytest.approx((0.35, low, high), rel=1e-12)
        assert found.p_value == pytest.approx(stats.ttest_rel(values, reference).pvalue, rel=1e-12)
    assert (mean_interval([2, 2]).p_value, mean_interval([0, 0]).p_value, mean_interval([1]).p_value) == (0, 1, None)


@given(st.dictionaries(st.integers(), st.floats(0, 1), max_size=5))
def test_adjusted_p_values_are_those_of_the_closed_test(p_values):
    # A hypothesis is rejected if every set that holds it is, by Bonferroni: Holm's shortcut does the same.
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    sets = [c for n in range(1, len(p_values) + 1) for c in itertools.combinations(p_values, n)]
    for name in p_values:
        closed = max(min(1.0, len(c) * min(p_values[x] for x in c)) for c in sets if name in c)
        assert adjusted[name] == closed


def test_differences_are_paired_by_seed():
    values, reference = {0: 3.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 2.0, 1: 4.0}
    found = paired_difference(values, reference)
    assert (found.mean, found.low, found.high, found.n) == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="only one: 2, 7"):
        paired_difference(values, {0: 1.0, 1: 1.0, 7: 1.0})


def test_one_repetition_has_no_interval_and_says_so():
    for found in (mean_interval([2.5]), paired_difference([4], [1.5])):
        assert (found.mean, found.low, found.high, found.half_width, found.n) == (2.5, None, None, None, 1)
        assert str(found) == "2.5 (n = 1, no interval)"
    assert str(mean_interval([1, 3], 0.9)) == "2 [-4.314, 8.314] (n = 2, 90 %)"


@pytest.mark.parametrize(("call", "words"), [
    (lambda: mean_interval([]), "at least one"),
    (lambda: mean_interval([1, math.nan, math.inf]), "2 of 3 are not"),
    (lambda: mean_interval([1, 2], 95), "as in 0.95"),
    (lambda: paired_difference([1, 2], [1]), "2 and 1"),
    (lambda: paired_difference({0: 1}, [1]), "both be mappings"),
    (lambda: holm({"RBF": 0.2, "L2": math.nan}), "but L2: nan"),
])
def test_intervals_refuse_what_they_cannot_use(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_losses_are_those_of_a_plain_loop_over_tokens(translator):
    model, tokenizer = translator
    many = [*PAIRS, *[Pair("Ach ja, sehr gern! " * 9, "The man in the garden. " * 9)] * 99]     # of uneven batches
    task = Translation(replace(CORPUS, valid=many), tokenizer, Settings(label_smoothing=0.2))
    plain, smooth, counts = [], [], []
    for pair in many[:6]:
        target = torch.tensor([tokenizer.bos_id, *tokenizer.encode(pair.target), tokenizer.eos_id])
        source = torch.tensor([[*tokenizer.encode(pair.source), tokenizer.eos_id]])
        with torch.no_grad():
            scores = model(source, target[None, :-1])[0].log_softmax(-1)
        right = scores[torch.arange(len(target) - 1), target[1:]]
        plain, counts = [*plain, -right.sum().item()], [*counts, len(target) - 1]
        smooth.append(-(0.8 * right + 0.2 * scores.mean(-1)).sum().item())
    loss, count = task.loss(model, [0, 1, 2, 3, 4], torch.device("cpu"))
    assert count == sum(counts[:5]) and loss.item() == pytest.approx(sum(smooth[:5]) / count, rel=1e-5)
    with torch.no_grad():
        found = task.validate(model, torch.device("cpu"))
    expected = (sum(plain[:5]) + 99 * plain[5]) / (sum(counts[:5]) + 99 * counts[5])
    assert found["valid_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["valid_perplexity"] == pytest.approx(math.exp(min(expected, 50)), rel=1e-4)


def test_batches_follow_from_seed_and_epoch(translator):
    def batches(epoch, seed=0):
        return Translation(replace(CORPUS, train=PAIRS * 9), translator[1], Settings(seed=seed)).batches(epoch)

    assert batches(0) == batches(0) and batches(0) != batches(1) and batches(0) != batches(0, seed=1)


def test_translations_come_in_the_order_asked_whatever_the_batches(translator):
    sentences = [PAIRS[2].source, "", PAIRS[3].source, "  ", PAIRS[0].source, "Der Mann ruft den Baum im Hund gern."]
    together = translate(*translator, sentences, batch_tokens=1000)
    assert together[:5] == [PAIRS[2].target, "", PAIRS[3].target, "", PAIRS[0].target]
    assert together == translate(*translator, sentences, batch_tokens=1)        # one a batch
    assert together == [translate(*translator, [s])[0] for s in sentences]


def test_a_beam_translates_too_as_if_each_sentence_were_alone(translator):
    sentences = [PAIRS[2].source, "", PAIRS[3].source, "Der Mann ruft den Baum im Hund gern.", "Hund Garten ja " * 9]
    found = translate(*translator, sentences, beam=3)
    assert found[:3] == [PAIRS[2].target, "", PAIRS[3].target]
    assert found == [translate(*translator, [s], beam=3)[0] for s in sentences]
    model, tokenizer = translator
    ids = [*tokenizer.encode(sentences[3]), tokenizer.eos_id]
    options = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "max_length": len(ids) * 3 // 2 + 10}
    for alpha in (0.0, 1.0):
        expected = beam(model, torch.tensor([ids]), width=2, length_penalty=alpha, **options)[0]
        found = translate(*translator, [sentences[3]], beam=2, length_penalty=alpha)
        assert found == [tokenizer.decode(expected)]


def test_a_long_sentence_is_translated_whole_and_alone(translator, monkeypatch):
    model, tokenizer = translator
    long = "Der Hund sieht den Baum. " * 60
    sentences, shapes, encode = [PAIRS[0].source, long, PAIRS[2].source], [], model.encode
    monkeypatch.setattr(model, "encode", lambda tokens: (shapes.append(tuple(tokens.shape)), encode(tokens))[1])
    done = []
    found = translate(*translator, sentences, batch_tokens=100, progress=lambda *now: done.append(now))
    size = len(tokenizer.encode(long)) + 1
    assert size > 300 and shapes[-1] == (1, size) and max(math.prod(shape) for shape in shapes[:-1]) <= 100
    assert found[::2] == [PAIRS[0].target, PAIRS[2].target] and done[-1] == (3, 3)
    assert 0 < len(tokenizer.encode(found[1])) <= size * 3 // 2 + 10
    for options in ({"beam": 0}, {"batch_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            translate(*translator, sentences, **options)


@pytest.mark.parametrize("width", [1, 2])
def test_a_translation_is_cut_off_at_the_length_of_its_own_source(translator, width):
    tokenizer = translator[1]
    model = Transformer(translator[0].config).eval()
    scores, special = model.logits, torch.arange(tokenizer.vocabulary_size) <= tokenizer.unk_id     # eos_id among them
    model.logits = lambda x: scores(x) - 100 * special
    sentences = ["Ja.", "Der Hund sieht den Baum.", "Nein, ach nein, ach nein, ach ja."]
    found = translate(model, tokenizer, sentences, beam=width)
    assert found == [translate(model, tokenizer, [s], beam=width)[0] for s in sentences]
    assert len(set(map(len, found))) == 3


def test_the_attention_kept_is_that_of_the_model(translator):
    model, tokenizer = translator
    sample = attention_sample(model, tokenizer, PAIRS[0].source, PAIRS[0].target, record="run")
    layers, heads, n, m = 2, 2, len(sample.target_tokens), len(sample.source_tokens)
    w = weights(sample.queries, sample.keys, sample.kernel)
    assert w.shape == (layers, heads, n, m)

    seen = []
    hook = model.decoder[1].cross_attention.register_forward_hook(
        lambda module, args, kwargs, out, seen=seen: seen.append(
            module(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))[1])
        if not kwargs.get("need_weights") else None, with_kwargs=True)
    model.eval()
    source = torch.tensor([[*tokenizer.encode(PAIRS[0].source), tokenizer.eos_id]])
    with torch.no_grad():
        model(source, torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PAIRS[0].target)]]))
    hook.remove()
    assert torch.allclose(w[1], seen[0][0], atol=1e-6)


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder", "classifier"])
def test_attention_of_any_stack_is_that_of_the_model(translator, architecture):
    tokenizer, text, target = translator[1], PAIRS[0].source, PAIRS[0].target
    torch.manual_seed(1)
    classes = 3 if architecture == "classifier" else None
    model = Transformer(TransformerConfig(architecture, tokenizer.vocabulary_size, classes, width=16, heads=2, layers=2,
                                          feedforward=32, kernel="rbf", pad_id=tokenizer.pad_id))
    ids, other = tokenizer.encode(text), tokenizer.encode(target)
    pieces, others = tokenizer.tokens(text), tokenizer.tokens(target)
    if architecture == "encoder-decoder":
        source, targets = [*ids, tokenizer.eos_id], [tokenizer.bos_id, *other]
        expected = {"encoder": ([*pieces, "⟨end⟩"],) * 2, "decoder": (["⟨begin⟩", *others],) * 2,
                    "cross": ([*pieces, "⟨end⟩"], ["⟨begin⟩", *others])}
    elif architecture == "decoder":
        source, targets, expected = [tokenizer.eos_id, *ids], None, {"decoder": (["⟨end⟩", *pieces],) * 2}
    else:
        source, targets, expected = [tokenizer.bos_id, *ids], None, {"encoder": (["⟨begin⟩", *pieces],) * 2}
    options = {} if targets is None else {"target": target}
    for attention, labels in expected.items():
        stack = model.encoder if attention == "encoder" else model.decoder
        seen, hooks = [], []
        for block in stack:
            module = block.cross_attention if attention == "cross" else block.self_attention
            hooks.append(module.register_forward_hook(lambda module, args, kwargs, out, seen=seen: seen.append(
                type(module).forward(module, *args, **(kwargs | {"need_weights": True, "average_attn_weights": False})
                                     )[1][0]), with_kwargs=True))
        sample = attention_sample(model, tokenizer, text, record="run", attention=attention, **options)
        for hook in hooks:
            hook.remove()
        w = weights(sample.queries, sample.keys, sample.kernel, causal=attention == "decoder")
        assert torch.allclose(w, torch.stack(seen), atol=1e-6) and model.training
        assert (sample.source_tokens, sample.target_tokens) == labels
        again = attention_sample(model, tokenizer, source, record="run", attention=attention,
                                 **({} if targets is None else {"target": targets}))
        assert torch.equal(again.keys, sample.keys) and (again.source, again.target) == (sample.source, sample.target)
    default = attention_sample(model, tokenizer, text, record="run", **options)
    assert torch.equal(default.queries, sample.queries)         # that of the last one, or the only one
    if architecture == "encoder-decoder":
        alone = attention_sample(model, tokenizer, text, record="run", attention="encoder")
        assert alone.source == alone.target == text and alone.keys.shape[-2] == len(source)


def test_attention_that_is_not_there_is_named(translator):
    model, tokenizer = translator
    decoder = Transformer(TransformerConfig("decoder", 300, width=8, heads=1, layers=1, feedforward=8))
    for call, words in (
            (lambda: attention_sample(model, tokenizer, "Ja.", record="r"), "needs a target"),
            (lambda: attention_sample(model, tokenizer, "Ja.", "", record="r"), "empty text"),
            (lambda: attention_sample(model, tokenizer, "Ja.", "Yes.", record="r", attention="self"), "no attention"),
            (lambda: attention_sample(decoder, tokenizer, "Ja.", "Yes.", record="r"), "this is a decoder"),
            (lambda: attention_sample(decoder, tokenizer, "Ja.", record="r", attention="cross"), "no attention")):
        with pytest.raises(ValueError, match=words):
            call()
