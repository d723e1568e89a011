"""The Transformer: what it may see, what it must not depend on, what it is beside torch's, and greedy decoding."""

import importlib.util
import json
import math
import sys

import pytest
import torch

from kernelbook import kernels
from kernelbook.attention import KernelAttention
from kernelbook.decoding import greedy
from kernelbook.files import save_tensors
from kernelbook.models import ARCHITECTURES, Transformer, TransformerConfig
from kernelbook.training import load_model

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
    ({"qk_width": 0}, "qk_width must be at least 1"),
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


# ------------------------------------------------------------------------- one matrix for queries and keys; their width

OTHER = [{"tied": True}, {"qk_width": 3}, {"tied": True, "qk_width": 11}]


def of_architecture(architecture, *, batch=2, n=6):
    """Tokens for a model: a source with padding if it has an encoder, and a target if it has both."""
    source = tokens(batch, 5)
    source[0, 3:] = 0
    target = tokens(batch, n, seed=1)
    return {"encoder-decoder": (source, target), "decoder": (target,), "classifier": (source,)}[architecture]


@pytest.mark.parametrize("options", OTHER, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_tied_and_of_another_width_are_those_of_every_attention(architecture, options):
    model, plain = make(architecture, **options), make(architecture)
    modules = [m for m in model.modules() if isinstance(m, KernelAttention)]
    wide = 2 * options.get("qk_width", 8)
    rows = wide * (1 if "tied" in options else 2) + 16
    assert len(modules) == (6 if architecture == "encoder-decoder" else 2)
    for m in modules:
        assert m.in_proj_weight.shape == (rows, 16) and m.in_proj_bias.shape == (rows,)
    assert plain.parameter_count - model.parameter_count == len(modules) * (48 - rows) * 17
    inputs = of_architecture(architecture)
    assert model(*inputs).shape == plain(*inputs).shape
    before = model(*inputs)
    for m in modules:                       # each has its part in the output
        kept = m.in_proj_weight.detach().clone()
        with torch.no_grad():
            m.in_proj_weight[:wide] *= 2
        assert not torch.allclose(model(*inputs), before, atol=1e-6)
        with torch.no_grad():
            m.in_proj_weight.copy_(kept)


@pytest.mark.parametrize("options", OTHER, ids=str)
@pytest.mark.parametrize("kernel", ["edp", "rbf", "elu"])
def test_matrices_tied_and_of_another_width_decode_with_a_cache(kernel, options):
    for architecture in ("encoder-decoder", "decoder"):
        model, (*source, target) = make(architecture, kernel=kernel, **options), of_architecture(architecture)
        with torch.no_grad():
            memory = model.encode(*source) if source else ()
            whole, cache = model.decode(target, *memory), model.new_cache(*memory)
            parts = [model.decode(target[:, i:j], cache=cache) for i, j in ((0, 3), (3, 4), (4, 6))]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)


def test_models_written_before_there_were_ties_still_load(tmp_path):
    model = make("decoder")
    old = {key: value for key, value in model.config.to_dict().items() if key not in ("tied", "qk_width")}
    assert TransformerConfig.from_dict(old) == model.config and not model.config.tied
    save_tensors(tmp_path / "model.safetensors", model.float().state_dict(), {"kind": "model", "config": old})
    loaded, _ = load_model(tmp_path)
    source = tokens(2, 5)
    assert torch.equal(loaded(source), model(source))
    config = TransformerConfig("decoder", **SMALL, tied=True, qk_width=3)
    assert TransformerConfig.from_dict(config.to_dict()) == config


# ------------------------------------------------------------------------- beside torch's

def benchmark():
    """The script that times both."""
    spec = importlib.util.spec_from_file_location("training_benchmark", "benchmarks/training.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_edp_it_is_torch_s_transformer(architecture, batch_first):
    """Outputs and gradients of all parameters, with padding and causality, from the same weights in float64."""
    more = {"classes": 3} if architecture == "classifier" else {}
    config = TransformerConfig(architecture, **SMALL, **more)
    assert benchmark().disagreement(config, of_architecture(architecture), batch_first) < 1e-12


def test_the_benchmark_measures_equal_models_and_names_no_folder(tmp_path, capsys):
    script, path = benchmark(), tmp_path / "sub" / "record.json"
    patterns = [word for name in ("rbf", "torch.nn*") for word in ("--only", f"encoder-decoder smoke * {name}")]
    script.main(["--quick", *patterns, "--out", str(path)])
    record, said = json.loads(path.read_text()), capsys.readouterr().out
    assert record["kind"] == "benchmark" and record["name"] == "benchmark-training" and record["provenance"]["date"]
    assert record["provenance"]["command"].startswith("python benchmarks/training.py --quick --only")
    assert str(tmp_path) not in path.read_text()
    names = [row["candidate"] for row in record["rows"]]
    assert names == ["edp", "rbf", "torch.nn.Transformer", "torch.nn.Transformer, length first",
                     "torch.nn.Transformer, all its dropout"]
    assert len({row["parameters"] for row in record["rows"]}) == 1
    for row in record["rows"]:
        assert row["low"] <= row["ratio"] <= row["high"] and row["tokens_per_second"] > 0 and row["candidate"] in said
    for arguments, words in ((["--only", "none such"], "none such"), (["--rounds", "0"], "rounds"),
                             (["--device", "abacus"], "abacus")):
        with pytest.raises(SystemExit):
            script.main(arguments if "--rounds" in arguments else ["--quick", *arguments])
        assert words in capsys.readouterr().err


def test_the_benchmark_refuses_a_model_that_is_not_ours(monkeypatch):
    script = benchmark()
    config = TransformerConfig("encoder-decoder", **SMALL)
    inputs = of_architecture("encoder-decoder")
    monkeypatch.setattr(script.TorchTransformer, "embed", lambda self, tokens: self.embedding(tokens))
    assert script.disagreement(config, inputs) > 1e-3
    with pytest.raises(RuntimeError, match="not the same parameters"):
        script.TorchTransformer(config).take(make(tied=True, architecture="decoder"))


# ------------------------------------------------------------------------- numbers at the start

def fitting(name):
    return ["sum"] if kernels.get(name).normalisable else ["abs-sum", "relu-sum", "count"]


EACH = [(name, normaliser) for name in kernels.available() for normaliser in fitting(name)]


@pytest.mark.parametrize(("kernel", "normaliser"), EACH)
def test_gradients_are_finite_at_the_start(kernel, normaliser):
    """In single precision, where nearly all is padding, a sentence is empty, and tokens repeat."""
    source = torch.zeros(4, 12, dtype=torch.long)
    source[0, 0], source[1], source[2, :5] = 7, 9, torch.tensor([3, 3, 4, 3, 3])
    target = torch.full((4, 9), 5)
    for tied in (False, True):
        model = make(kernel=kernel, normaliser=normaliser, tied=tied, layers=3).float().train()
        logits = model(source, target)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        assert logits.isfinite().all()
        for name, p in model.named_parameters():
            if p.grad is None:          # nothing depends on the queries
                assert kernel == "constant" and "cross_norm" in name
            else:
                assert p.grad.isfinite().all(), name


@pytest.mark.parametrize(("kernel", "normaliser"), EACH)
def test_gradients_are_finite_where_queries_and_keys_coincide(kernel, normaliser):
    """One token throughout and one matrix: every query is every key; and all are zero."""
    torch.manual_seed(0)
    attention = KernelAttention(8, 2, kernel=kernel, normaliser=normaliser, tied=True, batch_first=True)
    for x in (torch.randn(1, 1, 8).repeat(2, 40, 1), torch.zeros(2, 40, 8)):
        x.requires_grad_()
        for causal in (False, True):
            out, _ = attention(x, x, x, is_causal=causal, need_weights=False)
            found = torch.autograd.grad(out.square().sum() + out.sum(), (x, *attention.parameters()))
            assert out.isfinite().all() and all(g.isfinite().all() for g in found)


# ------------------------------------------------------------------------- compiled, and on any device

@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_pass_looks_at_a_number(architecture, kernel):
    """On a device whose tensors have no numbers: asking for one, which makes a GPU wait, would fail there."""
    model = make(architecture, kernel=kernel, normaliser=fitting(kernel)[0]).to("meta").train()
    out = model(*(x.to("meta") for x in of_architecture(architecture)))
    out.sum().backward()
    assert out.device.type == "meta" and model.embedding.weight.grad.device.type == "meta"


@pytest.mark.parametrize("kernel", kernels.available())
def test_mixed_precision_is_near_single_precision(kernel):
    model = make(kernel=kernel, normaliser=fitting(kernel)[0]).float()
    source, target = of_architecture("encoder-decoder")
    expected = model(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(source, target)
    out.float().square().sum().backward()
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad is None or p.dtype is torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_it_compiles_whole():
    """In one graph, and again where lengths have become symbols and the table of positions grows."""
    torch._dynamo.reset()
    model = make(kernel="rbf", layers=1)
    compiled, parameters = torch.compile(model, backend="eager", fullgraph=True), list(model.parameters())
    for n in (6, 7, 70):
        inputs = of_architecture("encoder-decoder", n=n)
        outputs = [m(*inputs) for m in (compiled, model)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), parameters) for out in outputs))
