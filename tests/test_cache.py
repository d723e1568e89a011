"""Attention step by step, with what was seen kept, is attention at once."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import kernels
from kernelbook.attention import NORMALISERS, PATHS, Cache, KernelAttention, attend, explain
from kernelbook.kernels import EDP, RBF, DirectSum, Exponential, Linear, Polynomial, Quadratic, TensorProduct

KERNELS = [*(kernels.get(name) for name in kernels.available()), RBF(bandwidth=0.8), EDP() * RBF(), EDP() + Quadratic(),
           Exponential(Linear() + Quadratic(scale=0.1)), TensorProduct(EDP(), RBF(), 1), DirectSum(EDP(), RBF(), 1),
           -Linear(), 2.0 * RBF(), Polynomial(degree=2), Linear().exp()]


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def draw(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def fitting(kernel, normaliser):
    return "abs-sum" if normaliser == "sum" and not kernel.normalisable else normaliser


def close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.isfinite().all()
    assert not got.numel() or (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-9)


# ------------------------------------------------------------------------- the same answer

@st.composite
def problems(draw_from):
    """Queries, keys and values, cut into pieces that arrive one after the other, and which keys may be seen."""
    pieces = draw_from(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=1, max_size=6))
    batch = draw_from(st.sampled_from([(), (2,), (2, 3)]))
    n, d = sum(pieces), draw_from(st.integers(2, 4))
    seed = draw_from(st.integers(0, 999))
    q, k, v = draw(seed, (*batch, n, d), (*batch, n, d), (*batch, n, draw_from(st.integers(1, 3))))
    lead = draw_from(st.sampled_from([None, (), (*batch[:1], *(1 for _ in batch[1:]))]))
    visible = None
    if lead is not None:
        visible = torch.rand((*lead, n), generator=torch.Generator().manual_seed(seed)) < 0.7
    return q, k, v, visible, pieces


@settings(max_examples=300)
@given(kernel=st.sampled_from(KERNELS), normaliser=st.sampled_from(list(NORMALISERS)), problem=problems(),
       late=st.booleans())
def test_piece_by_piece_is_the_causal_pass(kernel, normaliser, problem, late):
    q, k, v, visible, pieces = problem
    normaliser = fitting(kernel, normaliser)
    if visible is not None and late:
        visible[..., :pieces[0]] = True         # nothing is said of the first keys
    mask = None if visible is None else visible[..., None, :]
    whole = attend(q, k, v, kernel, mask=mask, causal=True, normaliser=normaliser, path="exact")
    cache, parts = Cache(kernel, normaliser=normaliser), []
    for i, rows in enumerate(zip(*(x.split(pieces, -2) for x in (q, k, v)), strict=True)):
        see = None if visible is None or late and i == 0 else visible.split(pieces, -1)[i]
        parts.append(cache.attend(*rows, visible=see, causal=True))
    close(torch.cat(parts, -2), whole)
    assert len(cache) == sum(pieces)
    assert torch.equal(cache.keys, k) and torch.equal(cache.values, v)
    assert (cache.visible is None) or torch.equal(cache.visible, visible)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_all_keys_are_seen_where_attention_is_not_causal(kernel):
    q, k, v = draw(0, (2, 4, 3), (2, 7, 3), (2, 7, 2))
    for normaliser in NORMALISERS:
        options = {"normaliser": fitting(kernel, normaliser)}
        cache = Cache(kernel, **options)
        cache.append(k[:, :4], v[:, :4])
        close(cache.attend(q, k[:, 4:], v[:, 4:]), attend(q, k, v, kernel, path="exact", **options))
        close(cache.attend(q[:, :1]), attend(q[:, :1], k, v, kernel, path="exact", **options))
        hidden = Cache(kernel, **options)       # nothing to see
        hidden.append(k, v, torch.zeros(2, 7, dtype=torch.bool))
        assert (hidden.attend(q) == 0).all() and (hidden.attend(q[:, :1]) == 0).all()


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_path_asked_for_is_taken(kernel):
    q, k, v = draw(0, (2, 1, 3), (2, 7, 3), (2, 7, 2))
    normaliser = fitting(kernel, "sum")
    plan = explain(q, k, v, kernel, normaliser=normaliser)
    for path in set(PATHS) - {"linear"}:
        if path in plan.refused:
            with pytest.raises(ValueError, match=f"path '{path}' cannot serve"):
                Cache(kernel, normaliser=normaliser, path=path).append(k, v)
        else:
            cache = Cache(kernel, normaliser=normaliser, path=path)
            cache.append(k, v)
            assert torch.equal(cache.attend(q), attend(q, k, v, kernel, normaliser=normaliser, path=path))


@pytest.mark.parametrize("kernel", [RBF(), EDP(), kernels.ExponentiatedIntersection(), kernels.Taylor()], ids=repr)
def test_rows_are_kept_and_reordered_and_keys_forgotten(kernel):
    q, k, v = draw(0, (3, 2, 9, 4), (3, 2, 9, 4), (3, 2, 9, 3))
    visible = torch.rand((3, 1, 9), generator=torch.Generator().manual_seed(0)) < 0.8
    cache = Cache(kernel)
    cache.append(k[:, :, :8], v[:, :, :8], visible[..., :8])
    index = torch.tensor([2, 0, 2, 1])
    cache.select(index)
    cache.truncate(6)
    q, k, v, visible = (x[index] for x in (q, k, v, visible))
    got = cache.attend(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], visible=visible[..., 6:], causal=True)
    close(got, attend(q, k, v, kernel, mask=visible[..., None, :], causal=True, path="exact")[:, :, 6:])
    cache.truncate(0)
    close(cache.attend(q[:, :, :1], k[:, :, :1], v[:, :, :1]), v[:, :, :1])
    with pytest.raises(ValueError, match="from 0 to 1"):
        cache.truncate(2)


# ------------------------------------------------------------------------- a state in the place of the keys

FINITE = [kernels.get(name) for name in ("linear", "quadratic", "taylor", "l2_squared", "cosine", "constant", "elu",
                                         "positive_features")]


def pieces_of(kernel, cache, pieces, visible=None, seed=0):
    """What the cache gives piece by piece, and attention at once; row sums are not near 0."""
    n = sum(pieces)
    q, k, v = draw(seed, (2, 3, n, 4), (2, 3, n, 4), (2, 3, n, 2))
    q, k = q / 2 + 1, k / 2 + 1
    see = [None] * len(pieces) if visible is None else visible.split(pieces, -1)
    parts = [cache.attend(*rows, visible=s, causal=True)
             for *rows, s in zip(*(x.split(pieces, -2) for x in (q, k, v)), see, strict=True)]
    mask = None if visible is None else visible[..., None, :]
    return torch.cat(parts, -2), attend(q, k, v, kernel, causal=True, mask=mask, normaliser=cache.normaliser,
                                        path="exact")


@pytest.mark.parametrize("kernel", FINITE, ids=repr)
@pytest.mark.parametrize("normaliser", ["signed-sum", "count", "none"])
def test_a_state_gives_the_same_answer(kernel, normaliser):
    visible = torch.rand((2, 1, 14), generator=torch.Generator().manual_seed(0)) < 0.7
    sizes = set()
    for pieces, see in itertools.product(([1] * 14, [6, 1, 1, 3, 3], [14]), (None, visible)):
        cache = Cache(kernel, normaliser=normaliser, kind="state")
        close(*pieces_of(kernel, cache, pieces, see))
        assert cache.kind == "state" and len(cache) == 14 and cache.keys is cache.values is cache.visible is None
        sizes.add(cache.size)
    cache.append(*draw(1, (2, 3, 50, 4), (2, 3, 50, 2)))
    assert sizes == {cache.size} and cache.size <= 2 * 3 * (2 * kernel.feature_dimension(4) * 3 + 3)


def test_a_state_is_held_where_it_is_cheaper(monkeypatch):
    monkeypatch.setattr("kernelbook.attention.cache.STATE_FACTOR", 1)
    monkeypatch.setattr("kernelbook.attention.cache.STATE_START", 6 * 20)
    # 10 features of 2 values and the sum: 30 numbers, and 20 more; a key and its value are 6
    kernel, kinds = kernels.Quadratic(), []
    for length in range(1, 12):
        cache = Cache(kernel)
        got, expected = pieces_of(kernel, cache, [1] * length)
        close(got, expected)
        kinds.append(cache.kind)
    assert kinds == ["keys"] * 8 + ["state"] * 3
    for pieces in ([6, 1, 1, 1], [5, 4], [20, 1], [4, 20]):
        cache = Cache(kernel)
        close(*pieces_of(kernel, cache, pieces))
        assert cache.kind == "state"
    q, k, v = draw(0, (2, 3, 3, 4), (2, 3, 17, 4), (2, 3, 17, 2))
    cache = Cache(kernel)               # fewer queries than keys come with them: a state could not tell who sees which
    cache.append(k[..., :12, :], v[..., :12, :])
    got = cache.attend(q, k[..., 12:, :], v[..., 12:, :], causal=True)
    close(got, attend(q, k, v, kernel, causal=True, path="exact"))
    visible = torch.rand((2, 1, 12), generator=torch.Generator().manual_seed(0)) < 0.6
    close(*pieces_of(kernel, Cache(kernel), [1] * 12, visible))
    once = Cache(kernel)                # at first, a pass at once: there is nothing to sum up
    close(*pieces_of(kernel, once, [20]))
    assert once.kind == "keys" and "from 9 keys on" in once.explain()
    for options, words in [({"kind": "keys"}, "not to be held"), ({"path": "exact"}, "the path is 'exact'"),
                           ({"normaliser": "abs-sum", "kernel": kernels.Linear()}, "'abs-sum'"),
                           ({"kernel": RBF()}, "no finite features")]:
        cache = Cache(**({"kernel": kernel} | options))
        close(*pieces_of(cache.kernel, cache, [1] * 12))
        assert cache.kind == "keys" and words in cache.explain()
    assert "first key" in Cache().explain() and "any number" in held(kernel="elu").explain()


def test_a_memory_is_summed_up_once():
    cache = Cache("elu")
    q, k, v = draw(0, (2, 4, 3), (2, 9, 3), (2, 9, 2))
    cache.append(k, v)
    size = cache.size
    for rows in (q, q[:, :1], q[:, 1:]):
        close(cache.attend(rows), attend(rows, k, v, "elu", path="exact"))
    assert cache.kind == "state" and cache.size == size and len(cache) == 9
    cache.select(torch.tensor([1, 1, 0]))
    close(cache.attend(q[[1, 1, 0]]), attend(q[[1, 1, 0]], k[[1, 1, 0]], v[[1, 1, 0]], "elu", path="exact"))
    cache.truncate(9)
    with pytest.raises(ValueError, match="kind='keys' keeps them"):
        cache.truncate(8)


# ------------------------------------------------------------------------- what it costs, and in which precision

def test_appending_copies_few_rows():
    cache, moved, old = Cache("rbf"), 0, None
    k = torch.ones(1, 1, 4)
    for i in range(1000):
        cache.append(k, k)
        new = cache.keys.data_ptr()
        moved += i if old not in (None, new) else 0
        old = new
    assert len(cache) == 1000 and 0 < moved <= 2000
    start = Cache()
    start.append(*torch.ones(2, 37, 4))
    assert start.keys.untyped_storage().nbytes() == 37 * 4 * 4          # a memory takes no more than it needs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_at_once(dtype):
    for kernel in KERNELS:
        normaliser = fitting(kernel, "sum")
        half = draw(0, *[(8, 40, 16)] * 3, dtype=dtype)
        half[0] += 1.0          # away from 0, where the sums of signed kernels may vanish
        half[1] += 1.0
        exact, at_once = (attend(*x, kernel, causal=True, normaliser=normaliser).double()
                          for x in ([x.double() for x in half], half))
        cache = Cache(kernel, normaliser=normaliser)
        got = torch.cat([cache.attend(*x, causal=True) for x in zip(*(x.split(1, 1) for x in half), strict=True)], 1)
        assert got.dtype == dtype and got.isfinite().all()
        error, expected = ((x.double() - exact).abs().max().item() for x in (got, at_once))
        assert error <= 1.5 * expected + torch.finfo(dtype).eps, kernel


def test_with_autocast():
    module = KernelAttention(8, 2, kernel="rbf", batch_first=True)
    x, = draw(0, (2, 6, 8), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = module(x, x, x, is_causal=True, need_weights=False)[0]
        cache = module.new_cache()
        parts = [module(y, y, y, is_causal=True, need_weights=False, cache=cache)[0] for y in x.split([3, 1, 2], 1)]
    assert cache.keys.dtype is torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------- the module

@pytest.mark.parametrize("layout", ["batch first", "batch second", "alone"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7, "bias": False}], ids=["one width", "three widths"])
def test_module_with_a_cache_is_the_module(layout, widths):
    torch.manual_seed(0)
    module = KernelAttention(8, 2, kernel="rbf", batch_first=layout == "batch first", dtype=torch.float64, **widths)
    for p in module.parameters():
        p.add_(torch.randn_like(p) / 4)
    axis = 1 if layout == "batch first" else 0
    lead = () if layout == "alone" else (3,)
    shape = {"batch first": (3, 6), "batch second": (6, 3), "alone": (6,)}[layout]
    query, key, value = draw(0, (*shape, 8), (*shape, module.kdim), (*shape, module.vdim))
    if not widths:
        key = value = query
    hidden = torch.rand((*lead, 6), generator=torch.Generator().manual_seed(0)) < 0.2
    options = {"is_causal": True, "need_weights": False}
    whole = module(query, key, value, key_padding_mask=hidden, **options)[0]
    cache, parts = module.new_cache(), []
    for q, k, v, h in zip(*(x.split([2, 1, 1, 2], axis) for x in (query, key, value)), hidden.split([2, 1, 1, 2], -1),
                          strict=True):
        k, v = (q, q) if not widths else (k, v)
        parts.append(module(q, k, v, key_padding_mask=h, cache=cache, **options)[0])
    close(torch.cat(parts, axis), whole)
    again = module(query, None, None, need_weights=False, cache=cache)[0]       # nothing new: the queries only
    close(again, module(query, key, value, key_padding_mask=hidden, need_weights=False)[0])


# ------------------------------------------------------------------------- bad input

X = torch.ones(2, 3, 4)
NEW = {"k": X, "v": X}


def held(*, visible=None, **options):
    cache = Cache(**options)
    cache.append(X, X, visible)
    return cache


MODULE = KernelAttention(8, 2, dropout=0.5)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: Cache("linear"), "signed"),
    (lambda: Cache(kind="rows"), "'auto', 'keys' or 'state'"),
    (lambda: held(kind="state"), "kind='state' cannot serve EDP"),
    (lambda: held(kernel="elu", kind="state", path="exact"), "the path is 'exact'"),
    (lambda: held(kernel="elu", kind="state").attend(torch.ones(2, 2, 4), causal=True), "as many keys"),
    (lambda: Cache(path="flash"), "no path is called 'flash'"),
    (lambda: Cache().attend(X), "empty"),
    (lambda: held().attend(X, X), "go together"),
    (lambda: held().attend(X, visible=torch.ones(2, 3, dtype=torch.bool)), "go together"),
    (lambda: held().append(X[:1], X[:1]), r"k must be \(2, 'n', 4\)"),
    (lambda: held().append(X, X[..., :3]), r"v must be \(2, 'n', 4\)"),
    (lambda: held().append(X, X[:, :2]), "same leading axes"),
    (lambda: held().append(X.double(), X.double()), "float32"),
    (lambda: held().append(X, X.double()), "one dtype"),
    (lambda: held().append(X.to("meta"), X.to("meta")), "meta"),
    (lambda: held().append(X, X, torch.ones(2, 3)), "boolean"),
    (lambda: held().append(X, X, torch.ones(2, 1, dtype=torch.bool)), r"visible must broadcast .*\(2, 1\)"),
    (lambda: held().append(X, X, torch.ones(3, 3, dtype=torch.bool)), r"visible must broadcast .*\(3, 3\)"),
    (lambda: held(visible=torch.ones(3, dtype=torch.bool)).append(X, X, torch.ones(2, 3, dtype=torch.bool)),
     "like the one held"),
    (lambda: held().attend(X[..., :3]), r"q must be \(2, 'n', 4\)"),
    (lambda: held().attend(X.double()), "q must be torch.float32"),
    (lambda: held().truncate(4), "from 0 to 3"),
    (lambda: MODULE(X.repeat(1, 1, 2), None, None), "only with a cache"),
    (lambda: MODULE(*[X.repeat(1, 1, 2)] * 3, cache=MODULE.new_cache()), "need_weights=False"),
    (lambda: MODULE(*[X.repeat(1, 1, 2)] * 3, cache=MODULE.new_cache(), need_weights=False), "eval"),
    (lambda: KernelAttention(8, 2)(*[X.repeat(1, 1, 2)] * 3, cache=Cache("rbf"), need_weights=False), "RBF"),
    (lambda: KernelAttention(8, 2)(X, None, None, cache=Cache(), need_weights=False), "width 8"),
])
def test_bad_input_is_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_what_is_refused_is_not_counted():
    for kind in ("keys", "state"):
        cache = held(kernel="elu", kind=kind)
        with pytest.raises(TypeError):
            cache.append(X.double(), X.double())
        assert len(cache) == 3
    with pytest.raises(TypeError):
        cache.attend(X.double(), X, X)              # the keys are taken first
    assert len(cache) == 6 and cache.attend(X[:, :0]).shape == (2, 0, 4)


def test_rows_without_a_leading_axis_cannot_be_selected():
    cache = Cache()
    cache.select(torch.tensor([0]))         # nothing is held yet
    cache.append(X[0], X[0])
    with pytest.raises(ValueError, match="no leading axis"):
        cache.select(torch.tensor([0]))


def test_gradients_are_refused():
    with torch.enable_grad():
        needs = X.clone().requires_grad_()
        for arguments in itertools.permutations((needs, X, X)):
            with pytest.raises(ValueError, match="keeps no graph"):
                Cache().attend(*arguments)
        Cache().attend(X, X, X)
        with torch.no_grad():
            Cache().attend(needs, needs, needs)
