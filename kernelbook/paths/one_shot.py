r"""One-shot classification as a sequence: two images with labels and a third one that is like one of them.

An *episode* has two images of different classes, *shots*, labelled 0 and 1, and a *query*, another image of one of the
two classes.  The target is :math:`y=+1` where the query belongs with the shot that is labelled 1, else :math:`y=-1`.
Classes are drawn anew for each episode, so nothing is gained by knowing them: a network has to compare.

**Tokens** (:func:`tokens`).  Each image is cut into patches of 8 x 8 pixels, row by row; a patch is a token, and the
images follow each other in the order first shot, second shot, query: 48 tokens for images of 32 x 32.  The token
:math:`t` with the patch :math:`p_t` of an image with the label :math:`c_t` is

.. math:: x_t=(q_t,q_t,q_t)+e_t+u_{c_t}\in\mathbb R^{N_0},\; q_t=\mathrm{LayerNorm}(p_t)\in\mathbb R^{64},\; N_0=192,

with sinusoidal positions :math:`e_t` and fixed random :math:`u_0`, :math:`u_1` and :math:`u_?`, the last for the query.
All three terms have the squared length :math:`N_0`, except that a blank patch is 0.

**Why three copies** of a patch that has one channel: they say nothing new of the image, but they leave room.  Every
:math:`q_t` lies in the 63 dimensions where its pixels sum to 0.  So in :math:`\mathbb R^{64}` a linear map that does
not see the pixels keeps one dimension of positions and labels; in :math:`\mathbb R^{192}` the differences between the
copies are 128 dimensions without pixels.  Queries, keys and values are linear in the tokens here, and no multilayer
perceptron could separate the two later.  ``channels=1`` is the same without this room.

The design is that of Tiberi, Mignacco, Irie and Sompolinsky (2024).  The scale of positions and labels, which images
are drawn, and all random numbers are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..data.images import Images
from ..positions import sinusoidal

__all__ = ["PATCH", "Episodes", "episodes", "nearest", "patches", "tokens"]

PATCH = 8
"""Height and width of a patch, in pixels."""

UNKNOWN = 2
_LABEL_SEED = 20_240_515      # one table of labels for everybody: what is trained with it must be tested with it


@dataclass(frozen=True, eq=False)
class Episodes:
    r"""Episodes of one example of each of two classes.

    Attributes
    ----------
    tokens : Tensor
        The inputs :math:`X^\mu`, see :func:`tokens`.
    labels : Tensor
        :math:`y=\pm1`, each for one half of the episodes (where their number is odd, +1 for one more).
    choice : Tensor
        Which of the images were taken: first shot, second shot, query.
    marks : Tensor
        The labels of the two shots: 0 and 1, in either order.
    """

    tokens: Float[Tensor, "P N_0 n"]
    labels: Float[Tensor, " P"]
    choice: Int[Tensor, "P 3"]
    marks: Int[Tensor, "P 2"]

    def __len__(self) -> int:
        return len(self.labels)


def episodes(
    images: Images, count: int, *, generator: torch.Generator, within_groups: bool = False, channels: int = 3
) -> Episodes:
    """Draw episodes.

    The two classes are drawn uniformly, whatever their sizes; so are two different images of the query's class and one
    of the other.  Whether the query is like the first shot or the second, and whether this is labelled 0 or 1, are
    independent.

    Parameters
    ----------
    images : Images
        Of at least two classes, with at least two images each.
    count : int
        How many episodes.
    generator : torch.Generator
        The same state gives the same episodes.
    within_groups : bool
        Take both classes from one group (alphabet), which is harder; groups with a single class are left out.  A class
        is drawn first, so that large groups are drawn more often.
    channels : int
        How many copies of each patch a token holds; :math:`N_0=64` times that.

    Returns
    -------
    Episodes
        On the device of the images.

    Raises
    ------
    ValueError
        If there are too few classes or images, or classes of different groups may be the same and `within_groups` is
        not set.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"the number of episodes must be a positive integer, not {count!r}")
    if not images.groups_differ and not within_groups:
        raise ValueError("classes of different groups of these images may be the same; set within_groups=True")
    sizes = images.counts().cpu()
    if (sizes < 2).any():
        lonely = images.names[int((sizes < 2).nonzero()[0])]
        raise ValueError(f"an episode needs two images of a class, but there is only one of {lonely!r}; leave it out")
    device = generator.device

    def below(numbers: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """For each number one of 0, ..., number - 1, all equally likely."""
        return (torch.rand(len(numbers), dtype=torch.float64, generator=generator, device=device) * numbers).long()

    # Classes in the order of their groups; of each place in that order the first place of its group, and its size.
    groups = images.groups if within_groups else [""] * len(images.names)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([numbers[each] for each in groups])
    members = group.bincount()
    order = group.argsort(stable=True)
    first = (members.cumsum(0) - members)[group[order]]
    size = members[group[order]]
    usable = (size > 1).nonzero()[:, 0]
    if not len(usable):
        raise ValueError(f"an episode needs two classes{' of one group' if within_groups else ''}, but of classes "
                         f"and groups there are {len(images.names)} and {len(members)}")
    order, first, size, usable, sizes = (t.to(device) for t in (order, first, size, usable, sizes))

    place = usable[below(torch.full((count,), len(usable), device=device))]
    other = first[place] + below(size[place] - 1)
    other += other >= place                                     # any of the group but the place itself
    own, foreign = order[place], order[other]
    start = sizes.cumsum(0) - sizes
    query = below(sizes[own])
    like = below(sizes[own] - 1)
    like += like >= query
    unlike = start[foreign] + below(sizes[foreign])
    query, like = start[own] + query, start[own] + like

    positive = torch.arange(count, device=device) < (count + 1) // 2
    positive = positive[torch.randperm(count, generator=generator, device=device)]
    like_first = torch.rand(count, generator=generator, device=device) < 0.5
    choice = torch.stack([torch.where(like_first, like, unlike), torch.where(like_first, unlike, like), query], 1)
    mark = (like_first == positive).long()                      # of the first shot
    at = images.pixels.device
    choice, marks, labels = choice.to(at), torch.stack([mark, 1 - mark], 1).to(at), positive.to(at).float() * 2 - 1
    return Episodes(tokens(images.pixels[choice], marks, channels=channels), labels, choice, marks)


def patches(pixels: Float[Tensor, "... size size"]) -> Float[Tensor, "... patches 64"]:
    """The patches of images, row by row, each with mean 0 and variance 1 (0 where it is blank).

    Raises
    ------
    ValueError
        If the images are not square, or their size is no multiple of that of a patch.
    """
    size = pixels.shape[-1]
    if pixels.ndim < 2 or pixels.shape[-2] != size or size % PATCH or not size:
        raise ValueError(f"images must be square, their size a multiple of {PATCH}, but the shape is "
                         f"{tuple(pixels.shape)}")
    cut = pixels.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return F.layer_norm(cut, (PATCH * PATCH,))


def tokens(
    pixels: Float[Tensor, "P 3 size size"], marks: Int[Tensor, "P 2"], *, channels: int = 3
) -> Float[Tensor, "P N_0 n"]:
    """Two shots and a query as a sequence of tokens.

    Parameters
    ----------
    pixels : Tensor
        First shot, second shot, query.
    marks : Tensor
        The labels of the shots, 0 and 1 in either order.
    channels : int
        Copies of a patch.

    Returns
    -------
    Tensor
        One column a token.

    Raises
    ------
    ValueError
        If the shapes do not fit, or an episode's labels are not 0 and 1.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or tuple(marks.shape) != (len(pixels), 2):
        raise ValueError(f"expected pixels (P, 3, size, size) and marks (P, 2), but the shapes are "
                         f"{tuple(pixels.shape)} and {tuple(marks.shape)}")
    if not (marks.sort(1).values == torch.arange(2, device=marks.device)).all():
        raise ValueError("of the two shots of an episode one must be labelled 0 and the other 1")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"the number of channels must be a positive integer, not {channels!r}")
    cut = patches(pixels)
    each, width = cut.shape[-2], channels * PATCH**2
    embeddings = _embeddings(width).to(cut)
    # Sines and cosines have the mean square 1/2.
    positions = 2**0.5 * sinusoidal(3 * each, width, device=cut.device, dtype=cut.dtype)
    marked = F.pad(marks, (0, 1), value=UNKNOWN)                # (P, 3): the query's label is not known
    added = positions.unflatten(0, (3, each)) + embeddings[marked][:, :, None]
    return (cut.repeat(1, 1, 1, channels) + added).flatten(1, 2).mT.contiguous()


def _embeddings(width: int) -> Float[Tensor, "3 width"]:
    """Of the labels 0, 1 and unknown: random directions, of the squared length `width`."""
    generator = torch.Generator().manual_seed(_LABEL_SEED)
    return width**0.5 * F.normalize(torch.randn(3, width, dtype=torch.float64, generator=generator), dim=1)


def nearest(
    images: Images, episodes: Episodes, measure: Literal["pixels", "patches", "moved"] = "pixels"
) -> Float[Tensor, " P"]:
    """The answers of a system that learns nothing: the label of the shot that is more like the query.

    Parameters
    ----------
    images : Images
        Those from which the episodes were drawn.
    episodes : Episodes
        What is to be answered.
    measure : "pixels", "patches" or "moved"
        Likeness is minus the Euclidean distance of the images; or the mean over all places of the cosine between the
        two patches there, their means taken off; or the largest cosine between the images where one is moved by up to
        3 pixels in each direction, after both were blurred by the weights 1, 4, 6, 4, 1 in rows and columns.

    Returns
    -------
    Tensor
        +1 or -1, and 0 where both shots are equally like the query.

    Raises
    ------
    ValueError
        If there is no such measure.
    """
    pixels = images.pixels[episodes.choice]
    if measure == "pixels":
        alike = -(pixels[:, :2] - pixels[:, 2:]).square().sum((-2, -1))
    elif measure == "patches":
        cut = patches(pixels)
        alike = F.cosine_similarity(cut[:, :2], cut[:, 2:], dim=-1).mean(-1)
    elif measure == "moved":
        alike = _moved(pixels)
    else:
        raise ValueError(f"there is no measure {measure!r}; choose 'pixels', 'patches' or 'moved'")
    return torch.sign((alike[:, 1] - alike[:, 0]) * (episodes.marks[:, 1] - episodes.marks[:, 0]))


def _moved(pixels: Float[Tensor, "P 3 size size"], most: int = 3) -> Float[Tensor, "P 2"]:
    """The largest cosine between each shot, moved by up to `most` pixels in each direction, and the query."""
    blur = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(pixels) / 16
    flat = pixels.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, blur[None, None, None], padding=(0, 2)), blur[None, None, :, None], padding=(2, 0))
    blurred = F.normalize(flat.view(*pixels.shape[:2], -1), dim=-1).view_as(pixels)
    # Correlations at all moves at once; what is moved out of one side comes in on the other only past the zeros.
    size = pixels.shape[-1] + most
    spectrum = torch.fft.rfft2(blurred, s=(size, size))
    overlap = torch.fft.irfft2(spectrum[:, :2] * spectrum[:, 2:].conj(), s=(size, size))
    moves = torch.arange(-most, most + 1, device=pixels.device)
    return overlap[..., moves[:, None], moves].amax((-2, -1))
