r"""One-shot classification: which of two images is of the same class as a third.

At the preset ``quick`` images are reduced to 16 x 16 pixels, so that a patch of 8 x 8 is a quarter of an image and an
episode has 12 tokens; ``laptop`` and ``gpu`` have 32 x 32 and 48 tokens, as in the literature. There attention must
first learn which two patches have the same place: for a few hundred steps nothing is learned at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..data import ImageCorpus, Images, load_images
from ..paths.model import PathNetworkConfig
from ..paths.one_shot import PATCH, Episodes, episodes, nearest
from ..training import Settings
from .base import Outcome, Preset, TaskKind, seeded, spread

__all__ = ["OneShot", "ONE_SHOT", "PRESETS"]

CHANNELS = 3        # copies of a patch in a token, see kernelbook.paths.one_shot

PRESETS = {
    "smoke": Preset(
        Settings(steps=10, batch_tokens=192, learning_rate=1e-2, weight_decay=5e-5, label_smoothing=0.0,
                 schedule="constant"),
        {"layers": 2, "heads": 2, "width": 8, "qk_width": 4},
        {"size": 16, "rotations": True, "epoch_episodes": 160, "valid_episodes": 40, "test_episodes": 60}),
    "quick": Preset(
        Settings(steps=2500, batch_tokens=1536, learning_rate=1e-2, weight_decay=5e-5, label_smoothing=0.0,
                 schedule="cosine"),
        {"layers": 2, "heads": 4, "width": 64, "qk_width": 16},
        {"size": 16, "rotations": True, "epoch_episodes": 64000, "valid_episodes": 1000, "test_episodes": 2000}),
    "laptop": Preset(
        Settings(steps=12000, batch_tokens=6144, learning_rate=1e-2, weight_decay=5e-5, label_smoothing=0.0,
                 schedule="cosine"),
        {"layers": 2, "heads": 4, "width": 128, "qk_width": 32},
        {"size": 32, "rotations": True, "epoch_episodes": 128000, "valid_episodes": 2000, "test_episodes": 4000}),
    "gpu": Preset(
        Settings(steps=40000, batch_tokens=6144, learning_rate=5e-3, weight_decay=5e-5, label_smoothing=0.0,
                 schedule="constant"),
        {"layers": 2, "heads": 4, "width": 512, "qk_width": 128},
        {"size": 32, "rotations": True, "epoch_episodes": 128000, "valid_episodes": 2000, "test_episodes": 10000}),
}
"""Sizes of a one-shot run. Options: ``size`` (height and width of the images), ``rotations`` (whether a training
character that is turned by 90, 180 or 270 degrees counts as another one), ``epoch_episodes`` (episodes drawn anew for
each epoch), ``valid_episodes`` and ``test_episodes``."""


class OneShot:
    r"""One-shot classification as a task for :func:`kernelbook.training.fit`.

    An episode is a sequence of tokens with a target :math:`y=\pm1`, see :mod:`kernelbook.paths.one_shot`; the loss is
    :math:`(f-y)^2`.  Every batch has episodes of its own, drawn from (seed, epoch, batch).  Those of the validation and
    test splits are the same in every run; their classes occur in no other split.

    Parameters
    ----------
    corpus : ImageCorpus
        Omniglot, or the digits that stand in for it.
    settings : Settings
        Budget of a batch, seed.
    size : int
        Height and width of the images: 32 as they are, or 8 or 16, where a pixel is the mean of those that it covers.
    rotations : bool
        Whether to train on four times as many classes, see :meth:`kernelbook.data.Images.rotated`.
    epoch_episodes, valid_episodes, test_episodes : int
        Episodes an epoch, and of the two other splits.

    Raises
    ------
    ValueError
        If a number is out of range, or an episode does not fit in a batch.
    """

    def __init__(self, corpus: ImageCorpus, settings: Settings, *, size: int, rotations: bool,
                 epoch_episodes: int, valid_episodes: int, test_episodes: int) -> None:
        counts = {"epoch_episodes": epoch_episodes, "valid_episodes": valid_episodes, "test_episodes": test_episodes}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if size < PATCH or size % PATCH or corpus.train.pixels.shape[-1] % size:
            raise ValueError(f"size must be a multiple of {PATCH} that divides {corpus.train.pixels.shape[-1]}, "
                             f"the size of the images, but is {size}")
        self.length = 3 * (size // PATCH) ** 2
        if settings.batch_tokens < self.length:
            raise ValueError(f"batch_tokens is {settings.batch_tokens}, but one episode has {self.length} tokens; "
                             f"raise it to {self.length} or more")
        self.corpus, self.settings, self.epoch_episodes = corpus, settings, epoch_episodes
        self._size, self._count = size, settings.batch_tokens // self.length
        self._counts = {"valid": valid_episodes, "test": test_episodes}
        self._images = self._reduced(corpus.train.rotated() if rotations else corpus.train)
        self.valid = self._episodes("valid", "")
        self._drawn: tuple[int, Episodes] | None = None

        told_apart_by = json.dumps([corpus.fingerprint, size, rotations, CHANNELS, counts])
        digest = hashlib.sha256(told_apart_by.encode()).hexdigest()
        self.config = {"features": CHANNELS * PATCH**2}
        self.data = {"name": corpus.name, "corpus": corpus.name, "origin": corpus.origin, "fingerprint": digest,
                     "images": corpus.fingerprint, "licence": corpus.licence, "train": epoch_episodes,
                     "valid": valid_episodes, "test": test_episodes,
                     "classes": {split: len(images.names) for split, images in corpus.splits.items()}}
        if corpus.stands_in_for:
            self.data["stands_in_for"] = corpus.stands_in_for
        self.about = (f"{corpus.summary()}\nepisodes of {self.length} tokens, images of {size} x {size}: "
                      f"{epoch_episodes:,} new ones an epoch, {valid_episodes:,} held out for validation, "
                      f"{test_episodes:,} for the test")
        self.metadata, self.decoding = {"channels": CHANNELS, "size": size}, "the sign of the output"

    def _reduced(self, images: Images) -> Images:
        factor = images.pixels.shape[-1] // self._size
        return replace(images, pixels=F.avg_pool2d(images.pixels[:, None], factor)[:, 0])

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of the episodes of an epoch; an episode's index counts through all epochs."""
        first, end = epoch * self.epoch_episodes, (epoch + 1) * self.epoch_episodes
        return [list(range(i, min(i + self._count, end))) for i in range(first, end, self._count)]

    def batch(self, index: int, device: torch.device | str = "cpu") -> tuple[int, Episodes]:
        """The batch with an episode, a function of (seed, epoch, number of the batch); and its first index.

        Parameters
        ----------
        index : int
            Of the episode.
        device : torch.device or str
            Where to make its tokens; the images stay there.
        """
        epoch, place = divmod(index, self.epoch_episodes)
        number = place // self._count
        begin = epoch * self.epoch_episodes + number * self._count
        if self._images.pixels.device != torch.device(device):
            self._images, self._drawn = self._images.to(device), None
        if self._drawn is None or self._drawn[0] != begin:
            count = min(self._count, (epoch + 1) * self.epoch_episodes - begin)
            self._drawn = begin, episodes(self._images, count, channels=CHANNELS,
                                          generator=seeded(f"one-shot/{self.settings.seed}/{epoch}/{number}"))
        return self._drawn

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Mean of :math:`(f-y)^2`, and the number of episodes."""
        begin, drawn = self.batch(indices[0], device)
        rows = torch.tensor(indices, device=device) - begin
        return F.mse_loss(model(drawn.tokens[rows]), drawn.labels[rows]), len(indices)

    def outputs(self, model: torch.nn.Module, found: Episodes, device: torch.device,
                done: Callable[[int], None] = lambda count: None) -> Float[Tensor, " P"]:
        """Of a model for some episodes, on the CPU."""
        parts = []
        for part in found.tokens.split(256):
            parts.append(model(part.to(device)).float().cpu())
            done(len(part))
        return torch.cat(parts)

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Loss on the validation episodes, and the share of right signs."""
        f = self.outputs(model, self.valid, device)
        return {"valid_loss": F.mse_loss(f, self.valid.labels).item(), "valid_accuracy": _share(f, self.valid.labels)}

    def further(self, count: int, purpose: str) -> Episodes:
        """Episodes of the classes that are trained on, a function of (seed, purpose); no batch is drawn like them.

        Parameters
        ----------
        count : int
            How many.
        purpose : str
            Any word.
        """
        return episodes(self._images, count, channels=CHANNELS,
                        generator=seeded(f"one-shot/{self.settings.seed}/{purpose}/{count}"))

    def held_out(self, split: str, kind: str) -> Episodes:
        """Episodes of a split, the same in every run of as many.

        Parameters
        ----------
        split : str
            ``"valid"`` or ``"test"``.
        kind : str
            ``""`` for any two classes of the split; or one of :meth:`kinds`.
        """
        return self.valid if (split, kind) == ("valid", "") else self._episodes(split, kind)

    def _episodes(self, split: str, kind: str) -> Episodes:
        if kind == "digits":
            images = load_images("digits").splits[split]
        else:
            images = self.corpus.runs if kind == "runs" else self.corpus.splits[split]
        return episodes(self._reduced(images), self._counts[split], channels=CHANNELS,
                        generator=seeded(f"one-shot/{split}/{kind}"), within_groups=kind in ("within_groups", "runs"))

    def kinds(self, split: str) -> list[str]:
        """What else a model is tested on, beside any two classes of the split.

        ``within_groups``: two classes of one group (alphabet).  For a model of Omniglot also ``digits``: handwritten
        digits, of the test split 0 and 1, which is a task of another distribution.  For the test split ``runs``: the
        drawings of the authors' own test, two of one alphabet that occurs in no split.
        """
        groups = self.corpus.splits[split].groups
        found = ["within_groups"] if 1 < len(set(groups)) < len(groups) else []
        found += ["runs"] if split == "test" and self.corpus.runs is not None else []
        return found + (["digits"] if self.corpus.name != "digits" else [])

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """Share of right answers on a split, and on what else there is; beside systems that learn nothing."""
        model.eval()
        kinds, metrics = ["", *self.kinds(split)], {}
        total, seen = len(kinds) * self._counts[split], 0

        def done(count: int) -> None:
            nonlocal seen
            seen += count
            progress(seen, total)

        for kind in kinds:
            found = self.held_out(split, kind)
            f = self.outputs(model, found, device, done)
            metrics["_".join(filter(None, (split, kind, "accuracy")))] = _share(f, found.labels)
            if not kind:
                metrics[f"{split}_loss"] = F.mse_loss(f, found.labels).item()
                first, answers = found, f
        return Outcome(metrics, self.baselines(split), f"share of right answers; {len(first):,} fixed episodes, two "
                       "classes each, one example of each", self._samples(split, first, answers))

    def baselines(self, split: str) -> dict[str, float]:
        """Accuracy of :func:`kernelbook.paths.one_shot.nearest` on the episodes of a split, by each of its measures.

        It is given the images as large as there are.  Where both are equally like the third, half an answer is right.
        """
        found, images = self.held_out(split, ""), self.corpus.splits[split]
        return {f"nearest_{measure}": (1 + (nearest(images, found, measure) * found.labels).mean().item()) / 2
                for measure in ("pixels", "patches", "moved")}

    def _samples(self, split: str, found: Episodes, f: Float[Tensor, " P"]) -> list[dict[str, str]]:
        images = self.corpus.splits[split]
        samples = []
        for i in spread(len(found), 3):
            first, second, query = (images.names[int(images.classes[j])] for j in found.choice[i])
            a, b = found.marks[i].tolist()
            samples.append({"shots": f"{first}: {a}, {second}: {b}", "query": query,
                            "answer": str(int(found.labels[i] > 0)), "model": f"{int(f[i] > 0)}, output {f[i]:+.3f}"})
        return samples


def _share(f: Float[Tensor, " P"], labels: Float[Tensor, " P"]) -> float:
    """Of outputs with the right sign."""
    return (f * labels > 0).double().mean().item()


def prepare(corpus: str | None, data_dir: Path | None, preset: Preset) -> OneShot:
    """Images, and the episodes of a preset's size."""
    images = load_images(corpus, data_dir=data_dir)
    size = preset.of(images.name)
    return OneShot(images, size.settings, **size.options)


ONE_SHOT = TaskKind("one-shot", "test_accuracy", True, "digits", PRESETS, prepare, PathNetworkConfig, {"features": 64})
