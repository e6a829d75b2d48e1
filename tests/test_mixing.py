"""Blends: every prefix has its shares, any sample is found at once, phases replay nothing."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import mixing
from data.mixing import Order, period

MT_NLG = {
    "Books3": (25.7, 14.3, 1.5), "OpenWebText2": (14.8, 19.3, 3.6), "Stack Exchange": (11.6, 5.7, 1.4),
    "PubMed Abstracts": (4.4, 2.9, 1.8), "Wikipedia": (4.2, 4.8, 3.2), "Gutenberg": (2.7, 0.9, 0.9),
    "BookCorpus2": (1.5, 1.0, 1.8), "NIH ExPorter": (0.3, 0.2, 1.8), "Pile-CC": (49.8, 9.4, 0.5),
    "ArXiv": (20.8, 1.4, 0.2), "GitHub": (24.3, 1.6, 0.2), "CC-2020-50": (68.7, 13.0, 0.5),
    "CC-2021-04": (82.6, 15.7, 0.5), "RealNews": (21.9, 9.0, 1.1), "CC-Stories": (5.3, 0.9, 0.5),
}  # fmt: skip
"""Billions of tokens, weight in percent and epochs of 270 billion (Smith et al. 2022, table 2)."""
WEIGHTS = tuple(weight for _, weight, _ in MT_NLG.values())


def check_prefixes(weights: tuple[float, ...]) -> None:
    found = period(weights)
    length = len(found.source_P)
    counts = np.cumsum(found.source_P[:, None] == np.arange(len(weights)), axis=0)
    shares = found.counts_S[None] * np.arange(1, length + 1)[:, None] / length
    assert np.abs(counts - shares).max() < 1
    assert (counts[-1] == found.counts_S).all()


def test_the_fifteen_sources_of_mt_nlg():
    """Every prefix is within one sample of its shares, and 270 billion tokens make the table's epochs."""
    check_prefixes(WEIGHTS)
    assert len(period(WEIGHTS).source_P) == 1001, "they sum to 100.1 %"
    samples = 270_000_000_000 // 2048
    counts = Order((0,), (WEIGHTS,)).counts(samples)
    for (tokens, _, epochs), count in zip(MT_NLG.values(), counts, strict=True):
        assert count * 2048 / (tokens * 1e9) == pytest.approx(epochs, abs=0.12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=24).filter(any))
def test_every_prefix_of_any_weights(weights: list[int]):
    check_prefixes(tuple(map(float, weights)))


@pytest.mark.parametrize("weights", [(0.31415926, 0.7), (0.123456789, 1.0, 1e-9), (np.pi, np.e, 0.0)])
def test_weights_without_a_short_period_are_rounded(weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "LONGEST_PERIOD", 4096)
    period.cache_clear()
    found = period(weights)
    check_prefixes(weights)
    period.cache_clear()
    assert len(found.source_P) == 4096
    for share, weight in zip(found.counts_S / 4096, weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), abs=len(weights) / 4096)
        assert (share > 0) == (weight > 0), "the smallest has a sample"


def test_a_source_s_samples_come_in_order_and_all():
    order = Order((0, 700, 1500), ((3.0, 1.0, 0.0), (1.0, 1.0, 2.0), WEIGHTS[:3]))
    found = [order.locate(i) for i in range(4000)]
    for source in range(3):
        assert [own for s, own in found if s == source] == list(range(sum(s == source for s, _ in found)))
    for samples in (0, 1, 699, 700, 701, 1500, 4000):
        wanted = np.bincount([s for s, _ in found[:samples]], minlength=3)
        np.testing.assert_array_equal(order.counts(samples), wanted)


def test_a_later_phase_changes_nothing_before_it():
    plain = Order((0,), ((3.0, 1.0),))
    phased = Order((0, 500), ((3.0, 1.0), (1.0, 5.0)))
    assert [phased.locate(i) for i in range(500)] == [plain.locate(i) for i in range(500)]
    assert [phased.locate(i) for i in range(500, 900)] != [plain.locate(i) for i in range(500, 900)]


def test_far_samples_are_found_at_once():
    order = Order((0,), (WEIGHTS,))
    far = 10**15
    source, own = order.locate(far)
    assert abs(own - Fraction(str(WEIGHTS[source])) * far / Fraction("100.1")) < 1
