"""What holds for every test: hypothesis profiles, one thread, and uninitialised memory that shows."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("dev", max_examples=100, deadline=None, print_blob=True)  # new examples in every run
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)  # the same in every run: .ci/run asks for it
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

HELPERS = ("any_history", "authors", "both_paths", "caches", "properties", "row_history")
pytest.register_assert_rewrite(*HELPERS)  # an assertion that fails there says what it compared

torch.set_num_threads(1)  # tiny tensors: more threads only get in each other's way
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """torch.empty, empty_like, new_empty and the like give NaN, or the largest integer: reading them turns a test red.

    It is a service of torch's deterministic mode; a test that needs the ordinary mode switches it off for itself.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
