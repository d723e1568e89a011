r"""One small Transformer, in three architectures, with any kernel in its attention.

Layers are pre-norm: each sublayer :math:`f` is used as :math:`x + f(\operatorname{norm}(x))`, and the output of a
stack is normalised once more.  Embeddings are shared by source, target and output layer; positions are sinusoidal
and added to the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import Cache, KernelAttention
from .attention.definition import check_normaliser
from .kernels import Kernel, from_config, get
from .positions import sinusoidal

__all__ = ["ModelConfig", "TransformerConfig", "Transformer", "DecoderCache", "ARCHITECTURES"]

ARCHITECTURES = ("encoder-decoder", "decoder", "classifier")


class ModelConfig(Protocol):
    """What the configuration of any model that can be trained provides: a frozen dataclass of plain values.

    The model that it builds is a :class:`torch.nn.Module` with ``config`` and ``parameter_count``.

    Attributes
    ----------
    kernel : Kernel
        Of every attention.
    normaliser : str
        As in :func:`kernelbook.attention.attend`.
    """

    kernel: Kernel
    normaliser: str

    def build(self) -> nn.Module:
        """A model with weights drawn anew."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_dict` makes it again."""

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` described."""


@dataclass(frozen=True)
class TransformerConfig:
    """What a :class:`Transformer` is made of.

    Parameters
    ----------
    architecture : str
        ``"encoder-decoder"`` (translation), ``"decoder"`` (language modelling) or ``"classifier"`` (an encoder whose
        mean output is classified).
    vocabulary : int
        Number of tokens.
    classes : int, optional
        Number of classes, for the classifier.
    width, heads, layers, feedforward : int
        Width of the model, heads of each attention, layers of each stack, width inside the feed-forward sublayers.
    dropout, attention_dropout : float
        Of embeddings and sublayer outputs; of attention weights.
    kernel : str or Kernel
        Of every attention.
    normaliser, path : str
        As in :func:`kernelbook.attention.attend`.
    tied, qk_width
        As in :class:`kernelbook.attention.KernelAttention`: whether queries and keys are projected by one matrix, and
        their width in each head (default ``width // heads``).
    pad_id : int
        The token that fills short sequences.

    Raises
    ------
    ValueError
        If the numbers do not fit together.
    """

    architecture: str
    vocabulary: int
    classes: int | None = None
    width: int = 128
    heads: int = 4
    layers: int = 3
    feedforward: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.0
    kernel: str | Kernel = field(default="edp")
    normaliser: str = "sum"
    path: str = "auto"
    pad_id: int = 0
    tied: bool = False
    qk_width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", get(self.kernel))
        check_normaliser(self.kernel, self.normaliser)
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"no architecture is called {self.architecture!r} (known: {', '.join(ARCHITECTURES)})")
        if (self.architecture == "classifier") != (self.classes is not None):
            raise ValueError("classes must be given for the classifier, and for it only; "
                             f"got classes={self.classes} for {self.architecture!r}")
        for name in ("vocabulary", "classes", "width", "heads", "layers", "feedforward", "qk_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of heads, but width is {self.width} "
                             f"and heads is {self.heads}")
        if not 0 <= self.pad_id < self.vocabulary:
            raise ValueError(f"pad_id must be a token, from 0 to {self.vocabulary - 1}, not {self.pad_id}")

    def build(self) -> Transformer:
        """A model with weights drawn anew."""
        return Transformer(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_dict` makes it again."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"kernel": self.kernel.to_config()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TransformerConfig:
        """The configuration that :meth:`to_dict` described; what an older one does not say has its default."""
        return cls(**(plain | {"kernel": from_config(plain["kernel"])}))


class _Block(nn.Module):
    """Self-attention, attention to the encoder's output if there is one, and a feed-forward sublayer."""

    def __init__(self, c: TransformerConfig, cross: bool) -> None:
        super().__init__()

        def attention() -> KernelAttention:
            return KernelAttention(c.width, c.heads, dropout=c.attention_dropout, batch_first=True, kernel=c.kernel,
                                   normaliser=c.normaliser, path=c.path, tied=c.tied, qk_width=c.qk_width)

        self.self_attention, self.self_norm = attention(), nn.LayerNorm(c.width)
        self.cross_attention = attention() if cross else None
        self.cross_norm = nn.LayerNorm(c.width) if cross else None
        self.feedforward = nn.Sequential(nn.Linear(c.width, c.feedforward), nn.ReLU(),
                                         nn.Linear(c.feedforward, c.width))
        self.feedforward_norm = nn.LayerNorm(c.width)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, *, causal: bool, hidden: Tensor | None = None, memory: Tensor | None = None,
                memory_hidden: Tensor | None = None,
                caches: tuple[Cache | None, Cache | None] = (None, None)) -> Tensor:
        y = self.self_norm(x)
        y, _ = self.self_attention(y, y, y, key_padding_mask=hidden, is_causal=causal, need_weights=False,
                                   cache=caches[0])
        x = x + self.dropout(y)
        if self.cross_attention is not None:
            y, _ = self.cross_attention(self.cross_norm(x), memory, memory, key_padding_mask=memory_hidden,
                                        need_weights=False, cache=caches[1])
            x = x + self.dropout(y)
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class DecoderCache:
    """What a decoder has seen so far: a :class:`kernelbook.attention.Cache` for each of its attentions.

    :meth:`Transformer.new_cache` makes one.

    Attributes
    ----------
    layers : list of (Cache, Cache or None)
        Of the self-attention, which grows with every token, and of the attention to the encoder's output, whose keys
        and values were computed once.
    """

    def __init__(self, layers: list[tuple[Cache, Cache | None]]) -> None:
        self.layers = layers
        self._hidden: Tensor | None = None      # (batch, length), or None while no token is hidden

    def __len__(self) -> int:
        """Number of tokens seen, hidden ones among them."""
        return len(self.layers[0][0])

    def positions(self, n: int, hidden: Bool[Tensor, "batch n"] | None = None) -> int | Int[Tensor, "batch n"]:
        """The position of the first of ``n`` new tokens, or of each where some are hidden: they take no position."""
        if hidden is None and self._hidden is None:
            return len(self)
        if hidden is None:
            hidden = self._hidden.new_zeros(self._hidden.shape[0], n)
        before = len(self) if self._hidden is None else (~self._hidden).sum(-1, keepdim=True)
        return before + ((~hidden).cumsum(-1) - 1).clamp_min(0)

    def _note(self, n: int, hidden: Tensor | None) -> None:
        """Remember which of ``n`` tokens, just seen, are hidden."""
        if hidden is None and self._hidden is None:
            return
        if hidden is None:
            hidden = self._hidden.new_zeros(self._hidden.shape[0], n)
        if self._hidden is None:
            self._hidden = hidden.new_zeros(hidden.shape[0], len(self) - n)
        self._hidden = torch.cat((self._hidden, hidden), -1)

    def select(self, index: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; one may be kept several times.

        Parameters
        ----------
        index : Tensor
            Numbers of rows.
        """
        for cache in (c for pair in self.layers for c in pair if c is not None):
            cache.select(index)
        self._hidden = None if self._hidden is None else self._hidden.index_select(0, index)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``.

        Parameters
        ----------
        length : int
            From 0 to the number seen.

        Raises
        ------
        ValueError
            If it is not.
        """
        for cache, _ in self.layers:
            cache.truncate(length)
        self._hidden = None if self._hidden is None else self._hidden[:, :length]


class Transformer(nn.Module):
    """A Transformer whose every attention uses one kernel.

    Parameters
    ----------
    config : TransformerConfig
        What it is made of.

    Examples
    --------
    >>> config = TransformerConfig("encoder-decoder", vocabulary=100, kernel="rbf")
    >>> model = Transformer(config)
    >>> model(torch.tensor([[5, 6, 7]]), torch.tensor([[1, 8]])).shape
    torch.Size([1, 2, 100])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad_id)
        # Scaled up again in _embed: unit variance going in, and logits of unit size coming out of the tied layer.
        nn.init.normal_(self.embedding.weight, std=config.width ** -0.5)
        with torch.no_grad():
            self.embedding.weight[config.pad_id].zero_()
        self.dropout = nn.Dropout(config.dropout)
        has_encoder, has_decoder = config.architecture != "decoder", config.architecture != "classifier"
        self.encoder = self._stack(cross=False) if has_encoder else None
        self.encoder_norm = nn.LayerNorm(config.width) if has_encoder else None
        self.decoder = self._stack(cross=has_encoder) if has_decoder else None
        self.decoder_norm = nn.LayerNorm(config.width) if has_decoder else None
        self.classifier = nn.Linear(config.width, config.classes) if config.classes else None
        self._positions: dict[Any, Tensor] = {}

    def _stack(self, cross: bool) -> nn.ModuleList:
        return nn.ModuleList(_Block(self.config, cross) for _ in range(self.config.layers))

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def _embed(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """Of tokens at consecutive positions from ``start``, or at the positions that it lists."""
        weight, listed = self.embedding.weight, isinstance(start, Tensor)
        length = int(start.max()) + 1 if listed else start + tokens.shape[-1]
        key = (weight.device, weight.dtype)
        table = self._positions.get(key)
        if table is None or table.shape[0] < length:
            rows = max(64, 1 << (length - 1).bit_length())
            table = self._positions[key] = sinusoidal(rows, self.config.width, device=weight.device,
                                                      dtype=weight.dtype)
        positions = table[start] if listed else table[start:length]
        return self.dropout(self.embedding(tokens) * self.config.width ** 0.5 + positions)

    def encode(
        self, tokens: Int[Tensor, "batch m"]
    ) -> tuple[Float[Tensor, "batch m width"], Bool[Tensor, "batch m"]]:
        """The encoder's output, and the mask that is True at padding.

        Parameters
        ----------
        tokens : Tensor
            ``(batch, m)``, padded with ``pad_id``.

        Returns
        -------
        memory : Tensor
            ``(batch, m, width)``.
        hidden : Tensor
            ``(batch, m)``.

        Raises
        ------
        ValueError
            If the architecture has no encoder, or ``tokens`` is not a matrix of tokens.
        """
        self._require(self.encoder, "encoder")
        self._check_tokens("tokens", tokens)
        hidden = tokens == self.config.pad_id
        x = self._embed(tokens)
        for block in self.encoder:
            x = block(x, causal=False, hidden=hidden)
        return self.encoder_norm(x), hidden

    def decode(
        self,
        tokens: Int[Tensor, "batch n"],
        memory: Float[Tensor, "batch m width"] | None = None,
        memory_hidden: Bool[Tensor, "batch m"] | None = None,
        *,
        cache: DecoderCache | None = None,
        hidden: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch n width"]:
        """The decoder's output at every position, each seeing only the tokens up to it.

        Padding must come last; it is never seen from before it, so it takes no mask.

        Parameters
        ----------
        tokens : Tensor
            ``(batch, n)``; with a cache, only those that come after the ones it has seen.
        memory, memory_hidden : Tensor, optional
            What :meth:`encode` returned, for an encoder-decoder; a cache holds them.
        cache : DecoderCache, optional
            From :meth:`new_cache`.  The tokens are added to it; the output is that of the full pass.
        hidden : Tensor, optional
            ``(batch, n)``, with a cache only: True at padding, which takes no position and is seen by no later
            token, so that rows of different lengths may go on.  The output there means nothing.

        Returns
        -------
        Tensor
            ``(batch, n, width)``; :meth:`logits` makes scores of tokens of it.

        Raises
        ------
        ValueError
            If the architecture has no decoder, or ``memory``, ``cache`` or ``hidden`` is missing, out of place or
            does not fit.
        """
        self._require(self.decoder, "decoder")
        self._check_tokens("tokens", tokens)
        if cache is not None:
            return self._decode_on(tokens, cache, hidden, memory is not None or memory_hidden is not None)
        if hidden is not None:
            raise ValueError("hidden= goes with cache=; without one, padding comes last")
        self._check_memory(memory)
        x = self._embed(tokens)
        for block in self.decoder:
            x = block(x, causal=True, memory=memory, memory_hidden=memory_hidden)
        return self.decoder_norm(x)

    def new_cache(
        self,
        memory: Float[Tensor, "batch m width"] | None = None,
        memory_hidden: Bool[Tensor, "batch m"] | None = None,
        *,
        kind: str = "auto",
    ) -> DecoderCache:
        """A cache for :meth:`decode`, with the keys and values of the encoder's output computed once for all tokens.

        It is for inference: use it under ``torch.no_grad()``, with the model in evaluation mode.

        Parameters
        ----------
        memory, memory_hidden : Tensor, optional
            What :meth:`encode` returned, for an encoder-decoder.
        kind : str
            What is held, as in :class:`kernelbook.attention.Cache`.

        Returns
        -------
        DecoderCache

        Raises
        ------
        ValueError
            If the architecture has no decoder, ``memory`` is missing or out of place, or a gradient is required.

        Examples
        --------
        >>> model = Transformer(TransformerConfig("decoder", vocabulary=100)).eval()
        >>> with torch.no_grad():
        ...     cache = model.new_cache()
        ...     first = model.decode(torch.tensor([[5, 6, 7]]), cache=cache)
        ...     next = model.decode(torch.tensor([[8]]), cache=cache)
        >>> first.shape, next.shape, len(cache)
        (torch.Size([1, 3, 128]), torch.Size([1, 1, 128]), 4)
        """
        self._require(self.decoder, "decoder")
        self._check_memory(memory)
        if memory_hidden is not None and not memory_hidden.any():
            memory_hidden = None            # asked once here, it makes every step simpler
        layers = []
        for block in self.decoder:
            cross = None
            if memory is not None:
                cross = block.cross_attention.new_cache(kind)
                _, k, v = block.cross_attention.heads(memory[:, :0], memory, memory)
                cross.append(k, v, None if memory_hidden is None else ~memory_hidden[:, None])
            layers.append((block.self_attention.new_cache(kind), cross))
        return DecoderCache(layers)

    def _decode_on(self, tokens: Tensor, cache: DecoderCache, hidden: Tensor | None, memory: bool) -> Tensor:
        if memory:
            raise ValueError("the cache holds the keys and values of the memory: pass memory to new_cache(), and "
                             "decode(tokens, cache=cache)")
        if len(cache.layers) != len(self.decoder) or (cache.layers[0][1] is None) != (self.encoder is None):
            raise ValueError("the cache was made for another model; new_cache() makes one that fits")
        if hidden is not None and (hidden.dtype is not torch.bool or hidden.shape != tokens.shape):
            raise ValueError(f"hidden must be boolean, of the shape of tokens {tuple(tokens.shape)}, but is "
                             f"{tuple(hidden.shape)} of {hidden.dtype}")
        n = tokens.shape[-1]
        x = self._embed(tokens, cache.positions(n, hidden))
        for block, caches in zip(self.decoder, cache.layers, strict=True):
            x = block(x, causal=True, hidden=hidden, caches=caches)
        cache._note(n, hidden)
        return self.decoder_norm(x)

    def _check_memory(self, memory: Tensor | None) -> None:
        if (memory is None) != (self.encoder is None):
            raise ValueError("an encoder-decoder decodes with memory=, a decoder alone without; "
                             f"this is a {self.config.architecture}")

    def logits(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        """Scores of the next token, by inner products with the embeddings."""
        return F.linear(x, self.embedding.weight)

    def forward(self, tokens: Int[Tensor, "batch m"], target: Int[Tensor, "batch n"] | None = None) -> Tensor:
        """Scores: of next tokens, or of classes.

        Parameters
        ----------
        tokens : Tensor
            ``(batch, m)``: the source of a translation, the text to continue or to classify.
        target : Tensor, optional
            ``(batch, n)``: the translation so far, for an encoder-decoder.

        Returns
        -------
        Tensor
            ``(batch, n, vocabulary)`` for an encoder-decoder, ``(batch, m, vocabulary)`` for a decoder,
            ``(batch, classes)`` for a classifier.

        Raises
        ------
        ValueError
            If ``target`` is missing or out of place, or an argument is not a matrix of tokens.
        IndexError
            If a token is not in the vocabulary.
        """
        if (target is not None) != (self.config.architecture == "encoder-decoder"):
            raise ValueError("an encoder-decoder takes source and target, the other architectures one sequence; "
                             f"this is a {self.config.architecture}")
        if self.config.architecture == "decoder":
            return self.logits(self.decode(tokens))
        memory, hidden = self.encode(tokens)
        if target is not None:
            return self.logits(self.decode(target, memory, hidden))
        seen = (~hidden).unsqueeze(-1).to(memory.dtype)
        return self.classifier((memory * seen).sum(-2) / seen.sum(-2).clamp(min=1))

    def _require(self, part: Any, name: str) -> None:
        if part is None:
            raise ValueError(f"a {self.config.architecture} has no {name}")

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[-1] == 0:
            raise ValueError(f"{name} must be a matrix of token numbers (batch, length), length at least 1; "
                             f"got {tuple(tokens.shape)} of {tokens.dtype}")

    def record_heads(
        self, run: Callable[[], Any], attention: str = "cross"
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of every layer's heads while ``run()`` computes with this model.

        Parameters
        ----------
        run : callable
            Calls the model once, say ``lambda: model(source, target)``.
        attention : str
            ``"cross"`` (decoder to encoder), ``"decoder"`` or ``"encoder"`` (self-attention).

        Returns
        -------
        list of (Tensor, Tensor, Tensor)
            One a layer: ``(batch, heads, n, d)``, ``(batch, heads, m, d)``, ``(batch, heads, m, d)``.

        Raises
        ------
        ValueError
            If the model has no such attention.
        """
        stack = {"cross": self.decoder, "decoder": self.decoder, "encoder": self.encoder}.get(attention)
        modules = [b.cross_attention if attention == "cross" else b.self_attention for b in stack or ()]
        if not modules or modules[0] is None:
            raise ValueError(f"a {self.config.architecture} has no attention {attention!r} "
                             "(known: cross, decoder, encoder)")
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(module: KernelAttention, args: tuple[Tensor, ...]) -> None:
            if args[1] is None:
                raise ValueError("run() decodes with a cache, which computes no keys of the memory anew; record a full "
                                 "pass, as in lambda: model(source, target)")
            found.append(module.heads(*args[:3]))

        hooks = [m.register_forward_pre_hook(record) for m in modules]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return found
