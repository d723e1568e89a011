r"""A network of attention paths whose queries and keys are trained too: one that a task can be given to.

It is the network of :mod:`kernelbook.paths.network` on attention by a kernel, each layer's from the bare input,

.. math:: \Omega^{lh}_{st}=\frac{\kappa(Q_{lh}x_t,\,K_{lh}x_s)}{\sum_{s'}\kappa(Q_{lh}x_t,\,K_{lh}x_{s'})},

read out by the mean over all tokens, :math:`r=(1/n,\dots,1/n)`.  Once it is trained, its attention is what the theory
takes as given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attention import weights as attention_weights
from ..attention.definition import check_normaliser
from ..attention.reductions import has_softmax_form, softmax_form
from ..kernels import Kernel, from_config, get
from .kernels import paths_through
from .network import draw_weights, order_parameter, path_weights

__all__ = ["PathNetwork", "PathNetworkConfig"]


@dataclass(frozen=True)
class PathNetworkConfig:
    """What a :class:`PathNetwork` is made of.

    Parameters
    ----------
    features : int
        :math:`N_0`, rows of the input.
    layers : int
        :math:`L`.
    heads : int or str
        :math:`H_l`: one number for all layers, or one for each, as in ``"4,2"``.
    width : int or str
        :math:`N_1,\\dots,N_L,N_a`, likewise: one number, or one more than there are layers.
    qk_width : int
        :math:`G`, the width of the queries and keys of a head.
    kernel : str or Kernel
        Of every attention.
    normaliser : str
        As in :func:`kernelbook.attention.attend`.

    Raises
    ------
    ValueError
        If the numbers do not fit together.
    """

    features: int
    layers: int = 2
    heads: int | str = 4
    width: int | str = 512
    qk_width: int = 128
    kernel: str | Kernel = field(default="edp")
    normaliser: str = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", get(self.kernel))
        check_normaliser(self.kernel, self.normaliser)
        for name in ("features", "layers", "qk_width"):
            if not _whole(value := getattr(self, name)):
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
        for name, count in (("heads", self.layers), ("width", self.layers + 1)):
            object.__setattr__(self, name, _each(name, getattr(self, name), count))

    @property
    def head_counts(self) -> tuple[int, ...]:
        """:math:`H_1,\\dots,H_L`."""
        return _spread(self.heads, self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """:math:`N_1,\\dots,N_L,N_a`."""
        return _spread(self.width, self.layers + 1)

    def build(self) -> PathNetwork:
        """A network with weights drawn anew."""
        return PathNetwork(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_dict` makes it again."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"kernel": self.kernel.to_config()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PathNetworkConfig:
        """The configuration that :meth:`to_dict` described."""
        return cls(**(plain | {"kernel": from_config(plain["kernel"])}))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _each(name: str, value: Any, count: int) -> int | str:
    """One number for all layers, or a word that lists several: equal numbers in one form only."""
    listed = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")] if isinstance(value, str) \
        else [value]
    if not all(map(_whole, listed)) or len(listed) not in (1, count):
        raise ValueError(f"{name} must be a whole number, at least 1, or {count} of them for the layers, as in "
                         f"{','.join(['4'] * count)!r}, not {value!r}")
    return listed[0] if len(set(listed)) == 1 else ",".join(map(str, listed))


def _spread(value: int | str, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(map(int, value.split(",")))


class PathNetwork(nn.Module):
    r"""A network of attention paths with trained queries and keys.

    All weights are standard normal at first, and what they make is divided by the root of the number of terms in it:
    queries are :math:`Q_{lh}x_t/\sqrt{N_0}`.  So one learning rate suits all of them.

    Parameters
    ----------
    config : PathNetworkConfig
        What it is made of.

    Attributes
    ----------
    queries, keys : torch.nn.ParameterList
        A tensor ``(heads, G, N_0)`` for each layer.
    weights : torch.nn.ParameterList
        ``[V^0, V^1, ..., V^L, a]``, in the form of :func:`kernelbook.paths.draw_weights`.

    Examples
    --------
    >>> network = PathNetworkConfig(features=192, width=16, qk_width=8).build()
    >>> x = torch.randn(3, 192, 48)
    >>> network(x).shape
    torch.Size([3])
    >>> [tuple(omega.shape) for omega in network.attention(x)]
    [(4, 3, 48, 48), (4, 3, 48, 48)]
    """

    def __init__(self, config: PathNetworkConfig) -> None:
        super().__init__()
        self.config = config

        def projections() -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.randn(h, config.qk_width, config.features))
                                    for h in config.head_counts)

        self.queries, self.keys = projections(), projections()
        self.weights = nn.ParameterList(map(nn.Parameter, draw_weights(
            config.features, heads=config.head_counts, widths=config.widths, dtype=torch.get_default_dtype())))

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.parameters())

    def _attention(self, tokens: Float[Tensor, "P n N_0"], layer: int) -> Float[Tensor, "P heads n n"]:
        """Of one layer; here rows are queries."""
        def project(V: Tensor) -> Tensor:
            flat = tokens @ (V.flatten(0, 1).mT / math.sqrt(V.shape[-1]))
            return flat.unflatten(-1, V.shape[:2]).transpose(1, 2)

        q, k, kernel = project(self.queries[layer]), project(self.keys[layer]), self.config.kernel
        if self.config.normaliser.endswith("sum") and has_softmax_form(kernel, q.shape[-1]):
            form = softmax_form(kernel, q, k)           # the same numbers without an n x n x G array, for any of them
            logits = form.scale * (form.q @ form.k.mT)
            return torch.softmax(logits if form.key_bias is None else logits + form.key_bias[..., None, :], -1)
        return attention_weights(q, k, kernel, normaliser=self.config.normaliser)

    def attention(self, inputs: Float[Tensor, "P N_0 n"]) -> list[Float[Tensor, "heads P n n"]]:
        r"""The attention of each layer, as :func:`kernelbook.paths.path_inputs` takes it.

        Parameters
        ----------
        inputs : Tensor
            A token in each column.

        Returns
        -------
        list of Tensor
            :math:`\Omega^{lh}`: rows are keys, columns are queries.  With the normaliser ``"sum"``, columns sum to 1.

        Raises
        ------
        ValueError
            If the inputs have not the features of the network.
        """
        self._check(inputs)
        return [self._attention(inputs.mT, layer).mT.transpose(0, 1) for layer in range(self.config.layers)]

    def readout(self, inputs: Float[Tensor, "P N_0 n"]) -> Float[Tensor, " n"]:
        """The weights of the tokens of the last layer, :math:`1/n` each."""
        return inputs.new_full(inputs.shape[-1:], 1 / inputs.shape[-1])

    def forward(self, inputs: Float[Tensor, "P N_0 n"], removed: Iterable[tuple[int, int]] = ()) -> Float[Tensor, " P"]:
        r"""The output :math:`f`, a number for each sequence.

        It is that of :func:`kernelbook.paths.network_output`, computed path by path: since the network is linear in
        what it is given, the readout can be taken through its attention before the weights.

        Parameters
        ----------
        inputs : Tensor
            A token in each column.
        removed : iterable of pairs
            Heads to leave out, ``(layer, head)``, both counted from 0.  A layer of which :math:`d` heads are left out
            divides the sum of the others by :math:`\sqrt{H_l-d}` instead of :math:`\sqrt{H_l}`.

        Returns
        -------
        Tensor

        Raises
        ------
        ValueError
            If the inputs have not the features of the network, there is no such head, or a layer is left without one.
        """
        self._check(inputs)
        tokens = inputs.mT
        vectors = self.readout(inputs).expand(len(inputs), 1, -1)       # of the part of each path from here to the end
        for layer in reversed(range(self.config.layers)):
            # Paths in C-order: the head of the earliest layer varies slowest.
            vectors = (vectors[:, None] @ self._attention(tokens, layer)).flatten(1, 2)
        return torch.einsum("pci,ci->p", vectors @ tokens, self.coefficients(removed))

    def coefficients(self, removed: Iterable[tuple[int, int]] = ()) -> Float[Tensor, "Pi N_0"]:
        r"""What the path inputs are multiplied by: :math:`f=\sum_\pi c^\pi\cdot\xi^\pi`.

        Parameters
        ----------
        removed : iterable of pairs
            As in :meth:`forward`.

        Returns
        -------
        Tensor

        Raises
        ------
        ValueError
            If there is no such head, or a layer is left without one.
        """
        V, heads, removed = self.weights[0][0], self.config.head_counts, tuple(removed)
        c = path_weights(list(self.weights)) @ V / math.sqrt(V.numel() * math.prod(heads))
        if removed:
            c = c * self.kept_paths(removed).to(c)[:, None]
        return c

    def kept_paths(self, removed: Iterable[tuple[int, int]]) -> Float[Tensor, " Pi"]:
        r"""What each path is multiplied by where heads are left out: 0, or :math:`\prod_l\sqrt{H_l/(H_l-d_l)}`.

        Raises
        ------
        ValueError
            If there is no such head, or a layer is left without one.
        """
        heads, removed = self.config.head_counts, set(removed)
        factor = torch.ones(math.prod(heads), dtype=torch.float64)
        for layer, head in removed:
            factor[paths_through(heads, layer, head)] = 0
        for layer, count in enumerate(heads):
            left = count - sum(at == layer for at, _ in removed)
            if not left:
                raise ValueError(f"all {count} heads of layer {layer} are to be left out, and then no path is left")
            factor = factor * math.sqrt(count / left)
        return factor

    @torch.no_grad()
    def order_parameter(self) -> Float[Tensor, "Pi Pi"]:
        """As :func:`kernelbook.paths.order_parameter`, of the weights as they are."""
        return order_parameter(list(self.weights))

    def _check(self, inputs: Tensor) -> None:
        if inputs.ndim != 3 or inputs.shape[1] != self.config.features or 0 in inputs.shape:
            raise ValueError(f"inputs must have the shape (examples, {self.config.features}, tokens), with at least "
                             f"one of each, but have {tuple(inputs.shape)}")
