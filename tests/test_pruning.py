"""The theory on a network's own attention, and both with heads left out: by path inputs, and by the definitions."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from kernelbook import data, results, tasks
from kernelbook.paths import (
    PathNetworkConfig,
    gp_limit,
    head_scores,
    path_diagonal,
    path_kernels,
    paths_through,
    posterior,
    predict,
    prune_heads,
    solve_order_parameters,
)
from kernelbook.paths.one_shot import episodes
from kernelbook.paths.pruning import (
    PathEpisodes,
    accuracy,
    choose_theory,
    examine,
    magnitude_scores,
    output_scores,
    path_episodes,
    pruned_networks,
    pruned_theories,
    random_order,
    removal_order,
    theory_coefficients,
)

HEADS = (3, 2)


@pytest.fixture(scope="module")
def setting():
    """A network of untrained attention, and episodes of digits as it sees them."""
    torch.manual_seed(1)
    network = PathNetworkConfig(192, heads="3,2", width="5,7,4", qk_width=6).build().double()
    images = data.load_images("digits")
    whole = {name: episodes(split, count, generator=torch.Generator().manual_seed(seed))
             for name, split, count, seed in (("train", images.train, 40, 0), ("valid", images.valid, 60, 1),
                                              ("test", images.test, 70, 2))}
    seen = {name: path_episodes(network, each, batch=32) for name, each in whole.items()}
    return network, whole, seen


def outputs(coefficients, part):
    return torch.einsum("...ci,cpi->...p", coefficients, part.inputs)


def solved(part, **changes):
    given = {"heads": HEADS, "widths": (20,) * 3, "variances": (1,) * 4, "temperature": 0.1} | changes
    return solve_order_parameters(path_kernels(part.inputs), part.labels, **given)


# ------------------------------------------------------------------------- predictors as linear maps

def test_the_network_without_heads_is_its_forward_pass_without_them(setting):
    network, whole, seen = setting
    ways = [[], [(0, 2)], [(0, 0), (0, 1), (1, 1)]]
    with torch.no_grad():
        wanted = torch.stack([network(whole["test"].tokens.double(), way) for way in ways])
    torch.testing.assert_close(outputs(pruned_networks(network, ways), seen["test"]), wanted, rtol=1e-9, atol=1e-11)
    right = (wanted * whole["test"].labels > 0).double().mean(1)
    assert torch.equal(accuracy(pruned_networks(network, ways), seen["test"]), right) and len(set(right.tolist())) > 1
    with pytest.raises(ValueError, match="all 2 heads of layer 1"):
        pruned_networks(network, [[(1, 0), (1, 1)]])


def test_the_theory_without_heads_is_the_posterior_of_what_is_left(setting):
    _, _, seen = setting
    train, test = seen["train"], seen["test"]
    solution = solved(train)
    cross, diagonal = path_kernels(test.inputs, train.inputs), path_diagonal(test.inputs)
    ways = [[], [(1, 0)], [(0, 0), (0, 1)]]
    found = outputs(pruned_theories(solution, train, ways), test)
    torch.testing.assert_close(found[0], predict(solution, cross, diagonal).mean, rtol=1e-9, atol=1e-10)
    for f, way in zip(found, ways, strict=True):
        U = prune_heads(solution.U[0], HEADS, way)
        mean = posterior(U, solution.kernels, train.labels, cross, diagonal, temperature=0.1).mean
        torch.testing.assert_close(f, mean, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="no path is left"):
        pruned_theories(solution, train, [[(1, 0), (1, 1)]])
    with pytest.raises(ValueError, match="head 3 of layer 0 is out of range"):
        pruned_theories(solution, train, [[(0, 3)]])
    with pytest.raises(ValueError, match="not positive definite"):
        theory_coefficients(-torch.eye(6).double(), solution.kernels, train, temperature=1e-3)


def test_an_output_of_zero_is_not_right():
    part = PathEpisodes(torch.ones(1, 4, 1).double(), torch.tensor([1.0, 1, -1, 1]).double())
    assert accuracy(torch.tensor([[[0.0]], [[1.0]], [[-1.0]]]).double(), part).tolist() == [0, 0.75, 0.25]


# ------------------------------------------------------------------------- the choice of width and temperature

def test_the_choice_is_by_validation_accuracy_then_loss(setting):
    _, _, seen = setting
    train, valid, events = seen["train"], seen["valid"], []
    temperatures = (0.03, 0.3)
    choice = choose_theory(train, valid, heads=HEADS, widths=(5, 50, math.inf), temperatures=temperatures,
                           report=events.append)
    assert [(p.width, p.temperature) for p in choice.grid] == [(N, T) for N in (5, 50, math.inf) for T in temperatures]
    assert [(e["done"], e["of"], e["accuracy"]) for e in events] == [(i, 6, p.accuracy)
                                                                     for i, p in enumerate(choice.grid, 1)]
    for p in choice.grid:
        if p.width == math.inf:
            own = gp_limit(path_kernels(train.inputs), train.labels, heads=HEADS, variances=(1,) * 4,
                           temperature=p.temperature)
        else:
            own = solved(train, widths=(p.width,) * 3, temperature=p.temperature)
        torch.testing.assert_close(p.solution.U[0], own.U[0], rtol=1e-4, atol=1e-4)
        f = predict(own, path_kernels(valid.inputs, train.inputs), path_diagonal(valid.inputs)).mean
        assert p.accuracy == (f * valid.labels > 0).double().mean()
        assert p.loss == pytest.approx((f - valid.labels).square().mean().item(), rel=1e-3)

    def made(*points):
        return replace(choice, grid=tuple(
            replace(p, width=N, accuracy=a, loss=v, solution=replace(p.solution, converged=c))
            for p, (N, a, v, c) in zip(choice.grid, points, strict=False)))

    tie = made((5, 0.8, 0.5, True), (5, 0.9, 0.7, True), (50, 0.9, 0.6, True), (50, 0.95, 0.1, False),
               (100, 0.99, 0.1, False), (100, 0.99, 0.1, False))
    assert tie.best is tie.grid[2] and tie.best_of_each_width == (tie.grid[1], tie.grid[2])


def test_what_did_not_converge_is_not_chosen(setting):
    _, _, seen = setting
    with pytest.warns(ConvergenceWarning), pytest.raises(RuntimeError, match="none of the 1 solutions"):
        choose_theory(seen["train"], seen["valid"], heads=HEADS, widths=(20,), temperatures=(0.1,), tol=1e-300)
    for change, words in (({"heads": (3,)}, "make 3 paths, but training and validation have .* 6 and 6"),
                          ({"widths": ()}, "at least one width"), ({"temperatures": (0.0,)}, "temperature")):
        with pytest.raises(ValueError, match=words):
            choose_theory(seen["train"], seen["valid"], **{"heads": HEADS} | change)


# ------------------------------------------------------------------------- scores and orders

def test_magnitude_is_of_the_numbers_that_are_trained():
    torch.manual_seed(0)
    network = PathNetworkConfig(192, heads="3,2", width="40,70,50", qk_width=2).build()
    first = torch.cat(magnitude_scores(network))
    assert first.tolist() == pytest.approx([1] * 5, abs=0.05)               # whatever the widths and numbers of heads
    network.weights[1].data[2] *= 3
    changed = torch.cat(magnitude_scores(network))
    assert (changed / first).tolist() == pytest.approx([1, 1, 3, 1, 1])
    V = network.weights[2].data[1].double()
    assert changed[4].item() == pytest.approx(V.norm().item() / math.sqrt(50 * 70))


def test_the_output_score_is_what_changes_without_the_head(setting):
    network, whole, seen = setting
    with torch.no_grad():
        full, changes = network(whole["test"].tokens.double()), []
        for layer, count in enumerate(HEADS):
            for head in range(count):
                kept = network.weights[layer + 1].data[head].clone()
                network.weights[layer + 1].data[head] = 0
                changes.append((full - network(whole["test"].tokens.double())).square().mean().sqrt().item())
                network.weights[layer + 1].data[head] = kept
    assert torch.cat(output_scores(network, seen["test"])).tolist() == pytest.approx(changes, rel=1e-9)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_an_order_leaves_one_path(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 4, (count,), generator=generator).double() for count in heads]
    order = removal_order(scores)
    assert len(set(order)) == len(order) == sum(heads) - len(heads)
    left = torch.ones(math.prod(heads), dtype=torch.bool)
    for layer, head in order:
        left &= ~paths_through(heads, layer, head)
    assert left.sum() == 1
    values = [scores[layer][head].item() for layer, head in order]
    assert values == sorted(values)
    for layer, own in enumerate(scores):                                     # what is left of a layer is its best head
        last = set(range(len(own))) - {head for at, head in order if at == layer}
        assert own[last.pop()] == own.max()


def test_random_orders_are_all_alike():
    generator = torch.Generator().manual_seed(0)
    first = [random_order((2, 2), generator=generator) for _ in range(600)]
    counts = [sum(order[0] == head for order in first) for head in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert sum(counts) == 600 and all(110 < count < 190 for count in counts)
    assert all({layer for layer, _ in order} == {0, 1} for order in first)
    again = torch.Generator().manual_seed(0)
    assert first[:5] == [random_order((2, 2), generator=again) for _ in range(5)]


# ------------------------------------------------------------------------- all of it

def test_the_record_of_a_network_says_what_the_parts_say(setting):
    network, whole, seen = setting
    train, valid, test = (seen[name] for name in ("train", "valid", "test"))
    grid = {"widths": (5, 50), "temperatures": (0.03, 0.3)}
    found = examine(network, whole["train"], whole["valid"], iter([("test", whole["test"])]), **grid, random_orders=2,
                    components=7, generator=torch.Generator().manual_seed(3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["episodes"] == {"training": 40, "valid": 60, "test": 70} and found["heads"] == [3, 2]
    choice, limit = (choose_theory(train, valid, heads=HEADS, **{"temperatures": (0.03, 0.3), "widths": widths})
                     for widths in ((5, 50), (math.inf,)))
    assert (found["theory"]["width"], found["theory"]["temperature"]) == (choice.best.width, choice.best.temperature)
    assert found["infinite_width"]["temperature"] == limit.best.temperature
    assert [p["width"] for p in found["grid"]] == [None, None, 5, 5, 50, 50]
    assert [p["accuracy"] for p in found["grid"]] == pytest.approx([p.accuracy for p in (*limit.grid, *choice.grid)],
                                                                   rel=1e-5)
    U, draws = choice.best.solution.U[0], torch.Generator().manual_seed(3)
    for _ in range(2):
        random_order(HEADS, generator=draws)
    sizes = {"widths": (choice.best.width,) * 3, "temperature": choice.best.temperature, "tol": 1e-4}
    separate = path_kernels(train.inputs) * torch.eye(6)[:, :, None, None]
    apart = solve_order_parameters(separate, train.labels, heads=HEADS, variances=(1,) * 4, **sizes).U[0]
    assert (apart - apart.diag().diag()).abs().max() < 1e-3             # nothing ties the paths to each other
    controls = {
        "diagonal": U.diag().diag(), "levelled": U / (U.diag()[:, None] * U.diag()).sqrt(), "apart": apart,
        "permuted": solved(train._replace(labels=train.labels[torch.randperm(40, generator=draws)]), **sizes).U[0],
        "network_kernel": network.order_parameter()}
    for name, part in (("valid", valid), ("test", test)):
        def near(*coefficients):
            return pytest.approx(accuracy(torch.stack(coefficients), part).tolist(), rel=1e-5)      # noqa: B023

        assert [found[who]["accuracy"][name] for who in ("network", "theory", "infinite_width")] == near(
            pruned_networks(network, [[]])[0], choice.best.coefficients, limit.best.coefficients)
        for who, U in controls.items():
            tried = [theory_coefficients(U, path_kernels(train.inputs), train, temperature=T)
                     for T in grid["temperatures"]]
            best = max(range(2), key=lambda i: accuracy(tried[i], valid))
            assert found[who]["temperature"] == grid["temperatures"][best]
            assert [found[who]["accuracy"][name]] == near(tried[best])
        assert [p["accuracy"][name] for p in found["by_width"]] == near(
            *(p.coefficients for p in choice.best_of_each_width))
        for orders in found["orders"].values():
            for each in orders:
                ways = [list(map(tuple, each["order"][:count])) for count in range(4)]
                assert each["network"][name] == near(*pruned_networks(network, ways))
                assert each["theory"][name] == near(*pruned_theories(choice.best.solution, train, ways))
        assert [each["network"][name] for each in found["single"]] == near(
            *pruned_networks(network, [[tuple(each["head"])] for each in found["single"]]))
        assert [each["theory"][name] for each in found["single"]] == near(
            *pruned_theories(choice.best.solution, train, [[tuple(each["head"])] for each in found["single"]]))
    scores = {"theory": head_scores(choice.best.solution.U[0], HEADS), "magnitude": magnitude_scores(network),
              "output": output_scores(network, train)}
    for name, own in scores.items():
        (entry,) = found["orders"][name]
        assert entry["order"] == [list(head) for head in removal_order(own)]
        assert sum(entry["scores"], []) == pytest.approx(torch.cat(own).tolist(), rel=1e-4)
    assert len(found["orders"]["random"]) == 2 and len(found["single"]) == 5
    assert torch.tensor(found["network"]["U"]).shape == (6, 6) and len(found["theory"]["overlaps"]) == 7
    with pytest.raises(ValueError, match="two sets of episodes are called 'valid'"):
        examine(network, whole["train"], whole["valid"], [("valid", whole["test"])], **grid, random_orders=1,
                generator=torch.Generator())


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    import one_shot_theory

    return one_shot_theory


def test_the_record_of_a_run_needs_no_weights(tool, tmp_path, monkeypatch, capsys):
    record, folder = tasks.train("one-shot", preset="smoke", settings={"steps": 20}, out=tmp_path / "run")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["one_shot_theory.py", str(folder), "--training", "30", "--widths", "10",
                                          "--temperatures", "0.1", "0.5", *args])
        tool.main()
        return Path(capsys.readouterr().out.strip())

    with pytest.raises(SystemExit, match="there is no record of one-shot-digits-edp-smoke-steps20-seed0; keep it"):
        call()
    with pytest.raises(SystemExit, match="tested on 60 episodes, and at least 2,000 are wanted"):
        call("--out", str(tmp_path))
    path = call("--out", str(tmp_path), "--least", "60")
    assert path == tmp_path / f"{record.name}-theory.json" and str(tmp_path) not in path.read_text()
    assert '"kind":' in path.read_text()[:100]                           # so the table of records passes it over
    found = json.loads(path.read_text())
    assert found["run"] == record.name and found["metrics"] == record.metrics
    assert found["network"]["accuracy"]["test"] == pytest.approx(record.metrics["test_accuracy"], abs=1e-5)
    assert found["episodes"] == {"training": 30, "valid": 40, "test": 60} and len(found["orders"]["theory"][0]) == 4
    assert found["drawn"]["training"] == "one-shot/0/theory/30" and found["drawn"]["test"] == "one-shot/test/"
    assert found["provenance"]["command"].endswith(f"runs/{record.name} --training 30 --widths 10 "
                                                   "--temperatures 0.1 0.5")
    again = tool.theory_of(folder, training=30, least=60, widths=[10], temperatures=[0.1, 0.5])
    assert {k: v for k, v in again.items() if k != "provenance"} == \
        {k: v for k, v in found.items() if k != "provenance"}

    replace(record, metrics=record.metrics | {"test_accuracy": 0.1}).save(folder / "record.json")
    with pytest.raises(ValueError, match="did not come out as its record says: test_accuracy is"):
        tool.theory_of(folder, training=30, least=60, widths=[10], temperatures=[0.5])
    replace(record, data=record.data | {"fingerprint": "f"}).save(folder / "record.json")
    with pytest.raises(ValueError, match="trained on other images or episodes"):
        tool.theory_of(folder)
    replace(record, task="recall").save(folder / "record.json")
    with pytest.raises(ValueError, match="holds a run of recall"):
        tool.theory_of(folder)
    assert results.load(folder / "record.json").task == "recall"
