"""The noise is a function of its three arguments, and good enough to draw from."""

import torch

from engine.sampling_noise import gumbel_noise, random_words, row_keys


def words(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    return random_words(torch.from_numpy(row_keys([(seed, position)])), vocab_size)[0]


def test_words_are_these_on_every_device_and_in_every_version() -> None:
    assert row_keys([(42, 7), (-1, 0)]).tolist() == [
        [369503596, 322561280],
        [1572997799, 2996990263],
    ]
    assert words(42, 7, 4).tolist() == [2718215238, 3673830014, 2281435897, 2742682878]


def test_words_depend_neither_on_other_rows_nor_on_the_size_of_the_vocabulary() -> None:
    keys = torch.from_numpy(row_keys([(5, 1), (6, 2), (7, 3)]))
    assert torch.equal(random_words(keys, 100)[1, :30], words(6, 2, 30))


def test_words_fill_their_range_evenly() -> None:
    drawn = words(1, 2, 1 << 16)
    assert 0 <= drawn.min() < 1 << 18
    assert (1 << 32) - (1 << 18) < drawn.max() < 1 << 32
    counts = torch.bincount(drawn >> 24, minlength=256).double()
    # 255 degrees of freedom: the statistic's mean is 255, its standard deviation 22.6.
    statistic = ((counts - 256) ** 2 / 256).sum().item()
    assert 150 < statistic < 360


def test_neighbouring_positions_and_seeds_are_uncorrelated() -> None:
    rows = [(seed, position) for seed in (0, 1, 2) for position in (0, 1, 2)]
    uniform = random_words(torch.from_numpy(row_keys(rows)), 20_000).double()
    correlations = torch.corrcoef(uniform) - torch.eye(9)
    assert correlations.abs().max() < 5 / 20_000**0.5


def test_noise_has_the_mean_and_the_spread_of_a_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.from_numpy(row_keys([(3, 4)])), 200_000)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - 1.6449) < 0.05
