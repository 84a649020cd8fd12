from __future__ import annotations

import hashlib

import pytest
import torch

from neuromf.sampling.noise import keyed_generator, noise_batch, sample_noise

SHAPE = (2, 4, 4, 4)


def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = noise_batch(0, range(6), SHAPE)
    parts = torch.cat([noise_batch(0, indices, SHAPE) for indices in ([0, 1], [2], [3, 4, 5])])
    assert torch.equal(whole, parts)
    assert torch.equal(noise_batch(0, [5, 1], SHAPE), whole[[5, 1]])


def test_the_noise_does_not_touch_or_feel_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample_noise(0, 3, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample_noise(0, 3, SHAPE), first)


def test_seeds_and_indices_give_different_noise():
    samples = [sample_noise(seed, index, SHAPE) for seed in range(3) for index in range(3)]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.4


def test_the_noise_is_standard_normal():
    noise = noise_batch(7, range(50), (4, 8, 8, 8))
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.dtype == torch.float32


def test_a_key_means_the_same_stream_for_ever():
    digest = hashlib.sha256(b"sample\x1f0\x1f7").digest()
    assert keyed_generator("sample", 0, 7).initial_seed() == int.from_bytes(digest[:8], "big") // 2


@pytest.mark.parametrize("other", [("sample", 0, 70), ("sample", 1, 7), ("train", 0, 7), ("sample", 0)])
def test_every_part_of_a_key_counts(other):
    assert keyed_generator("sample", 0, 7).initial_seed() == keyed_generator("sample", 0, 7).initial_seed()
    assert keyed_generator(*other).initial_seed() != keyed_generator("sample", 0, 7).initial_seed()


def test_neighbouring_parts_of_a_key_do_not_run_together():
    assert keyed_generator(1, 23).initial_seed() != keyed_generator(12, 3).initial_seed()
