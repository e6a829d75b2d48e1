"""Every pair of features is equal to one device or refused by a sentence, and docs/composition.md says which."""

import composition
import jax
import numpy as np
import pytest
import toys
from composition import Case

from mtx.model import flatten
from mtx.spmd import ManualStorage

GRADIENTS = 1e-5
LOSS = 1e-5
UPDATES = 3e-6
"""As in tests/test_rules.py, of Newton-Schulz in float32."""


def check_gradients(case: Case) -> None:
    found, sums = composition.gradients(case)
    wanted, wanted_sums = composition.gradients(composition.one_device(case))
    np.testing.assert_allclose(sums, wanted_sums, rtol=LOSS)
    toys.check_close(found, wanted, GRADIENTS)
