"""Tokens a second of a training step, against ``torch.nn.Transformer``: ``python benchmarks/training.py``.

Models have the sizes of the translation presets ``quick`` and ``laptop``; batches have so many tokens as there, in
sentences of 16 (``quick`` only), 32 and 128.  In each block all candidates make the same step (forward, label-smoothed
cross-entropy, backward, clipping, AdamW) on the same batch; they are timed in turn, several rounds in one process, and
what counts is the time over that of our Transformer with the exponentiated dot product in the same round: its median
over the rounds, the least and the largest.  Numbers below 1e-38 are taken for 0 on all sides.

Torch's Transformer has our embeddings, sinusoidal positions, tied output, order of norms, sizes, and dropout where
ours has it; it is timed with the batch first and with the length first, and once more with all the dropout that it has
when nobody changes it (of attention weights, and inside the feed-forward sublayers).  Before it is timed it gets our
weights, in float64, and must give our output and our gradients.

The record is results/benchmark-training-DEVICE.json.  For a record to keep, let the machine do nothing else.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelbook import bench, tasks
from kernelbook.attention.call import Call
from kernelbook.attention.dispatch import choose
from kernelbook.bench import Setting, Target
from kernelbook.files import FileError, write_whole
from kernelbook.models import Transformer, TransformerConfig
from kernelbook.positions import sinusoidal
from kernelbook.training import Settings

NAME = "benchmark-training"
OURS = "edp"
TORCH = "torch.nn.Transformer"

#: Kernels timed whatever their path is; those on the fused path are timed in any case.
INFORMATION = ("exponentiated_intersection", "l2", "quadratic", "linear")

TARGETS = (
    Target("tokens a second with EDP over those of torch.nn.Transformer", {"suite": "training", "aim": "torch"}, 1.0,
           at_least=True),
    Target("training step over EDP's, kernels with a fused path", {"suite": "training", "path": "fused"}, 1.15),
)


# ------------------------------------------------------------------------- torch's side

class TorchTransformer(nn.Module):
    """Torch's Transformer with our embeddings, positions, sizes, order of norms and dropout.

    Parameters
    ----------
    config : TransformerConfig
        The numbers; its kernel is not used.
    batch_first : bool
        How torch's layers see their inputs.
    all_dropout : bool
        Whether weights and hidden units of the feed-forward sublayers drop out too, as they do by default.
    """

    def __init__(self, config: TransformerConfig, *, batch_first: bool = True, all_dropout: bool = False) -> None:
        super().__init__()
        self.config, self.batch_first = config, batch_first
        c = config
        sizes = {"dim_feedforward": c.feedforward, "dropout": c.dropout, "batch_first": batch_first, "norm_first": True}
        self.embedding = nn.Embedding(c.vocabulary, c.width, padding_idx=c.pad_id)
        nn.init.normal_(self.embedding.weight, std=c.width ** -0.5)
        self.dropout = nn.Dropout(c.dropout)
        if c.architecture == "encoder-decoder":
            with warnings.catch_warnings():         # that nested tensors, of use in inference, need another order
                warnings.simplefilter("ignore", UserWarning)
                self.body = nn.Transformer(c.width, c.heads, c.layers, c.layers, **sizes)
        else:
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(c.width, c.heads, **sizes), c.layers,
                                              nn.LayerNorm(c.width), enable_nested_tensor=False)
        self.classifier = nn.Linear(c.width, c.classes) if c.classes else None
        if not all_dropout:
            for module in self.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = c.attention_dropout
                elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                    module.dropout = nn.Identity()
        self.positions: Tensor | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """Of tokens ``(batch, length)``, as torch's layers want them."""
        weight, length = self.embedding.weight, tokens.shape[1]
        if self.positions is None or len(self.positions) < length or self.positions.dtype != weight.dtype:
            self.positions = sinusoidal(length, self.config.width, device=weight.device, dtype=weight.dtype)
        positions = self.positions[:length]
        if not self.batch_first:
            tokens, positions = tokens.T, positions[:, None]
        return self.dropout(self.embedding(tokens) * self.config.width ** 0.5 + positions)

    def forward(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        """Scores, as :meth:`kernelbook.models.Transformer.forward` gives them."""
        hidden = tokens == self.config.pad_id
        n = (tokens if target is None else target).shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        if target is not None:
            x = self.body(self.embed(tokens), self.embed(target), tgt_mask=later, tgt_is_causal=True,
                          src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        elif self.classifier is None:
            x = self.body(self.embed(tokens), mask=later, is_causal=True)
        else:
            x = self.body(self.embed(tokens), src_key_padding_mask=hidden)
        x = x if self.batch_first else x.transpose(0, 1)
        if self.classifier is None:
            return F.linear(x, self.embedding.weight)
        seen = (~hidden).unsqueeze(-1).to(x.dtype)
        return self.classifier((x * seen).sum(-2) / seen.sum(-2).clamp(min=1))

    def of_ours(self) -> dict[str, str]:
        """The name of each of our parameters, by the name that it has here."""
        parts = {"self_attn": "self_attention", "multihead_attn": "cross_attention", "linear1": "feedforward.0",
                 "linear2": "feedforward.2", "norm1": "self_norm", "norm2": "feedforward_norm"}
        alone = {"decoder": "decoder", "classifier": "encoder"}.get(self.config.architecture)
        found = {}
        for name, _ in self.named_parameters():
            first, *words = name.split(".")
            if first != "body":                         # the embedding, the classifier
                found[name] = name
                continue
            stack = alone or words.pop(0)
            if words[0] == "norm":
                found[name] = ".".join((f"{stack}_norm", *words[1:]))
                continue
            _, number, part, *rest = words
            three = {"norm2": "cross_norm", "norm3": "feedforward_norm"} if (stack, alone) == ("decoder", None) else {}
            found[name] = ".".join((stack, number, (parts | three)[part], *rest))
        return found

    def take(self, ours: Transformer) -> TorchTransformer:
        """Copy our weights; raise if there are others, or not as many, on one side."""
        state, names = ours.state_dict(), self.of_ours()
        if set(names.values()) != set(state):
            raise RuntimeError(f"not the same parameters: {sorted(set(names.values()) ^ set(state))}")
        self.load_state_dict({theirs: state[name] for theirs, name in names.items()})
        return self


def disagreement(config: TransformerConfig, inputs: tuple[Tensor, ...], batch_first: bool = True) -> float:
    """The largest error of outputs and gradients between our Transformer and torch's, over the largest of their values.

    Both have the same weights, in float64, and no dropout.
    """
    config = replace(config, dropout=0.0, attention_dropout=0.0, kernel="edp", normaliser="sum")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = Transformer(config).double()
    with torch.no_grad():
        for p in ours.parameters():             # biases too, which begin as 0
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())) / 50)
    theirs = TorchTransformer(config, batch_first=batch_first).double().take(ours)
    results = []
    for model, names in ((ours, None), (theirs, theirs.of_ours())):
        scores = model(*inputs)
        scores.square().mean().backward()
        results.append({"": scores.detach()} | {(names or {}).get(name, name): p.grad
                                                for name, p in model.named_parameters()})
    mine, other = results
    return max(((mine[name] - other[name]).abs().max() / mine[name].abs().max()).item() for name in mine)


# ------------------------------------------------------------------------- a step

@dataclass(frozen=True)
class Size:
    """What is trained: a name, the model without its kernel, and the training."""

    name: str
    config: TransformerConfig
    settings: Settings


def sizes(quick: bool) -> list[Size]:
    """The models: those of the translation presets, and others of the size of ``quick``."""
    presets = tasks.TASKS["translation"].presets
    found = []
    for name in ("smoke",) if quick else ("quick", "laptop"):
        preset = presets[name]
        config = TransformerConfig("encoder-decoder", preset.options["vocabulary"], **preset.model)
        found.append(Size(name, config, preset.settings))
    first = found[0]
    return [*found, replace(first, config=replace(first.config, architecture="decoder")),
            replace(first, config=replace(first.config, architecture="classifier", classes=5))]


def batch(size: Size, n: int, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and targets of so many sentences of ``n`` tokens as the budget holds; half of the sources are padded."""
    c, random = size.config, torch.Generator().manual_seed(n)
    rows = max(2, size.settings.batch_tokens // n)
    source, target = (torch.randint(1, c.vocabulary, (rows, n + i), generator=random).to(device) for i in (0, 1))
    if c.architecture == "decoder":
        return (target[:, :-1],), target[:, 1:]
    source[: rows // 2, n - max(1, n // 8):] = c.pad_id
    if c.architecture == "classifier":
        return (source,), torch.randint(c.classes, (rows,), generator=random).to(device)
    return (source, target[:, :-1]), target[:, 1:]


def step(make: Callable[[], nn.Module], size: Size, inputs: tuple[Tensor, ...], targets: Tensor,
         device: str) -> tuple[Callable[[], Any], int]:
    """One update as a function of no arguments, and the number of parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(device).train()
    s = size.settings
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is big] for big in (True, False))
    # So low a rate that the batch is not learned by heart while it is timed.
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": s.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], lr=1e-6, betas=(0.9, 0.98))

    def once() -> None:
        scores = model(*inputs).flatten(0, -2)
        loss = F.cross_entropy(scores, targets.flatten(), label_smoothing=s.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimiser.step()

    return once, sum(p.numel() for p in model.parameters())


def measure(size: Size, n: int, setting: Setting, least: float) -> list[dict[str, Any]]:
    """The rows of one block."""
    c, device = size.config, setting.device
    inputs, targets = batch(size, n, device)
    rows = len(targets)
    words = (c.architecture, size.name, f"n={n}")
    work: dict[str, Callable[[], Any]] = {}
    about: dict[str, dict[str, Any]] = {}

    def add(name: str, make: Callable[[], nn.Module], **more: Any) -> None:
        if name == OURS or setting.wants(*words, name):
            work[name], count = step(make, size, inputs, targets, device)
            about[name] = {"suite": "training", "candidate": name, "architecture": c.architecture, "size": size.name,
                           "n": n, "batch": rows, "parameters": count, **more}

    head = c.width // c.heads
    for name, own in bench._own(head).items():
        if name == "linear":
            own = replace(own, normaliser="abs-sum")
        call = Call(own.kernel, own.normaliser, n=n, m=n, d=head, d_v=head, batch=rows * c.heads, gradient=True,
                    device=torch.device(device).type, mask="none" if c.architecture == "decoder" else "keys",
                    causal=c.architecture == "decoder")
        path = choose(call)
        if name == OURS or path == "fused" or name in INFORMATION:
            ours = replace(c, kernel=own.kernel, normaliser=own.normaliser)
            add(name, lambda ours=ours: Transformer(ours), who="kernelbook", kernel=name, normaliser=own.normaliser,
                path=path)
    for label, aim, options in (("", "torch", {}), (", length first", "torch", {"batch_first": False}),
                                (", all its dropout", None, {"all_dropout": True})):
        add(TORCH + label, lambda options=options: TorchTransformer(c, **options), who="torch", kernel="edp", aim=aim)
        if aim and TORCH + label in work:
            small = tuple(x[:2].cpu() for x in inputs)
            if (error := disagreement(c, small, **options)) > 1e-10:
                raise RuntimeError(f"{TORCH + label} differs from our Transformer by {error:.1e}")
    if len(work) == 1 and not setting.wants(*words, OURS):
        return []
    counts = {row["parameters"] for row in about.values()}
    if len(counts) > 1:
        raise RuntimeError(f"not all have as many parameters: {counts}")
    # On one thread its own time, which other programs of the machine touch less than the clock on the wall.
    clock = time.process_time if device == "cpu" and setting.threads == 1 else time.perf_counter
    found = bench.interleaved(work, OURS, rounds=setting.rounds, least=least, patient=work, most=float("inf"),
                              finish=bench._finish(setting), clock=clock)
    return [bench._per_second(about[name] | found[name], rows * n) for name in work]


# ------------------------------------------------------------------------- the record

def main(arguments: list[str] | None = None) -> None:
    """Measure, write the record after every block, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="tiny models and two rounds, to see that it runs; no record unless --out says where")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="measure only this, as in rbf or 'encoder-decoder quick n=16 *'; repeatable; no record "
                             "unless --out says where")
    parser.add_argument("--out", type=Path, help="the record (default: results/benchmark-training-DEVICE.json)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is timed in turn")
    parser.add_argument("--seconds", type=float, default=0.5, help="the least time of one measurement")
    options = parser.parse_args(arguments)
    try:
        setting = Setting(options.device, options.threads, 2 if options.quick else options.rounds, options.quick,
                          tuple(options.only))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    out = options.out
    if out is None and not options.quick and not options.only:
        out = Path(__file__).resolve().parent.parent / "results" / f"{NAME}-{setting.device.partition(':')[0]}.json"

    words = sys.argv[1:] if arguments is None else arguments
    kept = [w for i, w in enumerate(words) if w.split("=")[0] != "--out" and (i == 0 or words[i - 1] != "--out")]
    record = bench._empty(setting, shlex.join(["python", "benchmarks/training.py", *kept])) | {"name": NAME}
    # How busy the machine was when nothing of this had begun: 0 if it was calm.
    record["provenance"]["load_average"] = round(os.getloadavg()[0], 2)
    todo = [(size, n) for size in sizes(setting.quick) for n in ((8,) if setting.quick else (16, 32, 128))
            if setting.quick or n >= 32 or (size.name, size.config.architecture) == ("quick", "encoder-decoder")]
    record["setting"]["seconds"] = options.seconds
    record["setting"]["models"] = {f"{s.config.architecture} {s.name}": {key: value for key, value in
                                   s.config.to_dict().items() if key not in ("kernel", "normaliser", "path")}
                                   for s, _ in todo}
    began = time.perf_counter()
    with bench._machine(setting):
        for size, n in todo:
            name = f"{size.config.architecture} {size.name} n={n}"
            rows = measure(size, n, setting, 0.0 if setting.quick else options.seconds)
            if not rows:
                continue
            record["rows"] += [bench._plain(row) for row in rows]
            record["blocks"].append(name)
            record["complete"] = len(record["blocks"]) == len(todo)
            record["provenance"]["wall_time_s"] = round(time.perf_counter() - began, 1)
            if out is not None:
                write_whole(out, bench._text(record))
            show(name, rows)
    if not record["rows"]:
        parser.error(f"nothing that is measured matches {' or '.join(options.only)}; a pattern is part of a name such "
                     "as 'encoder-decoder quick n=16 rbf'")
    for verdict in bench.verdicts(record, TARGETS):
        if verdict["value"] is not None:
            print(f"{'met   ' if verdict['met'] else 'MISSED'}  {verdict['what']}: {verdict['value']:.3f} "
                  f"({'at least' if verdict['at_least'] else 'at most'} {verdict['bound']}), worst: {verdict['which']}")
    if out is not None:
        print(f"record  {os.path.relpath(out)}")


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """A table of one block."""
    print(f"\n{name}: {rows[0]['batch']} sentences, {rows[0]['parameters']:,} parameters", flush=True)
    for row in rows:
        told = row.get("failed") or (f"{row['tokens_per_second']:8,.0f} tokens/s   {row['ratio']:.3f} of EDP's time "
                                     f"({row['low']:.3f} to {row['high']:.3f})")
        print(f"  {row['candidate']:40} {told}  {row.get('path', '')}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except FileError as error:
        sys.exit(str(error))
