"""The solvers against numbers computed independently, against scikit-learn and SciPy, and their certificates."""

import itertools
import pickle
import warnings
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, sparse, special
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from kernelbook.features import MultinomialFeatures
from kernelbook.representer import (
    BanachClassifier,
    BanachRegressor,
    TensorKernelRegressor,
    certify,
    losses,
    solve,
    tensor_kernel,
)

X = np.array([[0.5, 0.2], [-0.3, 0.8], [0.7, -0.6], [-0.9, -0.1], [0.1, -0.4]])
Y = np.array([1.0, -0.5, 0.3, 0.8, -1.2])
TEST = np.array([[0.0, 0.0], [0.4, 0.4], [-0.6, 0.5], [1.0, -1.0]])
ALPHA = 0.1


def features(x, degree=30):
    return MultinomialFeatures(degree)(torch.from_numpy(x)).numpy()


A, A_TEST = features(X), features(TEST)

# values at the test points, dual coefficients, norm and objective, from an independent computation
REFERENCE = {
    4 / 3: ([-0.4096220105, 0.4933015253, 0.0086878858, 0.5768233579],
            [0.3503641441, -0.1493262906, 0.0522378473, 0.1351522053, -0.4626946577], 4.4133426347, 0.7330068398),
    1.5: ([-0.3683210357, 0.5081086024, -0.0064266640, 0.5370090733],
          [0.3523150916, -0.1512870326, 0.0788950504, 0.1606176158, -0.5012301837], 3.8360742083, 0.7160203183),
    2: ([-0.2535456135, 0.5628632565, -0.0668083937, 0.6218578043],
        [0.3603528020, -0.1537821991, 0.1358376216, 0.2210620989, -0.5888248848], 2.8176170184, 0.6807173644),
    3: ([-0.1416584216, 0.6366716989, -0.1230958299, 0.9743338292],
        [0.3567861421, -0.1483592459, 0.1792755101, 0.2707414544, -0.6604505716], 2.0024468796, 0.6131178255),
    4: ([-0.0999027797, 0.6714760283, -0.1419720053, 1.3271825213],
        [0.3497891069, -0.1425856334, 0.1879134065, 0.2857849191, -0.6810015078], 1.6817166643, 0.5616790736),
}
LOSSES = ("squared", "absolute", "logistic", "hinge")


def targets(loss, y=Y):
    return np.where(y >= 0, 1.0, -1.0) if losses.get(loss).targets_are_signs else y


def objective(v, p, alpha=ALPHA):
    return 0.5 * ((A @ v - Y) ** 2).sum() + alpha / p * (np.abs(v) ** p).sum()


# ------------------------------------------------------------------------- the reference problem

@pytest.mark.parametrize("p", REFERENCE)
def test_reference_problem(p):
    # checks: thm-lp-solution, thm-finite-dual, thm-coefficients, E5.1
    values, dual_coef, norm, least = REFERENCE[p]
    model = BanachRegressor(p=p, alpha=ALPHA, features=MultinomialFeatures(30)).fit(X, Y)
    np.testing.assert_allclose(model.predict(TEST), values, atol=1e-8, rtol=0)
    np.testing.assert_allclose(model.dual_coef_, dual_coef, atol=1e-8, rtol=0)
    np.testing.assert_allclose([model.norm_, model.objective_], [norm, least], atol=1e-8, rtol=0)
    assert model.duality_gap_ < 1e-10 * model.objective_
    np.testing.assert_allclose(model.dual_coef_, Y - model.predict(X), atol=1e-10)
    # the boxed formula of the theorem, from the coefficients alone
    r = p / (p - 1)
    u = A.T @ model.dual_coef_
    formula = ALPHA ** (1 - r) * A_TEST @ (np.sign(u) * np.abs(u) ** (r - 1))
    np.testing.assert_allclose(formula, values, atol=1e-8, rtol=0)
    # controls: the exponent p for p - 1, the factor 1/alpha for alpha^(1-r), and features x^a/a!
    wrong = ALPHA ** (1 - r) * A_TEST @ (np.sign(u) * np.abs(u) ** r)
    assert np.abs(wrong - values).max() > 0.03
    assert p == 2 or np.abs(A_TEST @ (np.sign(u) * np.abs(u) ** (r - 1)) / ALPHA - values).max() > 0.03
    a = MultinomialFeatures(30).exponents(2).numpy()
    weight = special.factorial(a).prod(1) ** -0.5
    other = solve(A * weight, Y, p=p, alpha=ALPHA)
    assert np.abs(A_TEST * weight @ other.weights - values).max() > 0.03


def test_tensor_kernel_needs_no_truncation():
    # checks: prp-tensor-kernel, E5.3
    value = tensor_kernel(*X[:4])
    assert abs(value - 1.10731029859) < 1e-10
    assert abs(value - A[:4].prod(0).sum()) < 1e-13
    exact, cut = TensorKernelRegressor(alpha=ALPHA).fit(X, Y), solve(A, Y, p=4 / 3, alpha=ALPHA)
    np.testing.assert_allclose(exact.dual_coef_, cut.dual_coef, atol=1e-10)
    np.testing.assert_allclose(exact.predict(TEST), A_TEST @ cut.weights, atol=1e-10)
    assert abs(exact.norm_ - np.linalg.norm(cut.weights, 4 / 3)) < 1e-10
    assert abs(exact.objective_ - cut.objective) < 1e-10 and exact.duality_gap_ < 1e-12
    # controls: a short truncation, and the same points in two pairs
    low = solve(features(X, 2), Y, p=4 / 3, alpha=ALPHA)
    assert np.abs(features(TEST, 2) @ low.weights - exact.predict(TEST)).max() > 0.01
    assert abs(np.exp(X[0] @ X[1]) * np.exp(X[2] @ X[3]) - value) > 0.1


def test_absolute_loss():
    # checks: thm-coefficients, E5.5
    s = solve(A, Y, loss="absolute", p=3, alpha=ALPHA)
    np.testing.assert_allclose(s.dual_coef, [0.603294, -0.281039, 0.247622, 0.430115, -1], atol=1e-6)
    assert abs(s.objective - 1.27280761485) < 1e-6
    assert np.abs(s.dual_coef).max() <= 1
    residual = Y - A @ s.weights
    assert np.abs(residual[:4]).max() < 1e-9 and residual[4] < -0.7     # kinks, and a slope of -1
    # control: the coefficients of the squared loss, the residuals, are not feasible for large targets
    far = solve(A, 5 * Y, p=3, alpha=ALPHA)
    assert np.isinf(certify(A, 5 * Y, far.weights, far.dual_coef, loss="absolute", p=3, alpha=ALPHA))


def norm_penalty(strength, p):
    """The minimiser of the loss plus strength * norm, through the problem with the same solution."""
    def dual_norm(alpha):
        return np.linalg.norm(A.T @ solve(A, Y, p=p, alpha=alpha).dual_coef, p / (p - 1))

    alpha = optimize.brentq(lambda a: dual_norm(a) - strength, 1e-2, 1e6, rtol=1e-12)
    return solve(A, Y, p=p, alpha=alpha).weights


def test_threshold_of_the_zero_function():
    # checks: thm-coefficients, E5.7
    p = 3
    threshold = np.linalg.norm(A.T @ Y, p / (p - 1))
    assert abs(threshold - 1.19359996625) < 1e-9

    def penalised(v, strength):
        return 0.5 * ((A @ v - Y) ** 2).sum() + strength * np.linalg.norm(v, p)

    zero = 0.5 * Y @ Y
    v = norm_penalty(0.97 * threshold, p)
    assert abs(np.linalg.norm(v, p) - 0.014388278694606) < 1e-6
    assert penalised(v, 0.97 * threshold) < zero - 1e-4
    # just over the threshold y itself is a feasible dual point, and its dual objective is that of the zero function
    assert np.linalg.norm(A.T @ Y, p / (p - 1)) <= 1.01 * threshold and Y @ Y - Y @ Y / 2 == zero
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2, 1):
        assert all(penalised(size * (v + 0.01 * rng.standard_normal(len(v))), 1.01 * threshold) > zero
                   for _ in range(20))


@pytest.mark.parametrize("p, excess", [(1.5, 0.0465180), (2, 0), (3, 0.0618182), (4, 0.1362859)])
def test_combinations_of_kernel_sections_are_not_optimal(p, excess):
    # checks: thm-lp-solution, E5.12
    def slope(c):
        v = A.T @ c
        return A @ (A.T @ (A @ v - Y) + ALPHA * np.sign(v) * np.abs(v) ** (p - 1))

    K = A @ A.T
    start = np.linalg.solve(K + ALPHA * np.eye(5), Y)
    ansatz = optimize.minimize(lambda c: objective(A.T @ c, p), start, jac=slope, method="BFGS", options={"gtol": 1e-9})
    assert abs(ansatz.fun - solve(A, Y, p=p, alpha=ALPHA).objective - excess) < 1e-6


@pytest.mark.parametrize("p, change", [(1.5, 0.347306), (2, 0), (3, 0.123248)])
def test_kernel_does_not_determine_the_solution(p, change):
    # checks: E5.13
    rotation = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    B, B_test = features(X @ rotation), features(TEST @ rotation)
    assert np.abs(A @ A.T - B @ B.T).max() < 1e-13 and np.abs(A_TEST @ A.T - B_test @ B.T).max() < 1e-13
    first, second = (solve(F, Y, p=p, alpha=ALPHA) for F in (A, B))
    assert abs(np.abs(A_TEST @ first.weights - B_test @ second.weights).max() - change) < 1e-6


# ------------------------------------------------------------------------- certificates

@pytest.mark.parametrize("name", LOSSES)
def test_conjugates(name):
    loss, f = losses.get(name), np.linspace(-60, 60, 240_001)
    for y in (-1.0, 1.0):
        for s in (-0.9, -0.3, -1e-3, 1e-3, 0.4, 1.0):
            best = (s * f - loss.value(f, y)).max()
            conjugate = float(loss.conjugate(np.array(s), np.array(y)))
            if np.isinf(conjugate):      # the supremum is at an end of the grid
                assert best > 59 * abs(s)
            else:
                assert abs(conjugate - best) < 1e-5
        points = np.array([-2.0, -0.5, 0.2, 1.7])
        slope = loss.gradient(points, y)
        np.testing.assert_allclose(loss.defect(points, slope, y), 0, atol=1e-15)
        numeric = (loss.value(points + 1e-6, y) - loss.value(points - 1e-6, y)) / 2e-6
        np.testing.assert_allclose(slope, numeric, atol=1e-8)
        if loss.smooth:
            np.testing.assert_allclose(loss.conjugate_gradient(slope, y), points, atol=1e-12)
            np.testing.assert_allclose(loss.conjugate_hessian(slope, y) * loss.hessian(points, y), 1, atol=1e-12)


@given(seed=st.integers(0, 10_000), p=st.floats(1.1, 8), alpha=st.floats(0.01, 10), name=st.sampled_from(LOSSES),
       n=st.integers(1, 8), d=st.integers(1, 12))
def test_gap_is_a_certificate(seed, p, alpha, name, n, d):
    # checks: thm-finite-dual
    rng = np.random.default_rng(seed)
    B, loss = rng.standard_normal((n, d)), losses.get(name)
    y = targets(name, rng.standard_normal(n))
    s = solve(B, y, loss=name, p=p, alpha=alpha)
    assert 0 <= s.duality_gap <= 1e-10 * s.objective
    assert abs(s.objective - s.dual_objective) <= s.duality_gap + 1e-12 * (1 + s.objective)

    def primal(v):
        return loss.value(B @ v, y).sum() + alpha / p * (np.abs(v) ** p).sum()

    # of any other pair the gap is the difference of the objectives, so it bounds the error
    v = s.weights + 0.1 * rng.standard_normal(d)
    c = s.dual_coef * rng.uniform(0, 1, n)
    gap = certify(B, y, v, c, loss=name, p=p, alpha=alpha)
    assert gap >= primal(v) - s.objective - 1e-9 >= -2e-9
    r = p / (p - 1)
    dual = -loss.conjugate(-c, y).sum() - alpha / r * (np.abs(B.T @ c / alpha) ** r).sum()
    assert abs(gap - (primal(v) - dual)) < 1e-9 * (1 + primal(v) + abs(dual))


@pytest.mark.parametrize("p", [1.5, 3])
def test_agrees_with_another_solver(p):
    B = features(X, 5)

    def both(v):
        residual, size = B @ v - Y, np.abs(v)
        value = 0.5 * (residual @ residual) + ALPHA / p * (size**p).sum()
        return value, B.T @ residual + ALPHA * np.sign(v) * size ** (p - 1)

    theirs = optimize.minimize(both, np.zeros(B.shape[1]), jac=True, method="L-BFGS-B",
                               options={"maxiter": 1000, "ftol": 0, "gtol": 1e-9})
    assert -1e-14 < theirs.fun - solve(B, Y, p=p, alpha=ALPHA).objective < 1e-7


def test_two_is_kernel_ridge():
    # checks: thm-lp-solution
    kernel, at_test = np.exp(X @ X.T), np.exp(TEST @ X.T)
    ridge = KernelRidge(alpha=ALPHA, kernel="precomputed").fit(kernel, Y)
    model = BanachRegressor(p=2, alpha=ALPHA, features=MultinomialFeatures(30)).fit(X, Y)
    np.testing.assert_allclose(model.predict(TEST), ridge.predict(at_test), atol=1e-12)
    np.testing.assert_allclose(model.dual_coef_, ALPHA * ridge.dual_coef_, atol=1e-12)
    other = BanachRegressor(p=1.5, alpha=ALPHA, features=MultinomialFeatures(30)).fit(X, Y)
    assert np.abs(other.predict(TEST) - ridge.predict(at_test)).max() > 0.05


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("p", [1.05, 1.5, 2, 3, 10])
def test_more_points_than_features_and_equal_points(loss, p):
    rng = np.random.default_rng(1)
    few = rng.standard_normal((40, 6))
    twice = np.repeat(rng.standard_normal((15, 30)) / 5, 2, axis=0)
    for B in (few, twice):
        y = targets(loss, np.sin(3 * B[:, 0]) + 0.3 * rng.standard_normal(len(B)))
        s = solve(B, y, loss=loss, p=p, alpha=ALPHA)
        assert s.duality_gap <= 1e-10 * s.objective


def test_a_missed_tolerance_is_reported():
    for p, loss in ((1.5, "squared"), (3, "squared"), (1.5, "hinge"), (3, "absolute")):
        with pytest.warns(ConvergenceWarning, match="the duality gap is"):
            solve(A, targets(loss), loss=loss, p=p, alpha=ALPHA, max_iter=0)
        with pytest.warns(ConvergenceWarning, match="the duality gap is .* was asked for") as caught:
            s = solve(A, targets(loss), loss=loss, p=p, alpha=ALPHA, max_iter=1)
        assert f"{s.duality_gap:.3g}" in str(caught[0].message)
        assert s.duality_gap == certify(A, targets(loss), s.weights, s.dual_coef, loss=loss, p=p, alpha=ALPHA) > 1e-6
    with pytest.warns(ConvergenceWarning, match="the duality gap is"):
        TensorKernelRegressor(max_iter=1).fit(X, Y)
    with pytest.warns(ConvergenceWarning, match="1e-30 was asked for"):      # beyond double precision, at any time
        assert solve(A, Y, loss="absolute", p=1.5, alpha=ALPHA, tol=1e-30).iterations < 1000


@pytest.mark.parametrize("alpha", [1e-20, 1e-12, 1e-6])
def test_no_gap_below_the_rounding_of_predictions(alpha):
    """At a kink a prediction that is off by its last digit costs more than such small penalties."""
    B, y = np.random.default_rng(0).standard_normal((1, 9)), np.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        s = solve(B, y, loss="absolute", p=2, alpha=alpha)
    v, row = [Fraction(z) for z in s.weights], [Fraction(z) for z in B[0]]
    c, weight = Fraction(s.dual_coef[0]), Fraction(alpha)
    primal = abs(sum(a * b for a, b in zip(row, v, strict=True)) - 1) + weight / 2 * sum(z**2 for z in v)
    assert primal - (c - sum((z * c) ** 2 for z in row) / (2 * weight)) <= s.duality_gap


def test_no_gap_below_the_rounding_of_the_tensor_kernel():
    """Points close together, where the sums of kernel values cancel: the exact gap, with 60 digits."""
    points, alpha = 3 * (X[0] + 1e-3 * X), 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = TensorKernelRegressor(alpha=alpha).fit(points, Y)
    with mpmath.workdps(60):
        exact, c = [[mpmath.mpf(z) for z in point] for point in points], [mpmath.mpf(z) for z in model.dual_coef_]
        gap = mpmath.mpf(0)
        for i in range(5):
            f = sum(c[j] * c[k] * c[m] * mpmath.fprod(
                mpmath.hyp0f1(1, exact[i][a] * exact[j][a] * exact[k][a] * exact[m][a]) for a in range(2))
                for j, k, m in itertools.product(range(5), repeat=3)) / mpmath.mpf(alpha) ** 3
            gap += (f - Y[i] + c[i]) ** 2 / 2
    assert gap <= model.duality_gap_


def test_extreme_numbers_are_reported():
    with pytest.warns(ConvergenceWarning, match="too small for double precision"):
        solve(A, 1e-170 * Y, p=2, alpha=ALPHA)
    with pytest.warns(ConvergenceWarning, match="the duality gap is inf"):
        solve(A, 1e160 * Y, p=2, alpha=ALPHA)
    with pytest.warns(ConvergenceWarning, match="after .* linear systems"):     # a power of 100 overflows
        solve(np.random.default_rng(1).standard_normal((6, 9)), targets("hinge", np.arange(-3.0, 3)), loss="hinge",
              p=1.01, alpha=1e-6)
    near = X[0] + 1e-3 * X                  # at this size the four-point kernel cancels
    with pytest.warns(ConvergenceWarning, match="scale the points"):
        model = TensorKernelRegressor().fit(12 * near, Y)
    assert model.duality_gap_ > 1e-10 * model.objective_
    with pytest.raises(ValueError, match="overflows"):
        TensorKernelRegressor().fit(X, Y).predict(1e7 * X)
    with pytest.raises(ValueError, match="overflow"):
        BanachRegressor(features=MultinomialFeatures(30)).fit(X, Y).predict(1e12 * X)


def test_targets_that_are_all_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in (1.5, 2, 3):
            for loss in ("squared", "absolute"):
                s = solve(A, np.zeros(5), loss=loss, p=p, alpha=ALPHA)
                assert np.abs(s.weights).max() == 0 and s.duality_gap == 0


# ------------------------------------------------------------------------- input and estimators

@pytest.mark.parametrize("change, message", [
    ({"p": 1}, "1 < p < infinity"), ({"p": np.inf}, "1 < p < infinity"), ({"p": np.nan}, "1 < p < infinity"),
    ({"alpha": 0}, "alpha has to be"), ({"alpha": -1}, "alpha has to be"), ({"alpha": np.inf}, "alpha has to be"),
    ({"y": Y[:4]}, "one row of A"), ({"y": Y[:, None]}, "shape"), ({"A": A[0]}, "shape"),
    ({"y": [1, np.nan, 0, 0, 0]}, "NaN"), ({"A": np.full((5, 2), np.inf)}, "infinite"),
    ({"loss": "cubic"}, "choose one of 'squared'"), ({"loss": "hinge"}, "targets -1 and \\+1"),
])
def test_bad_input_is_refused(change, message):
    good = {"A": A, "y": Y, "p": 1.5, "alpha": ALPHA, "loss": "squared"}
    arguments = good | change
    with pytest.raises(ValueError, match=message):
        solve(arguments.pop("A"), arguments.pop("y"), **arguments)


def test_input_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="toarray"):
        solve(sparse.csr_matrix(A), Y, p=2, alpha=ALPHA)
    with pytest.raises(TypeError, match="complex"):
        solve(A + 0j, Y, p=2, alpha=ALPHA)
    with pytest.raises(ValueError, match="47,129,212,243,960 features at width d = 20"):
        BanachRegressor(features=MultinomialFeatures(30)).fit(np.zeros((5, 20)), Y)


def test_bad_estimators_are_refused():
    with pytest.raises(ValueError, match="BanachClassifier"):
        BanachRegressor(loss="hinge").fit(X, Y)
    with pytest.raises(ValueError, match="BanachRegressor"):
        BanachClassifier(loss="squared").fit(X, Y > 0)
    with pytest.raises(ValueError, match="feature map"):
        BanachRegressor(features="monomials").fit(X, Y)
    with pytest.raises(ValueError, match="OneVsRestClassifier"):
        BanachClassifier().fit(X, ["a", "b", "c", "a", "b"])
    with pytest.raises(ValueError, match="one class only"):
        BanachClassifier().fit(X, ["a"] * 5)
    with pytest.raises(ValueError, match="explicit features"):
        TensorKernelRegressor().fit(np.zeros((101, 1)), np.zeros(101))
    with pytest.raises(ValueError, match="overflows"):
        TensorKernelRegressor().fit(1000 * X, Y)
    with pytest.raises(ValueError, match="alpha"):
        TensorKernelRegressor(alpha=0).fit(X, Y)


def test_classifier():
    labels = np.where(Y > 0, "up", "down")
    model = BanachClassifier(p=3, alpha=ALPHA, features=MultinomialFeatures(10)).fit(X, labels)
    assert list(model.classes_) == ["down", "up"] and model.score(X, labels) == 0.8
    values, chances = model.decision_function(TEST), model.predict_proba(TEST)
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-15)
    np.testing.assert_allclose(np.log(chances[:, 1] / chances[:, 0]), values, atol=1e-12)
    assert list(model.predict(TEST)) == list(np.where(values > 0, "up", "down"))
    hinge = BanachClassifier(p=3, alpha=ALPHA, features=MultinomialFeatures(10), loss="hinge").fit(X, labels)
    assert not hasattr(hinge, "predict_proba")
    inside = hinge.dual_coef_ * np.sign(Y)
    assert inside.min() >= 0 and inside.max() <= 1


@pytest.mark.parametrize("estimator", [BanachRegressor(), BanachClassifier()], ids=repr)
def test_scikit_learn_conventions(estimator):
    check_estimator(estimator, on_skip=None)


def test_feature_maps_are_parameters():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (30, 2))
    points.setflags(write=False)
    y = np.sin(3 * points[:, 0])
    grid = {"banachregressor__features": [MultinomialFeatures(1), MultinomialFeatures(5)],
            "banachregressor__p": [1.5, 3]}
    search = GridSearchCV(make_pipeline(StandardScaler(), BanachRegressor()), grid, cv=3).fit(points, y)
    assert search.best_params_["banachregressor__features"] == MultinomialFeatures(5) and search.n_features_in_ == 2
    again = clone(search.best_estimator_).fit(points, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)).predict(points), search.predict(points))
