"""Sums of squares do not depend on how long a tensor is."""

import pytest
import torch

from gatewise.parallel.squares import square_sums


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 3 * 4096 + 7])
def test_rows_are_summed_as_in_fp64(length: int) -> None:
    x_RN = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    torch.testing.assert_close(square_sums(x_RN), x_RN.double().square().sum(1), rtol=1e-6, atol=0)


def test_sixteen_million_equal_numbers_are_all_counted() -> None:
    x_RN = torch.full((1, 1 << 24), 0.1)  # one by one in fp32, the sum would stop short
    wanted = float(x_RN[0, 0].double()) ** 2 * x_RN.shape[1]
    assert float(square_sums(x_RN)[0]) == pytest.approx(wanted, rel=1e-5)
    assert square_sums(x_RN.fill_(torch.inf)).isinf().all()
