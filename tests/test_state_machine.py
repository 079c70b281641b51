"""Whatever happens to a state, and in whatever order, it stays what its history says: the machine stands in any_history.py."""

import pytest
from any_history import BFloat16, Float32, Float64, steps
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


@pytest.mark.parametrize("machine", [Float64, Float32, BFloat16])
def test_a_state_is_what_its_history_says(machine):
    run_state_machine_as_test(machine, settings=steps(settings.default.max_examples * 3 // 5))
