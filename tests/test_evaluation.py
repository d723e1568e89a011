"""Evaluation: BLEU is sacrebleu's, trivial systems are computed, translations keep their order."""

import pytest
import sacrebleu
import torch

from kernelbook.attention import weights
from kernelbook.data import Pair, ParallelCorpus, Tokenizer
from kernelbook.evaluation import attention_sample, baselines, bleu, translate
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
    with pytest.raises(ValueError, match="2 and 1"):
        bleu(hypotheses, references[:1])


def test_trivial_systems_copy_and_repeat():
    found = baselines(PAIRS, [Pair("x", "Yes."), Pair("The tree.", "The tree.")])
    assert found == {"copy_source": bleu(["x", "The tree."], ["Yes.", "The tree."]).score,
                     "most_frequent_sentence": bleu(["Yes.", "Yes."], ["Yes.", "The tree."]).score}


def test_translations_come_in_the_order_asked_whatever_the_batches(translator):
    sentences = [PAIRS[2].source, "", PAIRS[3].source, "  ", PAIRS[0].source, "Der Mann ruft den Baum im Hund gern."]
    together = translate(*translator, sentences, batch_tokens=1000)
    assert together[:5] == [PAIRS[2].target, "", PAIRS[3].target, "", PAIRS[0].target]
    assert together == translate(*translator, sentences, batch_tokens=1)        # one a batch
    assert together == [translate(*translator, [s])[0] for s in sentences]


def test_the_attention_kept_is_that_of_the_model(translator):
    model, tokenizer = translator
    sample = attention_sample(model, tokenizer, PAIRS[0].source, PAIRS[0].target, record="run")
    layers, heads, n, m = 2, 2, len(sample.target_tokens), len(sample.source_tokens)
    w = weights(sample.queries, sample.keys, sample.kernel)
    assert w.shape == (layers, heads, n, m)

    seen = []
    hook = model.decoder[1].cross_attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(
            module(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))[1])
        if not kwargs.get("need_weights") else None, with_kwargs=True)
    model.eval()
    source = torch.tensor([[*tokenizer.encode(PAIRS[0].source), tokenizer.eos_id]])
    with torch.no_grad():
        model(source, torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PAIRS[0].target)]]))
    hook.remove()
    assert torch.allclose(w[1], seen[0][0], atol=1e-6)
