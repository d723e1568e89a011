"""The Triton kernels of :mod:`.triton_tiles`, which imports this module only when it needs one; it needs ``triton``.

A program computes tiles of ``2 * A * R`` rows by ``B * C`` columns.  ``own`` is the side whose rows it has to itself,
``other`` the side it runs through; each is queries or keys.

**Layout.**  While a program sums a rule over the coordinates, its tile is two halves of four axes, ``(A, B, R, C)``:
row ``a * R + r``, column ``b * C + c``.  Triton spreads the last axes over threads first, so that with ``R * C``
threads each has a patch of ``2 A x B`` pairs in registers, and ``2 A + B`` loads from the cache serve its ``2 A B``
pairs.  In a tile of two axes a thread's patch is long and thin, and the cache cannot keep up.  The halves are there
because Triton loads as many numbers as there are threads, or more, in another layout, and then moves them through
shared memory at each coordinate.

**Padding.**  Widths that are no power of two are padded, by masks, where a matrix product needs it; a sum over the
coordinates takes as many as there are.  Queries and keys come transposed, ``(batch, d, length)`` in float32, their last
row repeated up to a whole tile: no load of them needs a mask, and a rule meets no number there that it does not meet
elsewhere.

Reductions name Triton's own combining functions, because the interpreter knows those wherever Triton was imported.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair_sums(OWN, OTHER, own_pad, other_pad, own_at, other_at, RULE: tl.constexpr, KEYS: tl.constexpr,
               D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
               UNROLL: tl.constexpr):
    # The sum of the rule over the coordinates, for each pair of the tile; its two halves share what is loaded of OTHER.
    upper = tl.full((A, B, R, C), 0.0, tl.float32)
    lower = tl.full((A, B, R, C), 0.0, tl.float32)
    for l0 in range(0, D // UNROLL * UNROLL, UNROLL):
        for u in tl.static_range(UNROLL):
            x = tl.load(OWN + (l0 + u) * own_pad + own_at)
            z = tl.load(OWN + (l0 + u) * own_pad + own_at + A * R)
            y = tl.load(OTHER + (l0 + u) * other_pad + other_at)
            upper += RULE(y, x) if KEYS else RULE(x, y)
            lower += RULE(y, z) if KEYS else RULE(z, y)
    for at in tl.static_range(D // UNROLL * UNROLL, D):
        x = tl.load(OWN + at * own_pad + own_at)
        z = tl.load(OWN + at * own_pad + own_at + A * R)
        y = tl.load(OTHER + at * other_pad + other_at)
        upper += RULE(y, x) if KEYS else RULE(x, y)
        lower += RULE(y, z) if KEYS else RULE(z, y)
    s = tl.reshape(tl.permute(tl.join(upper, lower), (4, 0, 2, 1, 3)), (2 * A * R, B * C))
    # A product with zeros, one instruction, moves the sums to the layout of matrix products once and for all; without
    # it the code that follows runs in a layout of Triton's choice, with many times the instructions.
    return tl.dot(tl.full((2 * A * R, 16), 0.0, tl.float16), tl.full((16, B * C), 0.0, tl.float16), s)


@triton.jit
def _visible(MASK, mask_row, rows, columns, n, m, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    # Whether the queries in `rows` may see the keys in `columns`; the two broadcast to a tile.
    see = (rows < n) & (columns < m)
    if CAUSAL:
        see = see & (columns <= rows + (m - n))
    if MASKED:
        see = see & (tl.load(MASK + rows.to(tl.int64) * mask_row + columns, mask=see, other=0) != 0)
    return see


@triton.jit(do_not_specialize=["n", "m"])
def forward(QT, KT, V, OUT, NORM, MASK, MASK_AT, n, m, n_pad, m_pad, mask_row, scale,
            RULE: tl.constexpr, LINK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr,
            DV: tl.constexpr, BLOCK_DV: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
            C: tl.constexpr, UNROLL: tl.constexpr):
    # The weighted means, and two numbers per query that give back its weights: exp(s - top) / total, link(s) / total.
    # In one number, as a logarithm, large scores would leave few digits to them.
    tiles = (n + 2 * A * R - 1) // (2 * A * R)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tiles - 1 - tl.program_id(0) % tiles) * (2 * A * R)        # causal: the longest rows first
    QT += batch * D * n_pad
    KT += batch * D * m_pad
    V += batch * m * DV
    if MASKED:
        MASK += tl.load(MASK_AT + batch)

    rows = first + tl.arange(0, 2 * A * R)
    widths = tl.arange(0, BLOCK_DV)
    own_at = first + tl.arange(0, A)[:, None, None, None] * R + tl.arange(0, R)[None, None, :, None]
    top = tl.full((2 * A * R,), float("-inf"), tl.float32)
    total = tl.full((2 * A * R,), 0.0, tl.float32)
    mean = tl.full((2 * A * R, BLOCK_DV), 0.0, tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + 2 * A * R + m - n)
    for start in range(0, end, B * C):
        other_at = start + tl.arange(0, B)[None, :, None, None] * C + tl.arange(0, C)[None, None, None, :]
        s = scale * _pair_sums(QT, KT, n_pad, m_pad, own_at, other_at, RULE, False, D, A, B, R, C, UNROLL)
        columns = start + tl.arange(0, B * C)
        see = _visible(MASK, mask_row, rows[:, None], columns[None, :], n, m, CAUSAL, MASKED)
        v = tl.load(V + columns[:, None] * DV + widths[None, :],
                    mask=(columns < m)[:, None] & (widths < DV)[None, :], other=0.0)
        if LINK == "exp":
            s = tl.where(see, s, float("-inf"))
            new = tl.maximum(top, tl.reduce(s, 1, tl.standard._elementwise_max))
            shift = tl.where(new == float("-inf"), 0.0, new)        # nothing seen yet: no inf - inf
            w = tl.exp(s - shift[:, None])
            fade = tl.exp(top - shift)
            total = total * fade
            mean = mean * fade[:, None]
            top = new
            mean = tl.dot(w.to(v.dtype), v, mean, input_precision="tf32x3")
        else:
            # Raw weights have any size: they and the values are multiplied in float32.
            if LINK == "sqrt":
                s = tl.sqrt(s)
            w = tl.where(see, s, 0.0)
            mean = tl.dot(w, v.to(tl.float32), mean, input_precision="tf32x3")
        total += tl.reduce(w, 1, tl.standard._sum_combine)

    # A query with nothing to see, or whose weights sum to 0, has output 0 and weights 0.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    NORM += batch * 2 * n
    tl.store(NORM + rows, tl.where(total == 0.0, 0.0, top), mask=rows < n)
    tl.store(NORM + n + rows, inverse, mask=rows < n)
    OUT += batch * n * DV
    tl.store(OUT + rows[:, None] * DV + widths[None, :], mean * inverse[:, None],
             mask=(rows < n)[:, None] & (widths < DV)[None, :])


@triton.jit(do_not_specialize=["n", "m"])
def backward(QT, KT, V, D_OUT, NORM, DELTA, D_OWN, D_V, MASK, MASK_AT, n, m, n_pad, m_pad, mask_row, scale,
             RULE: tl.constexpr, SLOPE: tl.constexpr, KEYS: tl.constexpr, WANT_OWN: tl.constexpr,
             WANT_V: tl.constexpr, LINK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr,
             DV: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
             R: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr):
    # The gradients of one side.  KEYS: rows are keys, columns queries, and D_V may be wanted too; else rows are
    # queries.  SLOPE is the derivative of the rule in the own side.
    if KEYS:
        length, others, own_pad, other_pad, OWN, OTHER, OWN_WIDE, OTHER_WIDE = m, n, m_pad, n_pad, KT, QT, V, D_OUT
    else:
        length, others, own_pad, other_pad, OWN, OTHER, OWN_WIDE, OTHER_WIDE = n, m, n_pad, m_pad, QT, KT, D_OUT, V
    tiles = (length + 2 * A * R - 1) // (2 * A * R)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * (2 * A * R)
    OWN += batch * D * own_pad
    OTHER += batch * D * other_pad
    D_OWN += batch * D * own_pad
    OWN_WIDE += batch * length * DV
    OTHER_WIDE += batch * others * DV
    NORM += batch * 2 * n
    DELTA += batch * n
    if MASKED:
        MASK += tl.load(MASK_AT + batch)

    rows = first + tl.arange(0, 2 * A * R)
    widths = tl.arange(0, BLOCK_DV)
    own_at = first + tl.arange(0, A)[:, None, None, None] * R + tl.arange(0, R)[None, None, :, None]
    d_own_at = first + ((tl.arange(0, 2)[None, None, :] * A + tl.arange(0, A)[:, None, None]) * R
                        + tl.arange(0, R)[None, :, None])
    d_v = tl.full((2 * A * R, BLOCK_DV), 0.0, tl.float32)
    start_at = 0
    end = others
    if CAUSAL:
        if KEYS:
            start_at = tl.maximum(0, first - (m - n)) // (B * C) * (B * C)      # the first query that sees a key here
        else:
            end = tl.minimum(m, first + 2 * A * R + m - n)
    for start in range(start_at, end, B * C):
        other_at = start + tl.arange(0, B)[None, :, None, None] * C + tl.arange(0, C)[None, None, None, :]
        s = scale * _pair_sums(OWN, OTHER, own_pad, other_pad, own_at, other_at, RULE, KEYS, D, A, B, R, C, UNROLL)
        columns = start + tl.arange(0, B * C)
        if KEYS:
            see = _visible(MASK, mask_row, columns[None, :], rows[:, None], n, m, CAUSAL, MASKED)
            top = tl.load(NORM + columns, mask=columns < n, other=0.0)[None, :]
            inverse = tl.load(NORM + n + columns, mask=columns < n, other=0.0)[None, :]
            delta = tl.load(DELTA + columns, mask=columns < n, other=0.0)[None, :]
        else:
            see = _visible(MASK, mask_row, rows[:, None], columns[None, :], n, m, CAUSAL, MASKED)
            top = tl.load(NORM + rows, mask=rows < n, other=0.0)[:, None]
            inverse = tl.load(NORM + n + rows, mask=rows < n, other=0.0)[:, None]
            delta = tl.load(DELTA + rows, mask=rows < n, other=0.0)[:, None]
        # The normalised weights, and the derivative in s of the unnormalised ones, over the normaliser.
        if LINK == "exp":
            w = tl.exp(s - top) * inverse
            slope = w
        elif LINK == "sqrt":
            root = tl.sqrt(s)
            w = root * inverse
            slope = tl.where(root == 0.0, 0.0, 0.5 * inverse / tl.where(root == 0.0, 1.0, root))
        else:
            w = s * inverse
            slope = inverse
        if WANT_V:
            w = tl.where(see, w, 0.0)
            other_wide = tl.load(OTHER_WIDE + columns[:, None] * DV + widths[None, :],
                                 mask=(columns < others)[:, None] & (widths < DV)[None, :], other=0.0)
            d_v = tl.dot(w.to(other_wide.dtype), other_wide, d_v, input_precision="tf32x3")
        if WANT_OWN:
            d_w = tl.full((2 * A * R, B * C), 0.0, tl.float32)
            for chunk in tl.static_range(0, BLOCK_DV, CHUNK):       # a few widths at a time: little shared memory
                few = chunk + tl.arange(0, CHUNK)
                own_wide = tl.load(OWN_WIDE + rows[:, None] * DV + few[None, :],
                                   mask=(rows < length)[:, None] & (few < DV)[None, :], other=0.0)
                other_few = tl.load(OTHER_WIDE + columns[:, None] * DV + few[None, :],
                                    mask=(columns < others)[:, None] & (few < DV)[None, :], other=0.0)
                d_w = tl.dot(own_wide, tl.trans(other_few), d_w, input_precision="tf32x3")
            d_s = tl.where(see, scale * slope * (d_w - delta), 0.0)
            g, h = tl.split(tl.permute(tl.reshape(d_s, (2, A, R, B, C)), (1, 3, 2, 4, 0)))
            for at in range(0, D):
                x = tl.load(OWN + at * own_pad + own_at)
                z = tl.load(OWN + at * own_pad + own_at + A * R)
                y = tl.load(OTHER + at * other_pad + other_at)
                x = g * (SLOPE(y, x) if KEYS else SLOPE(x, y))
                z = h * (SLOPE(y, z) if KEYS else SLOPE(z, y))
                x = tl.reduce(tl.reduce(x, 1, tl.standard._sum_combine), 2, tl.standard._sum_combine)
                z = tl.reduce(tl.reduce(z, 1, tl.standard._sum_combine), 2, tl.standard._sum_combine)
                place = D_OWN + at * own_pad + d_own_at
                tl.store(place, tl.load(place) + tl.join(x, z))
            # Before the next tile reads what this one wrote: other threads may have written it.
            tl.debug_barrier()
    if WANT_V:
        D_V += batch * m * DV
        tl.store(D_V + rows[:, None] * DV + widths[None, :], d_v,
                 mask=(rows < m)[:, None] & (widths < DV)[None, :])
