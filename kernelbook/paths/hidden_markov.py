r"""A task for attention paths: tell a chain that likes to stay from one that likes to change, through noise.

A hidden Markov chain :math:`s_1,\dots,s_T` of states :math:`\pm1` starts with either state and stays with a probability
that is the same for both states and depends on the class :math:`y=\pm1`: 0.7 or 0.3.  A state is seen as one of two
orthogonal patterns with Gaussian noise,

.. math:: v_+=\sqrt2\,(1,\dots,1,0,\dots,0),\quad v_-=\sqrt2\,(0,\dots,0,1,\dots,1)\in\mathbb R^{F},

of one strength in the plane of the two patterns and another perpendicular to it.  A token without features, the
*beginning*, goes before the chain, and every token has its position appended, one-hot: :math:`N_0=F+T+1` rows,
:math:`n=T+1` columns.  The last token is read out.

What tells the classes apart is how often a state is the one before, too.  A head of attention can see it
(:func:`staying_head`), and averaging what it finds over the chain (:func:`uniform_head`) gives a number from which the
class can be read linearly.  Other heads only disturb (:func:`random_head`), or see the noise alone, which helps to
subtract it.  :func:`four_paths` and :func:`two_paths` are networks with such heads in two layers.

The task and its heads are those of Tiberi, Mignacco, Irie and Sompolinsky (2024), with random numbers of our own.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .network import bilinear_attention

__all__ = [
    "FOUR_PATHS", "TWO_PATHS", "HiddenMarkov", "PathTask", "four_path_heads", "four_paths", "random_head",
    "staying_head", "two_path_heads", "two_paths", "uniform_head",
]

FOUR_PATHS = ("good", "adversarial 1", "denoising", "adversarial 2")
"""Paths of :func:`four_paths` by index: (staying, uniform), (staying, random), (random, uniform), (random, random)."""

TWO_PATHS = ("good", "denoising")
"""Paths of :func:`two_paths` by index: (staying, uniform), (uniform, uniform)."""


def _generator(name: str, seed: int) -> torch.Generator:
    """A stream of random numbers of its own for each purpose and each seed."""
    digest = hashlib.sha256(f"hidden Markov chains, {name}, {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ------------------------------------------------------------------------- the chains

@dataclass(frozen=True)
class HiddenMarkov:
    r"""Noisy hidden Markov chains of two classes.

    Parameters
    ----------
    length : int
        :math:`T`, the number of states; a sequence has one token more.
    features : int
        :math:`F`, an even number: of the patterns.
    stay : pair of float
        The probabilities to stay of the classes :math:`+1` and :math:`-1`.
    noise : float
        Standard deviation of the noise along each direction in the plane of the two patterns.
    noise_outside : float
        The same for each direction perpendicular to that plane.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    length: int = 30
    features: int = 200
    stay: tuple[float, float] = (0.7, 0.3)
    noise: float = 1.0
    noise_outside: float = 1.0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")
        if self.features < 2 or self.features % 2:
            raise ValueError(f"features must be a positive even number, for a half belongs to each pattern, "
                             f"not {self.features}")
        if len(self.stay) != 2 or not all(0 <= p <= 1 for p in self.stay):
            raise ValueError(f"stay must be two probabilities, of the classes +1 and -1, not {self.stay}")
        if not min(self.noise, self.noise_outside) >= 0:
            raise ValueError(f"strengths of noise must not be negative, not {self.noise} and {self.noise_outside}")

    @property
    def tokens(self) -> int:
        """:math:`n`, the columns of an input."""
        return self.length + 1

    @property
    def width(self) -> int:
        """:math:`N_0`, the rows of an input."""
        return self.features + self.tokens

    @property
    def readout(self) -> Float[Tensor, " n"]:
        """:math:`r`: the last token."""
        return torch.eye(self.tokens, dtype=torch.float64)[-1]

    @property
    def patterns(self) -> Float[Tensor, "2 F"]:
        r""":math:`v_+` and :math:`v_-`."""
        halves = torch.eye(2, dtype=torch.float64).repeat_interleave(self.features // 2, dim=1)
        return math.sqrt(2) * halves

    def sample(self, examples: int, generator: torch.Generator
               ) -> tuple[Float[Tensor, "P N_0 n"], Float[Tensor, " P"], Int[Tensor, "P T"]]:
        """Draw chains, the class :math:`+1` first, half of each.

        Parameters
        ----------
        examples : int
            A positive even number.
        generator : torch.Generator

        Returns
        -------
        inputs, labels, states : Tensor
            In float64; the states as integers.

        Raises
        ------
        ValueError
            If the number of examples is not positive and even.
        """
        if examples < 2 or examples % 2:
            raise ValueError(f"examples must be a positive even number, half of each class, not {examples}")
        labels = torch.ones(examples, dtype=torch.float64)
        labels[examples // 2:] = -1
        stay = torch.where(labels > 0, *(torch.tensor(p, dtype=torch.float64) for p in self.stay))
        uniform = torch.rand(examples, self.length, generator=generator, dtype=torch.float64)
        same = uniform < torch.cat([torch.full((examples, 1), 0.5), stay[:, None].expand(-1, self.length - 1)], dim=1)
        states = torch.where(same, 1, -1).cumprod(dim=1)           # as if the state before the first were +1

        noise = torch.randn(examples, self.length, self.features, generator=generator, dtype=torch.float64)
        directions = self.patterns / math.sqrt(self.features)      # an orthonormal basis of the plane
        in_plane = noise @ directions.T @ directions
        seen = (self.patterns[(states < 0).long()] + self.noise * in_plane
                + self.noise_outside * (noise - in_plane))
        inputs = torch.zeros(examples, self.width, self.tokens, dtype=torch.float64)
        inputs[:, :self.features, 1:] = seen.mT
        inputs[:, self.features:] = torch.eye(self.tokens, dtype=torch.float64)
        return inputs, labels, states


# ------------------------------------------------------------------------- heads

def staying_head(chain: HiddenMarkov) -> Float[Tensor, "N_0 N_0"]:
    r"""A head that looks at the token before if it has the same state, and at the beginning if not.

    With :math:`q=(v_+-v_-)/F`, so that :math:`q\cdot v_\pm=\pm1`, the features have the form :math:`qq^{\mathsf T}`;
    to that come 1 for the position before the query's and 3/2 for the beginning.  Without noise a query's logits are 2
    for the token before if the state is the same and 0 if not, 1 and -1 for other tokens, and 3/2 for the beginning,
    which has no features: nothing is seen there.

    Parameters
    ----------
    chain : HiddenMarkov

    Returns
    -------
    Tensor
        The form of :func:`kernelbook.paths.bilinear_attention`, at inverse temperature 1.
    """
    W = torch.zeros(chain.width, chain.width, dtype=torch.float64)
    plus, minus = chain.patterns
    q = (plus - minus) / chain.features
    W[:chain.features, :chain.features] = torch.outer(q, q)
    positions = W[chain.features:, chain.features:]                # key, query
    positions[1:, 1:] = torch.diag(torch.ones(chain.length - 1), 1)
    positions[0, 1:] = 1.5
    return W


def uniform_head(chain: HiddenMarkov) -> Float[Tensor, "N_0 N_0"]:
    """A head that looks at all tokens alike.

    Parameters
    ----------
    chain : HiddenMarkov

    Returns
    -------
    Tensor
        Zero: the softmax of a constant is uniform.
    """
    return torch.zeros(chain.width, chain.width, dtype=torch.float64)


def random_head(chain: HiddenMarkov, generator: torch.Generator) -> Float[Tensor, "N_0 N_0"]:
    r"""A head of Gaussian numbers: :math:`1/F` times for features, 1 for positions, :math:`1/\sqrt F` between the two.

    Parameters
    ----------
    chain : HiddenMarkov
    generator : torch.Generator

    Returns
    -------
    Tensor
        At inverse temperature 1.
    """
    W = torch.randn(chain.width, chain.width, generator=generator, dtype=torch.float64)
    scale = torch.cat([torch.full((chain.features,), 1 / math.sqrt(chain.features)), torch.ones(chain.tokens)])
    return W * torch.outer(scale, scale)


def four_path_heads(chain: HiddenMarkov, seed: int = 0) -> list[Float[Tensor, "heads N_0 N_0"]]:
    """The forms of two layers: staying and random, uniform and random.

    Parameters
    ----------
    chain : HiddenMarkov
    seed : int
        Of the random heads.

    Returns
    -------
    list of Tensor
        One for each layer, at inverse temperature 1.
    """
    first, second = (random_head(chain, _generator(f"random head of layer {layer}", seed)) for layer in (1, 2))
    return [torch.stack([staying_head(chain), first]), torch.stack([uniform_head(chain), second])]


def two_path_heads(chain: HiddenMarkov) -> list[Float[Tensor, "heads N_0 N_0"]]:
    """The forms of two layers: staying and uniform, and uniform alone.

    Parameters
    ----------
    chain : HiddenMarkov

    Returns
    -------
    list of Tensor
        One for each layer, at inverse temperature 1.
    """
    return [torch.stack([staying_head(chain), uniform_head(chain)]), uniform_head(chain)[None]]


# ------------------------------------------------------------------------- whole tasks

@dataclass(frozen=True)
class PathTask:
    """All that a network on fixed attention needs of its data.

    Attributes
    ----------
    inputs : Tensor
        Sequences, a token in each column, ``(P, N_0, n)``.
    attention : list of Tensor
        One for each layer, ``(heads, P, n, n)``; rows are keys, columns are queries.
    labels : Tensor
        ``(P,)``, of -1 and 1.
    readout : Tensor
        ``(n,)``.
    """

    inputs: Float[Tensor, "P N_0 n"]
    attention: list[Float[Tensor, "heads P n n"]]
    labels: Float[Tensor, " P"]
    readout: Float[Tensor, " n"]


def _task(chain: HiddenMarkov, forms: list[Tensor], examples: int, seed: int, test: bool, beta: float) -> PathTask:
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta, the inverse temperature of attention, must be 0 or a positive number, not {beta!r}")
    inputs, labels, _ = chain.sample(examples, _generator("test" if test else "training", seed))
    return PathTask(inputs, [bilinear_attention(inputs, beta * form) for form in forms], labels, chain.readout)


def four_paths(examples: int = 100, *, seed: int = 0, head_seed: int = 0, test: bool = False, beta: float = 10.0,
               chain: HiddenMarkov | None = None) -> PathTask:
    """Two layers of two heads each: a good path, one that helps to subtract noise, and two that disturb.

    Parameters
    ----------
    examples : int
        A positive even number.
    seed : int
        Of the chains.
    head_seed : int
        Of the random heads.
    test : bool
        Draw the chains from a stream of random numbers that training never sees.
    beta : float
        Inverse temperature of attention.
    chain : HiddenMarkov, optional
        The one with default settings unless given.

    Returns
    -------
    PathTask
        Paths are numbered as in :data:`FOUR_PATHS`.

    Raises
    ------
    ValueError
        If the number of examples is not positive and even, or beta is negative.
    """
    chain = HiddenMarkov() if chain is None else chain
    return _task(chain, four_path_heads(chain, head_seed), examples, seed, test, beta)


def two_paths(examples: int = 100, *, seed: int = 0, test: bool = False, beta: float = 10.0,
              chain: HiddenMarkov | None = None) -> PathTask:
    """Two heads and then one: a good path, and one that helps to subtract noise, which is strong by default.

    Parameters
    ----------
    examples : int
        A positive even number.
    seed : int
        Of the chains.
    test : bool
        Draw the chains from a stream of random numbers that training never sees.
    beta : float
        Inverse temperature of attention.
    chain : HiddenMarkov, optional
        The one with ``noise_outside=5`` unless given.

    Returns
    -------
    PathTask
        Paths are numbered as in :data:`TWO_PATHS`.

    Raises
    ------
    ValueError
        If the number of examples is not positive and even, or beta is negative.
    """
    chain = HiddenMarkov(noise_outside=5.0) if chain is None else chain
    return _task(chain, two_path_heads(chain), examples, seed, test, beta)
