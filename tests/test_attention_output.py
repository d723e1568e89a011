"""The output of attention as an element of a space: norms, the problem it solves, limits, and its poles.

The reference numbers belong to one head of width 2 on nine queries and seven keys, and to the features up to degree 24.
"""

import math
from fractions import Fraction

import pytest
import torch

from kernelbook import attend, kernels
from kernelbook.features import MultinomialFeatures
from kernelbook.representer import tensor_kernel
from kernelbook.spaces import RKBSPair, conjugate, duality_map, lp_norm


def tokens(rows):
    return torch.tensor(rows, dtype=torch.float64) / 2**23


TARGET = tokens([
    [5568917, 1547349, -6346971, 7717357], [6077708, -2945853, -1171115, -2864763],
    [3525763, -1003014, 8125009, -4280638], [-5920655, 8179475, -8219824, -3611011],
    [5595343, 2146470, -1791733, 5069581], [3869973, -6613814, -6288455, 2016331],
    [2278458, -6216936, 2840339, 8355727], [-3205962, 4334759, -578992, 3565487],
    [-5702526, 6540303, -3481559, 1649926]])
SOURCE = tokens([
    [-7800058, -8111347, -237800, -6934017], [-5274543, -6783297, 1312060, -8238981],
    [-5250340, 190331, -305812, 935644], [7269151, -4293544, 5088479, -5995013],
    [5652753, -7627282, -891826, 7869488], [-7221206, -5497258, -8169488, 1740113],
    [-5455005, 4774184, -2207874, -6851911]])
W_Q = tokens([[5994947, -3854292, -1389021, -4599825], [-5827083, 2865922, 7527890, 4852068]])
W_K = tokens([[6420977, 7521283, 3568930, -139790], [-954659, -8099518, -550321, -4208318]])
W_V = tokens([[6953515, -7619377, 5572064, -7147660], [5135872, 3359505, 1934827, 1243417],
              [7300503, -7858250, 505684, -3734387]])
Q, K, V = TARGET @ W_Q.T, SOURCE @ W_K.T, SOURCE @ W_V.T
FEATURES = MultinomialFeatures(degree=24, scale=True)
PHI, PSI = FEATURES(Q), FEATURES(K)
N = attend(Q, K, V, "edp", normaliser="none")
KEYS_WITH_KEYS = kernels.EDP()(K, K)

NORMS = {1.5: [10.078166820515541, 17.694454319169413, 7.152551994812826],
         2.0: [6.336955240151451, 10.565529938191137, 4.554035487055559],
         3.0: [4.331706512382103, 6.658750298477323, 3.190423886818543],
         4.0: [3.75096973226714, 5.434475021150212, 2.8086837424129563]}


def close(a, b, tolerance):
    return (torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)).abs().max() < tolerance


def test_numerator_and_normaliser_are_read_from_one_memory():
    # checks: prp-membership
    assert close(PHI @ (PSI.T @ V), N, 1e-12)
    assert close(N[0], [1.3397027322081028, -2.14875391830446, 1.150633204854533], 1e-13)
    Z = PHI @ PSI.sum(0)
    assert close(Z[[0, 8]], [5.567823706965174, 15.868615877123638], 1e-12)
    assert close(N / Z[:, None], attend(Q, K, V, "edp"), 1e-14)
    wrong = PSI / torch.lgamma(FEATURES.exponents(2) + 1.0).sum(1).div(2).exp()       # the control: 1/α! on one side
    assert not close(PHI @ (wrong.T @ V), N, 0.05)


def test_queries_on_a_line_do_not_see_the_whole_memory():
    """Keys that differ across the line have another memory: seen by queries in the plane, not by those on the line."""
    # checks: prp-membership
    moved = K + torch.tensor([0.0, 0.5])
    assert not close(FEATURES(moved).T @ V, PSI.T @ V, 0.1)
    line = Q * torch.tensor([1.0, 0.0])
    for queries, same in ((line, True), (Q, False)):
        outputs = [attend(queries, keys, V, "edp", normaliser="none") for keys in (K, moved)]
        assert close(*outputs, 1e-13) == same


@pytest.mark.parametrize("p", NORMS)
def test_norms_of_the_numerator(p):
    # checks: prp-output-norm, E7.2
    assert close(lp_norm((PSI.T @ V).T, p), NORMS[p], 1e-11)
    bound = lp_norm(PHI, conjugate(p))[:, None] * lp_norm((PSI.T @ V).T, p)
    assert (N.abs() <= bound).all()


def test_norms_without_features():
    """The matrix of keys with keys for p = 2, the four-point kernel for p = 4; queries with queries differ."""
    # checks: prp-output-norm, E7.2
    assert close((V.T @ KEYS_WITH_KEYS @ V).diagonal().sqrt(), NORMS[2.0], 1e-11)
    w = (K / 2**0.25).numpy()
    four = torch.from_numpy(tensor_kernel(w[:, None, None, None], w[:, None, None], w[:, None], w))
    assert close(torch.einsum("abij,ac,bc,ic,jc->c", four, V, V, V, V) ** 0.25, NORMS[4.0], 1e-11)
    queries = kernels.EDP()(Q[:7], Q[:7])
    wrong = (V.T @ queries @ V).diagonal().sqrt()
    assert close(wrong, [3.068845081903233, 4.339124170074245, 2.641097453349314], 1e-11)
    assert (wrong - torch.tensor(NORMS[2.0])).abs().min() > 1


@pytest.mark.parametrize(("p", "at_first_key", "value"), [
    (1.5, 74.02350253145451, -50.78472323107021),
    (2.0, 26.411063872010523, -20.07850085784133),
    (3.0, 10.151495408474826, -9.381840654706757)])
def test_the_missing_link(p, at_first_key, value):
    # checks: thm-missing-link
    memory, v = PSI.T @ V[:, 0], V[:, 0]
    u = duality_map(memory, p)

    def objective(u):
        return lp_norm(u, conjugate(p)) ** 2 / 2 - (u @ PSI.T) @ v

    assert close((PSI @ u)[0], at_first_key, 1e-10)
    assert close(objective(u), value, 1e-10) and close(value, -NORMS[p][0] ** 2 / 2, 1e-10)
    assert close(v @ (PSI @ u), NORMS[p][0] ** 2, 1e-9)
    assert close(PHI @ duality_map(u, conjugate(p)), N[:, 0], 1e-11)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(200, len(u), generator=generator, dtype=torch.float64) / (1 + FEATURES.degrees(2)) ** 2
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        assert (objective(u + size * change) > objective(u)).all()
    assert close(PHI @ u, N[:, 0], 1e-11) == (p == 2.0)                 # the control: without the duality map


def test_ridge_regression_becomes_attention():
    # checks: prp-ridge-limit, E7.4
    cross, identity = kernels.EDP()(Q, K), torch.eye(7, dtype=torch.float64)
    expected = [0.43456070603634167, 0.04506859485178083, 0.004523646265582215, 0.00045253318329763204]
    errors = []
    for strength in (1e3, 1e4, 1e5, 1e6):
        scaled = strength * cross @ torch.linalg.solve(KEYS_WITH_KEYS + strength * identity, V)
        errors.append((scaled - N).abs().max().item())
    assert errors == pytest.approx(expected, rel=1e-6)
    slopes = [math.log10(b / a) for a, b in zip(errors, errors[1:], strict=False)]
    assert max(abs(slope + 1) for slope in slopes) < 0.03
    interpolant = cross @ torch.linalg.solve(KEYS_WITH_KEYS, V)
    assert close((interpolant - N).abs().max(), 11.099446966168768, 1e-6)


def test_a_gradient_step_is_attention():
    # checks: prp-ridge-limit, E7.4
    eta, u = 0.1, torch.zeros(PSI.shape[1], 3, dtype=torch.float64, requires_grad=True)
    (0.5 * (V - PSI @ u).square().sum()).backward()
    assert close(PHI @ (-eta * u.grad), eta * N, 1e-13)

    W = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (0.5 * (V - K @ W.T).square().sum()).backward()
    linear = attend(Q, K, V, kernels.Linear(scale=1.0), normaliser="none")
    assert close(Q @ (-eta * W.grad).T, eta * linear, 1e-13)


def sigmoid_series(separation, terms):
    """Exact Taylor coefficients at 0 of 1 / (1 + exp(-separation x)), from s' = separation (s - s²)."""
    a = [Fraction(1, 2)]
    for n in range(terms - 1):
        square = sum(a[i] * a[n - i] for i in range(n + 1))
        a.append(separation * (a[n] - square) / (n + 1))
    return a


def test_the_output_of_two_keys_has_poles():
    # checks: thm-not-in-space, E7.5
    a = sigmoid_series(2, 102)
    for n in (41, 61, 99):
        assert abs(math.sqrt(a[n] / -a[n + 2]) - math.pi / 2) < 1e-10
    scaled = [abs(float(a[n])) * math.exp(math.lgamma(n + 1) / 2) for n in (1, 11, 21, 31, 41)]
    assert scaled == pytest.approx([0.5, 27.998847407505714, 346365.5270285802, 48047945187.24354,
                                    3.351040118123433e+16], rel=1e-9)
    section = [math.exp(-math.lgamma(n + 1) / 2) for n in (1, 11, 21, 31, 41)]          # the control
    assert section == pytest.approx([1, 0.00015827857841616382, 1.3990332756368328e-10, 1.1027805953831061e-17,
                                     1.728962355617497e-25], rel=1e-9)

    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None]
    keys, values = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    near = 0.5 * x                                                       # inside the disc of convergence
    series = sum(float(c) * near**n for n, c in enumerate(a))
    assert close(series, attend(near, keys, values, "edp"), 1e-13)


def test_fixed_keys():
    """Divided by its own normaliser, the space holds the output with the norm of the numerator."""
    # checks: prp-out-fixed
    six = MultinomialFeatures(degree=2, scale=True)                      # six features, nine queries
    Z = attend(Q, K, torch.ones(7, 1, dtype=torch.float64), six.kernel, normaliser="none")
    plain, fixed = RKBSPair(six(Q), six(K), 1.5), RKBSPair(six(Q) / Z, six(K), 1.5)
    o, numerator = attend(Q, K, V, six.kernel), six.kernel(Q, K) @ V
    assert close(fixed.norm_x(o.T), plain.norm_x(numerator.T), 1e-9)
    assert close(fixed.norm_x(torch.ones(9, dtype=torch.float64)), plain.norm_x(Z[:, 0]), 1e-9)
    with pytest.raises(ValueError, match="not in the space"):
        plain.norm_x(o.T)
