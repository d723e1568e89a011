r"""Bayesian networks of attention: the definition, random weights, and training by gradient descent.

The attention :math:`\Omega^{lh}` is computed from the bare input and given here as numbers.  What is left is a network
that is linear in its input and in every layer of weights,

.. math::
   z^0=\tfrac1{\sqrt{N_0}}V^0X,\qquad z^l=\tfrac1{\sqrt{H_lN_l}}\sum_hV^{lh}z^{l-1}\Omega^{lh},\qquad
   f=\tfrac1{\sqrt{N_a}}a^{\mathsf T}z^Lr .

Its weights are one list, ``[V^0, V^1, ..., V^L, a]``, of tensors of one form: ``(heads, outputs, inputs)``, with one
head in the first and in the last, and one output in the last.  Any leading axes are a batch of networks.  All weights
are Gaussian a priori, independent, with the variance :math:`\sigma_l^2` of their layer.

:func:`network_output` is the definition.  :func:`output_of_paths` is the same number from the path inputs of
:func:`kernelbook.paths.path_inputs`, without a sum over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .action import Architecture
from .kernels import check_attention

__all__ = [
    "AttentionNetwork", "QueryKeyAttention", "Training", "bilinear_attention", "draw_weights", "network_output",
    "order_parameter", "output_of_paths", "path_weights", "train",
]


# ------------------------------------------------------------------------- sizes

def architecture(heads: Sequence[int], widths: Sequence[int], variances: Sequence[float] | None) -> Architecture:
    """Sizes that a network can have, its widths whole numbers; variances are 1 unless given."""
    if any(not isinstance(N, int) or isinstance(N, bool) for N in widths):
        raise ValueError(f"widths of a network must be whole numbers, not {tuple(widths)}")
    return Architecture(heads, widths, (1.0,) * (len(heads) + 2) if variances is None else variances)


def _scale(weights: Tensor) -> float:
    # Of a layer (heads, outputs, inputs): its sum over heads and inputs has as many independent terms.
    return 1 / math.sqrt(weights.shape[-3] * weights.shape[-1])


# ------------------------------------------------------------------------- the network, as functions of its weights

def draw_weights(
    features: int,
    *,
    heads: Sequence[int],
    widths: Sequence[int],
    variances: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
) -> list[Float[Tensor, "*batch heads outputs inputs"]]:
    r"""Weights from the prior: independent, Gaussian, with variance :math:`\sigma_l^2` in layer :math:`l`.

    Parameters
    ----------
    features : int
        :math:`N_0`, rows of the input.
    heads : sequence of int
        :math:`H_1,\dots,H_L`.
    widths : sequence of int
        :math:`N_1,\dots,N_L,N_a`.
    variances : sequence of float, optional
        :math:`\sigma_0^2,\dots,\sigma_L^2,\sigma_a^2` (default 1 each).
    generator : torch.Generator, optional
        Of the random numbers.
    batch : sequence of int
        Leading axes: so many networks at once.
    dtype : torch.dtype

    Returns
    -------
    list of Tensor
        :math:`V^0` as ``(1, N_1, N_0)``, :math:`V^l` as ``(H_l, N_{l+1}, N_l)``, :math:`a` as ``(1, 1, N_a)``.

    Raises
    ------
    ValueError
        If the numbers do not go together.
    """
    sizes = architecture(heads, widths, variances)
    if features < 1:
        raise ValueError(f"features, the number of rows of an input, must be positive, not {features}")
    counts, dims = (1, *sizes.heads, 1), (features, *map(int, sizes.widths), 1)
    return [math.sqrt(v) * torch.randn(*batch, h, n_out, n_in, generator=generator, dtype=dtype)
            for v, h, n_in, n_out in zip(sizes.variances, counts, dims[:-1], dims[1:], strict=True)]


def network_output(
    weights: Sequence[Float[Tensor, "*batch heads outputs inputs"]],
    inputs: Float[Tensor, "P N_0 n"],
    attention: Sequence[Float[Tensor, "heads P n n"]],
    readout: Float[Tensor, " n"],
) -> Float[Tensor, "*batch P"]:
    r"""The network's output, by its definition: layer after layer, token by token.

    Parameters
    ----------
    weights : sequence of Tensor
        ``[V^0, V^1, ..., V^L, a]``, in the form of :func:`draw_weights`.
    inputs : Tensor
        A sequence in each, a token in each column.
    attention : sequence of Tensor
        A tensor for each layer; rows are keys, columns are queries, and columns sum to 1.
    readout : Tensor
        :math:`r`: how the tokens of the last layer are weighted.

    Returns
    -------
    Tensor
        :math:`f`, one number for each sequence.

    Raises
    ------
    ValueError
        If the layers of weights and of attention do not go together.
    """
    if len(weights) != len(attention) + 2 or any(
            V.shape[-3] != omega.shape[0] for V, omega in zip(weights[1:-1], attention, strict=True)):
        raise ValueError(f"weights of {len(weights) - 2} layers with {[V.shape[-3] for V in weights[1:-1]]} heads do "
                         f"not go with attention of {len(attention)} layers with {[len(o) for o in attention]} heads")
    def times(V, z):                      # of every token of every example
        return torch.einsum("...oi,...pit->...pot", V, z)

    z = _scale(weights[0]) * times(weights[0][..., 0, :, :], inputs)
    for V, omega in zip(weights[1:-1], attention, strict=True):
        z = _scale(V) * sum(times(V[..., h, :, :], z @ omega[h]) for h in range(len(omega)))
    return _scale(weights[-1]) * (times(weights[-1][..., 0, :, :], z) @ readout).squeeze(-1)


def output_of_paths(
    weights: Sequence[Float[Tensor, "*batch heads outputs inputs"]], path_inputs: Float[Tensor, "Pi P N_0"],
) -> Float[Tensor, "*batch P"]:
    r"""The network's output from its path inputs :math:`\xi^\pi`; the same as :func:`network_output`.

    .. math:: f=\frac1{\sqrt{N_1N_0\Pi}}\sum_\pi w^{\pi\mathsf T}V^0\xi^\pi

    Parameters
    ----------
    weights : sequence of Tensor
        In the form of :func:`draw_weights`.
    path_inputs : Tensor
        Of :func:`kernelbook.paths.path_inputs`.

    Returns
    -------
    Tensor
        One number for each example.
    """
    z = _forward(weights, path_inputs)[-1]
    return z[..., 0, :, 0]


def _forward(weights, path_inputs):
    """What goes into each layer, ``(*batch, d_l, P, N_l)``, and what comes out of the last: one head less at each."""
    z = path_inputs
    found = [z]
    for V in weights:
        # The paths that go on from layer l are numbered by (h_l, h_{l+1}, ...), the first the slowest.
        z = z.reshape(*z.shape[:-3], V.shape[-3], -1, *z.shape[-2:])
        z = _scale(V) * torch.einsum("...hoi,...hspi->...spo", V, z)
        found.append(z)
    return found


def _backward(weights):
    """For each layer, ``(*batch, d_{l+1}, N_{l+1})``: what the rest of each path from there to the output is."""
    b = weights[-1].new_ones(*weights[-1].shape[:-3], 1, 1)
    found = [b]
    for V in reversed(weights[1:]):
        b = _scale(V) * math.sqrt(V.shape[-3]) * torch.einsum("...so,...hoi->...hsi", b, V).flatten(-3, -2)
        found.append(b)
    return found[::-1]


def path_weights(weights: Sequence[Float[Tensor, "*batch heads outputs inputs"]]) -> Float[Tensor, "*batch Pi N_1"]:
    r"""What a path's weights come to, from the output down to the first layer.

    .. math:: w^\pi=\Bigl(\frac{a^{\mathsf T}V^{Lh_L}\cdots V^{1h_1}}{\sqrt{N_aN_L\cdots N_2}}\Bigr)^{\mathsf T}

    Parameters
    ----------
    weights : sequence of Tensor
        In the form of :func:`draw_weights`.

    Returns
    -------
    Tensor
        A row for each path :math:`\pi=(h_1,\dots,h_L)`, the first head the slowest.
    """
    return math.sqrt(weights[0].shape[-2]) * _backward(weights)[0]


def order_parameter(weights: Sequence[Float[Tensor, "*batch heads outputs inputs"]]) -> Float[Tensor, "*batch Pi Pi"]:
    r"""The order parameter of given weights, :math:`U_{\pi\pi'}=\frac1{N_1}w^\pi\cdot w^{\pi'}`.

    Parameters
    ----------
    weights : sequence of Tensor
        In the form of :func:`draw_weights`.

    Returns
    -------
    Tensor
        Symmetric, positive semi-definite, of rank at most :math:`N_1`.
    """
    w = _backward(weights)[0]
    return w @ w.mT


# ------------------------------------------------------------------------- attention

def bilinear_attention(
    inputs: Float[Tensor, "P N_0 n"], form: Float[Tensor, "heads N_0 N_0"],
) -> Float[Tensor, "heads P n n"]:
    r"""Attention of a layer from the bare input: :math:`\Omega^h_{st}=\operatorname{softmax}_s(x_s^{\mathsf T}W_hx_t)`.

    Parameters
    ----------
    inputs : Tensor
        A token in each column.
    form : Tensor
        :math:`W_h`, the key's side first.

    Returns
    -------
    Tensor
        Rows are keys, columns are queries; columns sum to 1.

    Raises
    ------
    ValueError
        If the shapes do not go together.
    """
    if form.ndim != 3 or form.shape[1:] != (inputs.shape[-2],) * 2:
        raise ValueError(f"inputs with {inputs.shape[-2]} features need forms of the shape (heads, {inputs.shape[-2]}, "
                         f"{inputs.shape[-2]}), but it is {tuple(form.shape)}")
    return torch.softmax(torch.stack([inputs.mT @ W @ inputs for W in form]), dim=-2)


class QueryKeyAttention(nn.Module):
    r"""Attention with weights that can be trained, each layer's from the bare input.

    .. math:: \Omega^{lh}_{st}=\operatorname{softmax}_s\bigl(\tfrac1{\sqrt G}\,(K_{lh}x_s)\cdot(Q_{lh}x_t)\bigr)

    Parameters
    ----------
    features : int
        :math:`N_0`.
    heads : sequence of int
        :math:`H_1,\dots,H_L`.
    width : int
        :math:`G`.
    generator : torch.Generator, optional
        Of the first weights, Gaussian with variance :math:`1/N_0`.
    dtype : torch.dtype
    """

    def __init__(self, features: int, heads: Sequence[int], width: int, *, generator: torch.Generator | None = None,
                 dtype: torch.dtype = torch.float64):
        super().__init__()
        if min(features, width, *heads, 1) < 1:
            raise ValueError(f"features, width and heads must be positive, not {features}, {width} and {tuple(heads)}")

        def weights():
            return nn.ParameterList(
                nn.Parameter(torch.randn(h, width, features, generator=generator, dtype=dtype) / math.sqrt(features))
                for h in heads)

        self.queries, self.keys = weights(), weights()

    def forward(self, inputs: Float[Tensor, "P N_0 n"]) -> list[Float[Tensor, "heads P n n"]]:
        """Attention of each layer; columns, the queries, sum to 1."""
        def project(V):
            return torch.einsum("hgi,pit->hpgt", V, inputs)

        return [torch.softmax(project(K).mT @ project(Q) / math.sqrt(Q.shape[1]), dim=-2)
                for Q, K in zip(self.queries, self.keys, strict=True)]


# ------------------------------------------------------------------------- the network, as a module

class AttentionNetwork(nn.Module):
    r"""The network as a PyTorch module, its weights drawn from the prior.

    Parameters
    ----------
    features : int
        :math:`N_0`.
    heads, widths, variances
        As in :func:`draw_weights`.
    generator : torch.Generator, optional
        Of the weights.
    dtype : torch.dtype

    Attributes
    ----------
    weights : torch.nn.ParameterList
        ``[V^0, V^1, ..., V^L, a]``, in the form of :func:`draw_weights`.
    """

    def __init__(self, features: int, *, heads: Sequence[int], widths: Sequence[int],
                 variances: Sequence[float] | None = None, generator: torch.Generator | None = None,
                 dtype: torch.dtype = torch.float64):
        super().__init__()
        self.variances = architecture(heads, widths, variances).variances
        self.weights = nn.ParameterList(map(nn.Parameter, draw_weights(
            features, heads=heads, widths=widths, variances=variances, generator=generator, dtype=dtype)))

    def forward(self, inputs: Float[Tensor, "P N_0 n"], attention: Sequence[Float[Tensor, "heads P n n"]],
                readout: Float[Tensor, " n"]) -> Float[Tensor, " P"]:
        """As :func:`network_output`."""
        return network_output(list(self.weights), inputs, attention, readout)

    def penalty(self) -> Float[Tensor, ""]:
        r"""The negative logarithm of the prior, up to a constant: :math:`\sum_l\lVert V^l\rVert^2/2\sigma_l^2`."""
        return sum(V.square().sum() / (2 * v) for V, v in zip(self.weights, self.variances, strict=True))

    @torch.no_grad()
    def order_parameter(self) -> Float[Tensor, "Pi Pi"]:
        """As :func:`order_parameter`, of the weights as they are."""
        return order_parameter(list(self.weights))


# ------------------------------------------------------------------------- training

@dataclass(frozen=True)
class Training:
    r"""What :func:`train` did.

    Attributes
    ----------
    losses : Tensor
        The loss of the batch of each step, before the step.
    loss : float
        At the end, of all examples.
    gradient_norm : float
        Of its gradient, the largest entry; 0 at a stationary point.
    """

    losses: Float[Tensor, " steps"]
    loss: float
    gradient_norm: float


def train(
    network: AttentionNetwork,
    inputs: Float[Tensor, "P N_0 n"],
    attention: Sequence[Float[Tensor, "heads P n n"]] | Callable[[Tensor], list[Tensor]],
    labels: Float[Tensor, " P"],
    readout: Float[Tensor, " n"],
    *,
    steps: int,
    learning_rate: float,
    temperature: float = 0.0,
    method: str = "adam",
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Training:
    r"""Train a network by gradient descent, on the device where it is.

    .. math:: \frac1P\Bigl[\tfrac12\sum_\mu(f^\mu-y^\mu)^2+T\sum_l\tfrac1{2\sigma_l^2}\lVert V^l\rVert^2\Bigr]

    At :math:`T>0` its minima are the maxima of the posterior density of the weights at this temperature.

    Parameters
    ----------
    network : AttentionNetwork
        Changed in place; ``network.to("cuda")`` first to train there.  Data may be anywhere.
    inputs, labels, readout : Tensor
        Data, and the weights of the tokens of the last layer.
    attention : sequence of Tensor, or callable
        One tensor for each layer, or what makes them from inputs.  If that is a module, like
        :class:`QueryKeyAttention`, its weights are trained too, without a penalty.
    steps : int
        Of gradient descent.
    learning_rate : float
    temperature : float
        :math:`T`; 0 is the plain squared error.
    method : str
        ``"adam"`` or ``"sgd"``.
    batch_size : int, optional
        Examples for each step, in a new random order each time all were seen; all of them unless given.
    generator : torch.Generator, optional
        Of that order.

    Returns
    -------
    Training

    Raises
    ------
    ValueError
        If an argument does not fit.
    FloatingPointError
        If the loss is no longer a finite number.
    """
    count = len(inputs)
    if labels.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},), one for each input, but have {tuple(labels.shape)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a positive number, not {temperature!r}")
    if steps < 0 or not learning_rate > 0:
        raise ValueError(f"steps must not be negative and learning_rate must be positive, not {steps} "
                         f"and {learning_rate}")
    batch_size = count if batch_size is None else batch_size
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must lie between 1 and the number of examples, {count}, not be {batch_size}")
    optimisers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    if method not in optimisers:
        raise ValueError(f"method must be one of {', '.join(optimisers)}, not {method!r}")

    first = network.weights[0]
    inputs, labels, readout = (t.to(first.device, first.dtype) for t in (inputs, labels, readout))
    parameters = list(network.parameters())
    if isinstance(attention, nn.Module):
        attention.to(first.device, first.dtype)
        parameters += attention.parameters()
    elif not callable(attention):
        check_attention(attention, count, inputs.shape[-1])
        attention = [omega.to(first.device, first.dtype) for omega in attention]
    optimiser = optimisers[method](parameters, lr=learning_rate)

    def loss(index: Tensor | slice) -> Tensor:
        omega = attention(inputs[index]) if callable(attention) else [o[:, index] for o in attention]
        f = network(inputs[index], omega, readout)
        return (f - labels[index]).square().mean() / 2 + temperature / count * network.penalty()

    losses, order = [], None
    for step in range(steps):
        at = step * batch_size % (count - count % batch_size)           # a rest that makes no whole batch is left out
        if at == 0 and batch_size < count:
            order = torch.randperm(count, generator=generator).to(first.device)
        value = loss(slice(None) if order is None else order[at:at + batch_size])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.detach())
        if step % 100 == 0 and not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} after {step} steps; choose a learning rate below "
                                     f"{learning_rate}")
    optimiser.zero_grad()
    value = loss(slice(None))
    value.backward()
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {value.item()} at the end; choose a learning rate below {learning_rate}")
    gradient = max(p.grad.abs().max().item() for p in parameters if p.grad is not None)
    optimiser.zero_grad()
    return Training(torch.stack(losses).cpu() if losses else torch.empty(0, dtype=first.dtype), value.item(), gradient)
