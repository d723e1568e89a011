"""Binary learning problems: the certificates, the laws they imply, and what each coupling cannot see."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from kernelbook import features as explicit
from kernelbook import kernels
from kernelbook.features import MultinomialFeatures
from kernelbook.representer import PairRegressor, losses, solve_additive, solve_product, solve_trace_norm

QUERIES = np.array([[0.5, 0.2], [-0.3, 0.8], [0.7, -0.6], [-0.9, -0.1], [0.1, -0.4]])
KEYS = np.array([[0.3, -0.7], [0.9, 0.4], [-0.5, -0.2], [-0.1, 0.6]])
LABELS = np.array([[1, -1, 1, 1], [-1, -1, 1, -1], [1, 1, 1, -1], [-1, 1, -1, -1], [1, -1, 1, 1]], dtype=float)
SCORES = np.array([[-1.799, 0.101, 1.167, 0.948], [1.628, -0.964, -0.318, -0.898], [1.055, 1.972, -1.803, 1.256],
                   [0.482, 0.907, 0.712, -0.589], [-0.092, -0.157, -0.773, 1.565]])
MATRIX = np.array([
    [0.876287698014174, -1.4016366546139096, 1.065807775120554, 0.19012444114370197, -0.1066761370525171],
    [0.40137354454845564, 1.7049209017451616, -0.19647170653807677, -1.397200596113386, -1.9804545461893568],
    [-0.07354060891726277, 0.8114784581042329, -1.4587511881967075, 1.015474366629526, 0.14576704467381063],
    [-0.5484547623829883, -0.08196398553669582, 1.2789693301446619, -0.5718506706275619, -1.728011364463029],
    [-1.0233689158487067, -0.9754064291776174, 0.016689848486031167, 1.8408242921153573, 0.39821022640013837],
    [-1.4982830693144251, -1.8688488728185462, -1.2455896331725995, 0.2534992548582693, -1.4755681827366942]])


def features(points):
    return MultinomialFeatures(20)(torch.tensor(points)).numpy()


def rng(seed=0):
    return np.random.default_rng(seed)


def centred(matrix):
    """What is left of a matrix without the means of its rows and columns."""
    return matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()


# ------------------------------------------------------------------------- additive coupling

def test_coupled_logistic_problem():
    # checks: E5.9, thm-conservation
    s = solve_additive(features(QUERIES), features(KEYS), LABELS, loss="logistic", p_x=3, p_y=1.5, alpha_x=0.05,
                       alpha_y=0.08)
    assert s.duality_gap < 1e-11
    assert s.objective == pytest.approx(10.0861833544, abs=1e-9)
    assert s.dual_coef_x.sum() == pytest.approx(0.0279835932, abs=1e-8)
    assert s.dual_coef_y.sum() == pytest.approx(0.0279835932, abs=1e-8)
    f, g = features(QUERIES) @ s.weights_x, features(KEYS) @ s.weights_y
    assert f == pytest.approx([1.196083, -1.132197, 1.380980, -1.124161, 1.148347], abs=1e-6)
    # The law, read off the weights: the norm's derivative on each side is the combination with these coefficients.
    C = -losses.get("logistic").gradient(f[:, None] + g, LABELS)
    assert pytest.approx(s.dual_matrix, abs=1e-5) == C
    # Control: solved apart, each side with its own share of the responses, the sums do not agree.
    alone_x = solve_additive(features(QUERIES), np.zeros((4, 1)), LABELS, loss="logistic", p_x=3, alpha_x=0.05)
    alone_y = solve_additive(np.zeros((5, 1)), features(KEYS), LABELS, loss="logistic", p_y=1.5, alpha_y=0.08)
    assert abs(alone_x.dual_coef_x.sum() - alone_y.dual_coef_y.sum()) > 0.02


@pytest.mark.parametrize("p_x, p_y", [(2, 2), (3, 1.5)])
def test_interactions_are_invisible(p_x, p_y):
    # checks: E5.10, prp-additive-blind
    def solve(z):
        s = solve_additive(features(QUERIES), features(KEYS), z, p_x=p_x, p_y=p_y, alpha_x=0.05, alpha_y=0.08)
        return np.concatenate([features(QUERIES) @ s.weights_x, features(KEYS) @ s.weights_y])

    plain, interaction = solve(SCORES), centred(rng().normal(size=(5, 4)))
    assert abs(interaction).max() > 0.5
    assert abs(solve(SCORES + interaction) - plain).max() < 1e-10
    effect = np.zeros((5, 4))
    effect[1] = 1.0
    assert abs(solve(SCORES + effect) - plain).max() > 0.1          # control: a row effect is seen


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), p_x=st.sampled_from([1.3, 2.0, 3.0, 5.0]), p_y=st.sampled_from([1.5, 2.0, 3.0]),
       loss=st.sampled_from(["squared", "logistic"]))
def test_additive_certificate_and_law(seed, p_x, p_y, loss):
    r = rng(seed)
    A, B, z = r.normal(size=(5, 4)), r.normal(size=(4, 7)) / 2, r.normal(size=(5, 4))
    z = np.sign(z) if loss == "logistic" else z
    s = solve_additive(A, B, z, loss=loss, p_x=p_x, p_y=p_y, alpha_x=0.7, alpha_y=1.3)
    assert -1e-12 < s.objective - s.dual_objective < 1e-7
    assert s.dual_coef_x.sum() == pytest.approx(s.dual_coef_y.sum(), abs=1e-12)
    # No other weights do better, and the objective is what the formula says.
    v, w = s.weights_x, s.weights_y

    def objective(v, w):
        f = (A @ v)[:, None] + B @ w
        return (losses.get(loss).value(f, z).sum() + 0.7 / p_x * (abs(v) ** p_x).sum()
                + 1.3 / p_y * (abs(w) ** p_y).sum())

    assert s.objective == pytest.approx(objective(v, w), rel=1e-12)
    for _ in range(3):
        assert objective(v + 0.01 * r.normal(size=4), w + 0.01 * r.normal(size=7)) > s.objective


def test_additive_squared_with_hilbert_norms_is_a_linear_system():
    r = rng(1)
    A, B, z = r.normal(size=(6, 3)), r.normal(size=(5, 4)), r.normal(size=(6, 5))
    s = solve_additive(A, B, z, alpha_x=0.3, alpha_y=2.0)
    rows = np.hstack([np.repeat(A, 5, 0), np.tile(B, (6, 1))])
    w = np.linalg.solve(rows.T @ rows + np.diag([0.3] * 3 + [2.0] * 4), rows.T @ z.ravel())
    assert np.concatenate([s.weights_x, s.weights_y]) == pytest.approx(w, abs=1e-10)


# ------------------------------------------------------------------------- product coupling

def test_product_of_two_numbers():
    # checks: prp-product
    one = [[1.0]]
    above = solve_product(one, one, [[2.0]], alpha_x=0.5, alpha_y=0.5)
    assert above.best.objective == pytest.approx(0.875, abs=1e-12)
    assert len(above.minima) == 1 and above.certificate == "trace norm"
    assert abs(above.best.weights_x[0]) == pytest.approx(1.5**0.5, abs=1e-6)
    assert above.best.weights_x[0] * above.best.weights_y[0] == pytest.approx(1.5, abs=1e-8)
    for z in (0.5, 0.3, -0.4):
        below = solve_product(one, one, [[z]], alpha_x=0.5, alpha_y=0.5)
        assert below.best.weights_x[0] == below.best.weights_y[0] == 0
    uneven = solve_product(one, one, [[2.0]], alpha_x=0.25, alpha_y=1.0)      # what counts is the geometric mean
    assert uneven.best.objective == pytest.approx(0.875, abs=1e-12) == uneven.lower_bound
    # Exponents below 2 on both sides: zero stays a local minimum whatever the response; above 2 it never is one.
    low = solve_product(one, one, [[2.0]], p_x=1.5, p_y=1.5, alpha_x=0.5, alpha_y=0.5)
    assert len(low.minima) == 2 and low.minima[1].objective == 2.0 and low.certificate == ""
    worse = solve_product(one, one, [[1.0]], p_x=1.5, p_y=1.5, alpha_x=0.5, alpha_y=0.5)
    assert [m.weights_x[0] == 0 for m in worse.minima] == [True, False]     # a well that is shallower than zero
    high = solve_product(one, one, [[0.3]], p_x=3, p_y=3, alpha_x=0.5, alpha_y=0.5)
    assert len(high.minima) == 1 and abs(high.best.weights_x[0]) > 0.1


@pytest.mark.parametrize("loss, z", [("squared", SCORES), ("logistic", LABELS)])
@pytest.mark.parametrize("p", [(2.0, 2.0), (1.5, 1.5), (1.5, 3.0)])
def test_product_is_stationary_and_balanced(loss, z, p):
    A, B = QUERIES, KEYS
    s = solve_product(A, B, z, loss=loss, p_x=p[0], p_y=p[1], alpha_x=0.2, alpha_y=0.05, starts=6)
    for m in s.minima:
        assert m.stationarity < 1e-5 and m.imbalance < 1e-5
    assert s.minima == tuple(sorted(s.minima, key=lambda m: m.objective))
    assert sum(m.found for m in s.minima) == s.starts == 6
    assert s.lower_bound <= s.best.objective + 1e-9
    f, g = A @ s.best.weights_x, B @ s.best.weights_y
    C = -losses.get(loss).gradient(np.outer(f, g), z)
    residual = 0.2 * np.sign(s.best.weights_x) * abs(s.best.weights_x) ** (p[0] - 1) - A.T @ C @ g
    assert abs(residual).max() < 1e-5


def test_global_only_where_theory_says_so():
    assert solve_product(np.eye(6), np.eye(5), MATRIX, alpha_x=0.7, alpha_y=0.7).certificate == "truncated SVD"
    assert solve_product(QUERIES, KEYS, SCORES, alpha_x=0.1, alpha_y=0.1).certificate == ""
    assert solve_product(QUERIES, KEYS, SCORES, p_x=3, p_y=1.5).lower_bound == -np.inf


def test_alternating_minimisation_stalls_at_a_kink():
    # The example exm-stall of the book.
    def J(a, b):
        return a * a / 2 + b * b / 2 + 5 * abs(a - b) + 3 * abs(a + b - 2)

    grid = np.linspace(-3, 3, 60_001)
    assert J(0, 0) == 6 and J(1, 1) == 1
    assert grid[J(grid, 0.0).argmin()] == pytest.approx(0, abs=1e-12) == grid[J(0.0, grid).argmin()]
    smooth = J(grid, 0.0) - 5 * abs(grid) + 5 * grid**2 / 2         # control: without the kink there is a way on
    assert grid[smooth.argmin()] > 0.1


# ------------------------------------------------------------------------- bilinear coupling

REFERENCE = {1: 13.305198199928, 2: 10.010322487600, 3: 7.754214264465, 4: 7.505443234209, 5: 7.465302138324}


@pytest.mark.parametrize("d", REFERENCE)
def test_head_dimension(d):
    # checks: E5.11, thm-trace-norm
    s = solve_trace_norm(np.eye(6), np.eye(5), MATRIX, alpha=0.7, rank=d)
    assert s.objective == pytest.approx(REFERENCE[d], abs=1e-9) and s.rank == d
    values = np.maximum(np.linalg.svd(MATRIX, compute_uv=False) - 0.7, 0)[:d]
    assert s.singular_values == pytest.approx(values, abs=1e-9)
    F, G = s.factor_x, s.factor_y
    factored = 0.5 * ((MATRIX - F @ G.T) ** 2).sum() + 0.35 * ((F**2).sum() + (G**2).sum())
    assert factored == pytest.approx(REFERENCE[d], abs=1e-9)
    assert s.certificate == ("duality gap" if d == 5 else "truncated SVD")
    # The same by search in the factors: features that are not quite orthonormal take the closed form away.
    tilt = np.eye(6)
    tilt[0, 1] = 1e-5
    searched = solve_trace_norm(tilt, np.eye(5), MATRIX, alpha=0.7, rank=d)
    assert searched.objective == pytest.approx(REFERENCE[d], abs=1e-3) and searched.certificate != "truncated SVD"
    truncated = solve_trace_norm(np.eye(6), np.eye(5), MATRIX, alpha=0.7)       # control: another dimension
    assert d == 5 or abs(truncated.objective - REFERENCE[d]) > 0.01


def proximal(K_x, K_y, z, loss, alpha, steps=20_000):
    """An independent solver: plain proximal gradient in square roots of the Gram matrices."""
    def root(K):
        values, vectors = np.linalg.eigh(K)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    L, R = root(K_x), root(K_y)
    step, M = 1 / (np.linalg.norm(L, 2) * np.linalg.norm(R, 2)) ** 2, np.zeros(z.shape)
    for _ in range(steps):
        U, s, Vt = np.linalg.svd(M - step * L @ loss.gradient(L @ M @ R, z) @ R, full_matrices=False)
        M = (U * np.maximum(s - step * alpha, 0)) @ Vt
    return loss.value(L @ M @ R, z).sum() + alpha * np.linalg.svd(M, compute_uv=False).sum()


def test_kernels_on_both_sides():
    # checks: thm-trace-norm, E5.11
    edp = kernels.EDP(scale=1.0)
    s = PairRegressor(features_x=edp, features_y=edp, alpha=0.3).fit(QUERIES, KEYS, SCORES).solution_
    assert s.objective == pytest.approx(3.9365742856596375, abs=1e-5) and s.duality_gap < 1e-4
    assert s.singular_values == pytest.approx([6.0325402, 2.3917899, 1.3968798, 0.1325940], abs=1e-3)


@pytest.mark.parametrize("loss, z", [("squared", SCORES), ("logistic", LABELS)])
def test_different_kernels_against_another_solver(loss, z):
    k_x, k_y = kernels.EDP(scale=1.0), kernels.RBF(1.0)
    model = PairRegressor(features_x=k_x, features_y=k_y, loss=loss, alpha=0.3).fit(QUERIES, KEYS, z)
    gram = [k(torch.tensor(p), torch.tensor(p)).numpy() for k, p in ((k_x, QUERIES), (k_y, KEYS))]
    other = proximal(*gram, z, losses.get(loss), 0.3, steps=4000)
    assert model.objective_ <= other + 1e-6 and model.objective_ == pytest.approx(other, abs=1e-3)
    assert model.duality_gap_ <= 1e-5 * model.objective_ * 10
    # A bound on the rank costs; a bound that the solution keeps anyhow costs nothing.
    bounds = [clone(model).set_params(rank=d).fit(QUERIES, KEYS, z) for d in (1, 4)]
    assert bounds[0].objective_ > model.objective_ + 0.05
    assert bounds[1].objective_ == pytest.approx(model.objective_, abs=1e-3)
    assert bounds[0].solution_.rank == 1


def test_split_and_factored_agree():
    r = rng(2)
    A, B, z = r.normal(size=(12, 20)) * 0.7 ** np.arange(20), r.normal(size=(9, 6)), r.normal(size=(12, 9)) * 2
    convex = solve_trace_norm(A, B, z, alpha=6.0)
    factored = solve_trace_norm(A, B, z, alpha=6.0, rank=6)
    assert convex.iterations > 0 and convex.rank < 6
    assert factored.objective == pytest.approx(convex.objective, abs=1e-4)
    assert factored.form == pytest.approx(convex.form, abs=1e-2)
    C = convex.dual_matrix
    assert np.linalg.norm(A.T @ C @ B, 2) <= 6.0 * (1 + 1e-12)
    assert convex.dual_objective == pytest.approx((C * z).sum() - (C * C).sum() / 2, abs=1e-9)
    values = np.linalg.svd(convex.form, compute_uv=False)
    error = ((z - A @ convex.form @ B.T) ** 2).sum() / 2
    assert convex.objective == pytest.approx(error + 6.0 * values.sum(), abs=1e-9)


def test_strong_penalty_gives_zero():
    r = rng(3)
    A, B, z = r.normal(size=(5, 4)), r.normal(size=(6, 3)), r.normal(size=(5, 6))
    most = np.linalg.norm(A.T @ z @ B, 2)
    assert solve_trace_norm(A, B, z, alpha=1.001 * most).rank == 0
    assert solve_trace_norm(A, B, z, alpha=0.98 * most).rank == 1
    assert solve_trace_norm(A, B, z, alpha=0.98 * most, rank=1).rank == 1


def test_certificates_cover_features_too_small_for_the_coordinates():
    # A second feature of size 1e-7 counts as 0 in the search, yet it would pay: this is no minimum, and is not called
    # one.
    A, z = np.diag([1, 1e-7]), np.eye(2)
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        s = solve_trace_norm(A, np.eye(2), z, alpha=1e-9)
    better = np.diag([1, 0.99e7])
    value = ((z - A @ better) ** 2).sum() / 2 + 1e-9 * np.trace(better)
    assert s.dual_objective <= value < s.objective - 0.4 and s.certificate == ""
    assert solve_trace_norm(A, np.eye(2), z, alpha=1e-9, rank=1).certificate == ""
    assert solve_product(A, np.eye(2), z, alpha_x=1e-9, alpha_y=1e-9, starts=4).certificate == ""
    # No features at all: nothing can be learned, and that is certain.
    for rank in (None, 1):
        nothing = solve_trace_norm(np.zeros((5, 2)), KEYS, SCORES, rank=rank)
        assert nothing.rank == 0 and nothing.certificate == "duality gap"


# ------------------------------------------------------------------------- the estimator, and refusals

def test_estimator_predicts_other_points():
    other_x, other_y = rng(4).normal(size=(3, 2)), rng(5).normal(size=(2, 2))
    for settings_ in ({"coupling": "additive", "features_x": MultinomialFeatures(6), "p_x": 1.5},
                      {"features_x": MultinomialFeatures(6), "features_y": kernels.RBF(2.0), "rank": 2},
                      {"coupling": "additive", "features_x": kernels.RBF(1.0)}):
        model = clone(PairRegressor(alpha=0.2).set_params(**settings_)).fit(QUERIES, KEYS, SCORES)
        whole = model.predict(np.vstack([QUERIES, other_x]), np.vstack([KEYS, other_y]))
        assert whole.shape == (8, 6)
        assert model.predict(QUERIES, KEYS) == pytest.approx(whole[:5, :4], abs=1e-9)
        assert model.predict(other_x, other_y) == pytest.approx(whole[5:, 4:], abs=1e-9)
        assert ((whole[:5, :4] - SCORES) ** 2).sum() < (SCORES**2).sum()
        assert (abs(centred(whole)).max() < 1e-9) == (model.coupling == "additive")
    # A kernel and its features give the same model.
    kernel = kernels.Polynomial(degree=2, offset=1.0)
    pair = [PairRegressor(features_x=f, features_y=f, alpha=0.2).fit(QUERIES, KEYS, SCORES)
            for f in (kernel, explicit.of(kernel))]
    assert pair[0].predict(other_x, other_y) == pytest.approx(pair[1].predict(other_x, other_y), abs=1e-2)


@pytest.mark.parametrize("call, words", [
    (lambda: solve_additive(QUERIES, KEYS, SCORES.T), "shape"),
    (lambda: solve_additive(QUERIES, KEYS, SCORES, loss="logistic"), "-1 and"),
    (lambda: solve_additive(QUERIES, KEYS, SCORES, loss="absolute"), "kink"),
    (lambda: solve_additive(QUERIES, KEYS, SCORES, p_x=1.0), "p_x must lie"),
    (lambda: solve_additive(QUERIES, KEYS, SCORES, alpha_y=0.0), "alpha_y must be"),
    (lambda: solve_additive(QUERIES, KEYS * np.nan, SCORES), "finite"),
    (lambda: solve_product(QUERIES, KEYS, SCORES, starts=0), "starts"),
    (lambda: solve_trace_norm(QUERIES, KEYS, SCORES, rank=0), "rank must be"),
    (lambda: PairRegressor("other").fit(QUERIES, KEYS, SCORES), "coupling"),
    (lambda: PairRegressor("additive", rank=2).fit(QUERIES, KEYS, SCORES), "leave rank=None"),
    (lambda: PairRegressor(p_x=3).fit(QUERIES, KEYS, SCORES), "additive"),
    (lambda: PairRegressor("additive", features_x=kernels.RBF(), p_x=3).fit(QUERIES, KEYS, SCORES), "not determined"),
    (lambda: PairRegressor(features_x=kernels.L2()).fit(QUERIES, KEYS, SCORES), "not known to be positive definite"),
    (lambda: PairRegressor(features_y="rbf").fit(QUERIES, KEYS, SCORES), "features_y must be"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_gap_that_stays_open_is_announced():
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        s = solve_additive(features(QUERIES), features(KEYS), LABELS, loss="logistic", p_x=3, p_y=1.5, alpha_x=0.05,
                           alpha_y=0.08, max_iter=2)
    assert s.duality_gap > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_additive(QUERIES, KEYS, SCORES)


@pytest.mark.parametrize("p_x, p_y", [(2.0, 2.0), (3.0, 1.5), (1.25, 5.0)])
def test_threshold_at_zero_for_conjugate_exponents(p_x, p_y):
    # checks: prp-bin-zero
    r = rng(6)
    A, B, z = r.normal(size=(5, 3)), r.normal(size=(4, 2)), r.normal(size=(5, 4))
    M = A.T @ z @ B

    def dual(u, p):                   # the vector of norm 1 at which u is largest
        v = np.sign(u) * abs(u) ** (1 / (p - 1))
        return v / (abs(v) ** p).sum() ** (1 / p)

    best = 0.0
    for _ in range(20):               # alternate: the value grows, and one of the starts finds the norm of M
        w = r.normal(size=2)
        for _ in range(300):
            v = dual(M @ w, p_x)
            w = dual(M.T @ v, p_y)
        if v @ M @ w > best:
            best, v_hat, w_hat = v @ M @ w, v, w
    for factor in (0.98, 1.02):
        lam_x = 3.0
        lam_y = (factor * best / lam_x ** (1 / p_x)) ** p_y                # so that mu = factor * the norm

        def change(v, w, lam_x=lam_x, lam_y=lam_y):
            product = np.outer(A @ v, B @ w)
            return ((product**2).sum() / 2 - (z * product).sum() + lam_x / p_x * (abs(v) ** p_x).sum()
                    + lam_y / p_y * (abs(w) ** p_y).sum())

        t = 1e-6
        down = change((t / lam_x) ** (1 / p_x) * v_hat, (t / lam_y) ** (1 / p_y) * w_hat)
        assert (down < 0) == (factor < 1)
        small = [change((t * r.uniform() / lam_x) ** (1 / p_x) * dual(r.normal(size=3), p_x),
                        (t * r.uniform() / lam_y) ** (1 / p_y) * dual(r.normal(size=2), p_y)) for _ in range(200)]
        assert factor < 1 or min(small) > 0
