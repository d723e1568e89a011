"""The Transformer: what it may see, what it must not depend on, and greedy decoding."""

import math

import pytest
import torch

from kernelbook import kernels
from kernelbook.decoding import greedy
from kernelbook.models import ARCHITECTURES, Transformer, TransformerConfig

SMALL = {"vocabulary": 40, "width": 16, "heads": 2, "layers": 2, "feedforward": 32}
BOS, EOS = 1, 2


def make(architecture="encoder-decoder", seed=0, **options):
    torch.manual_seed(seed)
    if architecture == "classifier":
        options.setdefault("classes", 3)
    return Transformer(TransformerConfig(architecture, **(SMALL | options))).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", ["edp", "rbf", "exponentiated_intersection", "taylor"])
def test_a_target_token_changes_no_earlier_score(kernel):
    model, source, target = make(kernel=kernel), tokens(2, 5), tokens(2, 6, seed=1)
    other = target.clone()
    other[:, 3] = (other[:, 3] - 2) % 37 + 3
    before, after = model(source, target), model(source, other)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax(-1).amin() > 0        # and it does change those from there on


@pytest.mark.parametrize("architecture", ["encoder-decoder", "classifier"])
def test_padding_of_the_source_changes_nothing(architecture):
    model, source = make(architecture, pad_id=2), tokens(2, 5)
    padded = torch.cat((source, torch.full((2, 3), 2)), 1)
    more = (tokens(2, 4, seed=1),) if architecture == "encoder-decoder" else ()
    assert torch.allclose(model(source, *more), model(padded, *more), atol=1e-12)


def test_it_is_the_formula():
    model, source, target = make(kernel="rbf", layers=1), tokens(1, 5), tokens(1, 4, seed=1)
    with torch.no_grad():
        for p in model.parameters():        # gains and biases too, which begin as 1 and 0
            p.add_(torch.randn(p.shape, dtype=p.dtype) / 4)
    table, encoder, decoder = model.embedding.weight, model.encoder[0], model.decoder[0]
    positions = torch.tensor([[f(p / 10000 ** (2 * i / 16)) for i in range(8) for f in (math.sin, math.cos)]
                              for p in range(5)], dtype=torch.float64)

    def attend(module, x, y, causal=False):
        return module(x, y, y, is_causal=causal, need_weights=False)[0]

    x = 4 * table[source] + positions
    y = encoder.self_norm(x)
    x = x + attend(encoder.self_attention, y, y)
    x = model.encoder_norm(x + encoder.feedforward(encoder.feedforward_norm(x)))
    z = 4 * table[target] + positions[:4]
    y = decoder.self_norm(z)
    z = z + attend(decoder.self_attention, y, y, causal=True)
    z = z + attend(decoder.cross_attention, decoder.cross_norm(z), x)
    z = model.decoder_norm(z + decoder.feedforward(decoder.feedforward_norm(z)))
    assert torch.allclose(model(source, target), z @ table.T, atol=1e-10)


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"dropout": 0.0, "attention_dropout": 0.5}])
def test_sublayers_and_attention_drop_out_in_training_only(rates):
    model, source, target = make(**rates), tokens(1, 5), tokens(1, 4, seed=1)
    model.dropout = torch.nn.Identity()     # that of the embeddings
    assert torch.equal(model(source, target), model(source, target))
    model.train()
    assert not torch.allclose(model(source, target), model(source, target))


def test_each_architecture_scores_what_it_should():
    shapes = {"encoder-decoder": (2, 6, 40), "decoder": (2, 5, 40), "classifier": (2, 3)}
    for architecture in ARCHITECTURES:
        target = (tokens(2, 6),) if architecture == "encoder-decoder" else ()
        assert make(architecture)(tokens(2, 5), *target).shape == shapes[architecture]


def test_every_pair_of_kernels_gives_different_scores():
    source, target = tokens(1, 5), tokens(1, 4, seed=1)
    positive = [name for name in kernels.available() if kernels.get(name).normalisable and not name.startswith("test")]
    scores = {name: make(kernel=name)(source, target) for name in positive}
    close = [(a, b) for a in scores for b in scores if a < b and torch.allclose(scores[a], scores[b], atol=1e-4)]
    assert len(scores) >= 8 and not close


def test_configuration_survives_being_stored():
    kernel = kernels.RBF(bandwidth=0.5) * kernels.EDP()
    config = TransformerConfig("classifier", classes=2, kernel=kernel, **SMALL)
    assert TransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("change", "words"), [
    ({"architecture": "encoder"}, "known: encoder-decoder"),
    ({"heads": 3}, "multiple of heads"),
    ({"kernel": "linear"}, "signed"),
    ({"classes": 4}, "classifier"),
    ({"pad_id": 40}, "0 to 39"),
    ({"architecture": "classifier", "classes": 0}, "classes must be at least 1"),
])
def test_numbers_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**({"architecture": "encoder-decoder"} | SMALL | change))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="source and target"):
        make()(tokens(1, 3))
    with pytest.raises(ValueError, match="has no encoder"):
        make("decoder").encode(tokens(1, 3))
    with pytest.raises(ValueError, match="matrix of token numbers"):
        make("decoder")(torch.zeros(1, 3))


def test_greedy_is_the_stepwise_argmax_of_the_full_pass():
    model, source = make(), tokens(3, 5)
    found = greedy(model.train(), source, bos_id=BOS, eos_id=EOS, max_length=7)
    assert model.training and model.eval()
    for row, ids in zip(source, found, strict=True):
        expected = [BOS]
        while len(expected) < 8 and expected[-1] != EOS:
            expected.append(model(row[None], torch.tensor([expected]))[0, -1].argmax().item())
        assert ids == [i for i in expected[1:] if i != EOS]


def test_recorded_heads_are_those_of_the_pass():
    model, source, target = make(), tokens(1, 5), tokens(1, 4)
    layers = model.record_heads(lambda: model(source, target))
    assert [tuple(x.shape) for x in layers[0]] == [(1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8)]
    assert len(layers) == 2 and not torch.equal(layers[0][1], layers[1][1])
    with pytest.raises(ValueError, match="no attention 'cross'"):
        make("decoder").record_heads(lambda: None)
