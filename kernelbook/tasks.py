"""Tasks: what a model is trained for, from a corpus to a record.

Each task has presets of the same names: ``smoke`` (seconds, for tests), ``quick`` (at most 3 minutes on 2 CPU cores),
``laptop`` (at most 15), ``gpu``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from . import evaluation
from .attention.definition import check_normaliser
from .data import Pair, ParallelCorpus, Tokenizer, fingerprint, load_translation, pad, token_budget_batches
from .files import FileError
from .kernels import Kernel, get
from .models import Transformer, TransformerConfig
from .results import Record, provenance
from .training import Interrupted, Settings, fit, save_model

__all__ = ["TranslationPreset", "TRANSLATION_PRESETS", "Translation", "train_translation"]


@dataclass(frozen=True)
class TranslationPreset:
    """The size of a translation run.

    Parameters
    ----------
    settings : Settings
        Of the training.
    vocabulary : int
        Tokens of the joint byte-pair vocabulary.
    model : dict
        Numbers of :class:`kernelbook.models.TransformerConfig`.
    max_words : dict
        By corpus: pairs with a longer side are left out, in every split.
    train_pairs, test_pairs : int, optional
        At most so many, the first of the split.
    """

    settings: Settings
    vocabulary: int
    model: dict[str, Any] = field(default_factory=dict)
    max_words: dict[str, int] = field(default_factory=dict)
    train_pairs: int | None = None
    test_pairs: int | None = None


TRANSLATION_PRESETS = {
    "smoke": TranslationPreset(
        Settings(steps=20, batch_tokens=512, learning_rate=3e-3), vocabulary=500,
        model={"width": 32, "heads": 2, "layers": 1, "feedforward": 64}, max_words={"bible": 12, "multi30k": 12},
        train_pairs=200, test_pairs=20),
    "quick": TranslationPreset(
        Settings(steps=1000, batch_tokens=1024, learning_rate=3e-3), vocabulary=4000,
        model={"width": 128, "heads": 4, "layers": 2, "feedforward": 512}, max_words={"bible": 16}),
    "laptop": TranslationPreset(
        Settings(steps=1800, batch_tokens=1536, learning_rate=2e-3), vocabulary=6000,
        model={"width": 192, "heads": 6, "layers": 3, "feedforward": 768}, max_words={"bible": 24}),
    "gpu": TranslationPreset(
        Settings(steps=20000, batch_tokens=8192, learning_rate=7e-4), vocabulary=10000,
        model={"width": 512, "heads": 8, "layers": 6, "feedforward": 2048, "dropout": 0.2}),
}


class Translation:
    """Translation as a task for :func:`kernelbook.training.fit`: pairs as token numbers, batches, losses.

    Parameters
    ----------
    corpus : ParallelCorpus
        Its training pairs are learned, its validation pairs watched.
    tokenizer : Tokenizer
        Joint, of both languages.
    settings : Settings
        Budget of a batch, label smoothing, seed.
    """

    def __init__(self, corpus: ParallelCorpus, tokenizer: Tokenizer, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.train, self.valid = self._encode(corpus.train), self._encode(corpus.valid)
        self._lengths = [max(len(s), len(t)) for s, t in self.train]

    def _encode(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        t = self.tokenizer
        sources = t.encode_batch([p.source for p in pairs])
        targets = t.encode_batch([p.target for p in pairs])
        return [([*s, t.eos_id], [t.bos_id, *y, t.eos_id]) for s, y in zip(sources, targets, strict=True)]

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of similar lengths within the token budget, drawn from (seed, epoch)."""
        s = self.settings
        return token_budget_batches(self._lengths, s.batch_tokens, shuffle=True, seed=s.seed, epoch=epoch)

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Label-smoothed cross-entropy per target token, in nats, and the number of target tokens."""
        return self._loss(model, [self.train[i] for i in indices], device, self.settings.label_smoothing)

    def _loss(self, model: torch.nn.Module, pairs: list[tuple[list[int], list[int]]], device: torch.device,
              smoothing: float) -> tuple[Tensor, int]:
        pad_id = self.tokenizer.pad_id
        source = pad([s for s, _ in pairs], pad_id).to(device)
        target = pad([t for _, t in pairs], pad_id).to(device)
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=pad_id,
                               label_smoothing=smoothing)
        return loss, sum(len(t) - 1 for _, t in pairs)

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Cross-entropy of the validation pairs, in nats a token, without label smoothing; and its exponential."""
        total, count = 0.0, 0
        lengths = [max(len(s), len(t)) for s, t in self.valid]
        for indices in token_budget_batches(lengths, max(4096, *lengths), shuffle=False):
            loss, n = self._loss(model, [self.valid[i] for i in indices], device, 0.0)
            total, count = total + loss.item() * n, count + n
        return {"valid_loss": total / count, "valid_perplexity": math.exp(min(total / count, 50.0))}


def train_translation(
    *,
    kernel: str | Kernel = "edp",
    preset: str = "quick",
    corpus: str | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    normaliser: str = "sum",
    steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str = "cpu",
    precision: str = "32-true",
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[Record, Path]:
    """Train a translator, evaluate it on held-out pairs, and write its model and record.

    Parameters
    ----------
    kernel : str or Kernel
        Of every attention of the model.
    preset : str
        One of :data:`TRANSLATION_PRESETS`.
    corpus : str, optional
        A name among :data:`kernelbook.data.CORPORA`; by default the one in ``data_dir``, else ``"bible"``.
    data_dir : path, optional
        Of the corpus in a folder of the reader's own.
    seed : int
        Of everything random.
    out : path, optional
        Folder of the run (default ``runs/`` and the run's name).
    normaliser : str
        As in :func:`kernelbook.attention.attend`.
    steps : int, optional
        Instead of the preset's.
    resume : bool
        Whether to finish a run that was interrupted.
    overwrite : bool
        Whether to replace what an earlier run left in ``out``.
    accelerator, precision : str
        As Lightning Fabric names them.
    report : callable
        Gets dictionaries on the progress: ``{"phase": ...}``, ``{"about": ...}``, those of
        :func:`kernelbook.training.fit`, ``{"translated": n, "of": n}``.

    Returns
    -------
    record : Record
    out : Path
        The folder, with ``model.safetensors`` and ``record.json``.

    Raises
    ------
    ValueError
        If the preset is unknown, the kernel and normaliser do not go together, or this machine has no such accelerator.
    FileError
        If ``out`` holds another run, or cannot be written.
    DataError
        If the corpus cannot be had.
    Interrupted
        If training was stopped; ``resume=True`` goes on.
    """
    began = time.perf_counter()
    if preset not in TRANSLATION_PRESETS:
        raise ValueError(f"no preset is called {preset!r} (known: {', '.join(TRANSLATION_PRESETS)})")
    kernel = get(kernel)
    check_normaliser(kernel, normaliser)
    size = TRANSLATION_PRESETS[preset]
    settings = replace(size.settings, seed=seed, **({} if steps is None else {"steps": steps}))
    try:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"accelerator {accelerator!r} with precision {precision!r} cannot be had: {error}") from None
    origin = provenance(fabric.device)
    report({"phase": "data"})
    whole = load_translation(corpus, data_dir=data_dir)
    name = f"translation-{whole.name}-{_label(kernel, normaliser)}-{preset}-seed{seed}"
    out = Path(out) if out is not None else Path("runs") / name
    state_path = out / "state.safetensors"
    _check_folder(out, resume=resume, overwrite=overwrite)
    pairs = _sized(whole, size)

    report({"phase": "vocabulary"})
    tokenizer = Tokenizer.train((text for p in pairs.train for text in p), size.vocabulary)
    task = Translation(pairs, tokenizer, settings)
    torch.manual_seed(seed)
    config = TransformerConfig("encoder-decoder", tokenizer.vocabulary_size, kernel=kernel, normaliser=normaliser,
                               pad_id=tokenizer.pad_id, **size.model)
    model = Transformer(config)
    report({"about": {"name": name, "data": pairs.summary(), "parameters": model.parameter_count, "kernel": kernel,
                      "out": str(out)}})

    report({"phase": "training"})
    about = {"kernel": kernel.to_config(), "normaliser": normaliser, "model": size.model, "data": pairs.fingerprint,
             "precision": precision}
    references = [p.target for p in pairs.test]

    try:
        history = fit(model, task, settings, fabric=fabric, state_path=state_path, resume=resume, about=about,
                      report=report)
        report({"phase": "evaluation"})
        hypotheses = evaluation.translate(model, tokenizer, [p.source for p in pairs.test],
                                          progress=lambda done, of: report({"translated": done, "of": of}))
        score, trivial = evaluation.bleu(hypotheses, references), evaluation.baselines(pairs.train, pairs.test)
    except KeyboardInterrupt:
        if not state_path.exists():
            raise
        raise Interrupted(f"stopped at once; what was saved last is in {state_path}") from None
    record = Record(
        name=name, task="translation", preset=preset, seed=seed, kernel=kernel.to_config(),
        metrics={"test_bleu": score.score, "valid_perplexity": history[-1]["valid_perplexity"],
                 "valid_loss": history[-1]["valid_loss"]},
        baselines=trivial, signature=score.signature,
        data={"name": pairs.name, "corpus": whole.name, "origin": pairs.origin, "fingerprint": pairs.fingerprint,
              "licence": pairs.licence, "direction": f"{pairs.source_language}-{pairs.target_language}",
              "train": len(pairs.train), "valid": len(pairs.valid), "test": len(pairs.test)},
        config={"model": config.to_dict(), "settings": asdict(settings), "decoding": "greedy",
                "precision": precision},
        parameters=model.parameter_count, history=history,
        samples=[{"source": pairs.test[i].source, "reference": references[i], "translation": hypotheses[i]}
                 for i in _spread(len(references), 3)],
        provenance=origin | {"wall_time_s": round(time.perf_counter() - began, 1)})
    save_model(out / "model.safetensors", model, {
        "task": "translation", "tokenizer": tokenizer.to_json(), "record": name, "direction": record.data["direction"]})
    record.save(out / "record.json")
    state_path.unlink(missing_ok=True)      # the run is whole; nothing is left to resume
    return record, out


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise FileError(f"{out} cannot be the folder of a run: {there} is "
                        f"{'read-only' if there.is_dir() else 'not a folder'}; choose another with --out")
    finished, state = (out / "record.json").exists(), (out / "state.safetensors").exists()
    if resume:
        if not state:
            what = "is a finished run" if finished else "holds no interrupted run"
            raise FileError(f"{out} {what}: there is nothing to resume; leave out --resume")
    elif overwrite:
        for name in ("record.json", "model.safetensors", "state.safetensors"):
            (out / name).unlink(missing_ok=True)
    elif finished or state:
        mend = "add --resume to go on with it, " if state else ""
        raise FileError(f"{out} holds {'a finished' if finished else 'an interrupted'} run: {mend}"
                        "add --overwrite to replace it, or choose another folder with --out")


def _label(kernel: Kernel, normaliser: str) -> str:
    """The kernel, its options and the normaliser, as part of a file's name."""
    options = "".join(f"-{key}{value}" for key, value in kernel.options().items() if not isinstance(value, Kernel))
    return kernel.to_config()["kernel"] + options + ("" if normaliser == "sum" else f"-{normaliser}")


def _sized(corpus: ParallelCorpus, size: TranslationPreset) -> ParallelCorpus:
    if corpus.name in size.max_words:
        corpus = corpus.short(size.max_words[corpus.name])
    if size.train_pairs or size.test_pairs:
        kept = {"train": corpus.train[:size.train_pairs], "valid": corpus.valid[:size.test_pairs],
                "test": corpus.test[:size.test_pairs]}
        corpus = replace(corpus, name=f"{corpus.name} (first {len(kept['train'])})", fingerprint=fingerprint(kept),
                         **kept)
    return corpus


def _spread(count: int, wanted: int) -> list[int]:
    """Indices spread evenly over ``range(count)``: a sample nobody picked."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
