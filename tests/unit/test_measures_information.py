"""Entropy and information of choices, against loops, scikit-like counts and closed forms."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from gatewise.training.measures.information import (
    binned_information,
    entropy,
    joint_counts,
    layer_information,
    miller_madow,
    mutual_information,
    path_entropy,
    redundancy,
    set_labels,
    shuffled_layer_information,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choices(layers: int, tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randint(experts, (layers, tokens), generator=generator(seed))


def slow_entropy(values: list[object]) -> float:
    total = len(values)
    return -sum(n / total * math.log(n / total) for n in Counter(values).values())


def slow_information(a: list[object], b: list[object]) -> float:
    pairs: list[object] = list(zip(a, b, strict=True))
    return slow_entropy(a) + slow_entropy(b) - slow_entropy(pairs)


def test_the_entropy_of_n_equal_counts_is_the_log_of_n() -> None:
    assert float(entropy(torch.full((7,), 3))) == pytest.approx(math.log(7), abs=1e-12)
    assert float(entropy(torch.tensor([5, 0, 0]))) == 0
    assert float(entropy(torch.zeros(3))) == 0


def test_joint_counts_are_those_of_a_loop() -> None:
    a_T, b_T = choices(2, 50, 3)
    joint = joint_counts(a_T, b_T, (3, 4))
    for x in range(3):
        for y in range(4):
            assert joint[x, y] == sum(
                (i, j) == (x, y) for i, j in zip(a_T.tolist(), b_T.tolist(), strict=True)
            )


def test_a_copy_tells_everything_and_a_product_nothing() -> None:
    copy = torch.diag(torch.tensor([2.0, 3.0, 5.0]))
    assert float(mutual_information(copy)) == pytest.approx(float(entropy(copy.sum(0))), abs=1e-12)
    product = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))
    assert float(mutual_information(product)) == pytest.approx(0, abs=1e-12)


def test_layers_are_compared_as_in_a_loop_over_tokens() -> None:
    top_LT = choices(3, 40, 4)
    value_LL = layer_information(top_LT, 4)
    rows = top_LT.tolist()
    for i in range(3):
        for j in range(3):
            assert float(value_LL[i, j]) == pytest.approx(slow_information(rows[i], rows[j]))


def test_the_corrections_remove_what_chance_alone_gives() -> None:
    """Independent choices: the plug-in value is near (E - 1)^2 / 2T, both corrections near 0."""
    experts, tokens = 8, 1000
    top_LT = choices(2, tokens, experts)
    plain = float(layer_information(top_LT, experts)[0, 1])
    bias = (experts - 1) ** 2 / (2 * tokens)
    assert plain == pytest.approx(bias, rel=0.4)
    shuffled_LL = shuffled_layer_information(top_LT, experts, generator=generator(), shuffles=8)
    assert float(shuffled_LL[0, 1]) == pytest.approx(bias, rel=0.3)
    assert abs(float(miller_madow(joint_counts(*top_LT, (experts, experts))))) < 0.4 * bias


def test_shuffling_one_layer_of_a_pair_forgets_a_copy() -> None:
    top_LT = choices(1, 500, 4).repeat(2, 1)
    shuffled_LL = shuffled_layer_information(top_LT, 4, generator=generator())
    assert float(layer_information(top_LT, 4)[0, 1]) > 1.3
    assert float(shuffled_LL.max()) < 0.05  # the diagonal too


@pytest.mark.parametrize("bins", [100, 5])
def test_the_binned_variant_is_that_of_a_loop_within_each_token(bins: int) -> None:
    score_LTE = torch.rand(3, 11, 6, generator=generator()).softmax(-1)
    value_LL = binned_information(score_LTE, bins=bins)
    for i in range(3):
        for j in range(3):
            want = 0.0
            for t in range(11):
                a, b = ([int(s * bins) for s in score_LTE[x, t].tolist()] for x in (i, j))
                want += slow_information(list(a), list(b)) / 11
            assert float(value_LL[i, j]) == pytest.approx(want, abs=1e-9)


def test_the_binned_variant_sees_nothing_in_flat_scores() -> None:
    """All in one bin: 0, although the layers choose alike; so the choices must be looked at too."""
    score_LTE = torch.rand(1, 20, 8, generator=generator()) * 0.0002 + 0.125
    assert float(binned_information(score_LTE.repeat(2, 1, 1)).abs().max()) == 0
    one_hot_LTE = torch.eye(4)[choices(1, 20, 4)].repeat(2, 1, 1)
    want = slow_entropy([0, 0, 0, 1])
    assert float(binned_information(one_hot_LTE)[0, 1]) == pytest.approx(want)


def test_paths_are_counted_as_tuples_are() -> None:
    top_LT = choices(3, 60, 4)
    paths: list[object] = list(zip(*top_LT.tolist(), strict=True))
    value = path_entropy(top_LT, 4, generator=generator())
    assert value.entropy == pytest.approx(slow_entropy(paths))
    assert value.distinct == len(set(paths))
    assert value.corrected == pytest.approx(value.entropy + (value.distinct - 1) / 120)
    assert value.ceiling == pytest.approx(math.log(60))


def test_layers_that_copy_the_first_have_few_paths_and_shuffled_ones_many() -> None:
    top_LT = choices(1, 4000, 4).repeat(3, 1)
    value = path_entropy(top_LT, 4, generator=generator())
    assert value.distinct == 4
    assert value.entropy == pytest.approx(math.log(4), abs=0.01)
    assert value.ceiling == pytest.approx(math.log(64))
    assert value.shuffled == pytest.approx(math.log(64), abs=0.02)


def slow_accuracy(a: list[int], b: list[int]) -> float:
    best = {x: Counter(y for z, y in zip(a, b, strict=True) if z == x).most_common(1) for x in a}
    return sum(best[x][0][1] for x in set(a)) / len(a)


def test_redundancy_is_that_of_a_loop() -> None:
    label_LT = choices(3, 70, 4)
    label_LT[2] = torch.where(torch.arange(70) % 3 > 0, label_LT[1], label_LT[2])
    value = redundancy(label_LT)
    rows = label_LT.tolist()
    for i in range(2):
        joint = joint_counts(label_LT[i], label_LT[i + 1], (4, 4))
        want = float(miller_madow(joint))
        assert value.information_bits[i] == pytest.approx(want / math.log(2))
        assert value.share[i] == pytest.approx(want / slow_entropy(rows[i + 1]))
        assert value.markov_accuracy[i] == pytest.approx(slow_accuracy(rows[i], rows[i + 1]))
    one = [sum(slow_accuracy(rows[i], rows[j]) for j in range(3)) / 3 for i in range(3)]
    assert value.best_layer == one.index(max(one))
    assert value.one_layer_accuracy == pytest.approx(max(one))
    commonest = [Counter(column).most_common(1)[0][1] / 3 for column in zip(*rows, strict=True)]
    assert value.agreement == pytest.approx(sum(commonest) / 70)


def test_relabelled_copies_are_redundant_but_do_not_agree_by_index() -> None:
    first_T = choices(1, 200, 4)[0]
    value = redundancy(torch.stack((first_T, (first_T + 1) % 4)))
    assert value.markov_accuracy == (1.0,)
    assert value.one_layer_accuracy == 1.0
    assert value.share[0] == pytest.approx(1, abs=0.05)
    assert value.agreement == 0.5  # each index is one layer's alone


def test_labels_of_sets_ignore_the_order_of_the_choices() -> None:
    expert_LTK = torch.tensor([[[0, 1], [1, 0], [2, 3]], [[3, 2], [0, 2], [1, 0]]])
    label_LT = set_labels(expert_LTK)
    assert label_LT[0, 0] == label_LT[0, 1] == label_LT[1, 2]
    assert label_LT[0, 2] == label_LT[1, 0]
    assert len(set(label_LT.flatten().tolist())) == 3
