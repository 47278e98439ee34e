"""Shared test settings: one thread a process, no network, no telemetry; time limits; the record of `make test-all`."""

import os

import pytest
from recording import Recording

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption(
        "--record-part", metavar="NAME", help="run one part, and write its row of docs/test_all.md"
    )


def pytest_configure(config):
    if config.getoption("--record-part"):
        config.pluginmanager.register(Recording(config, config.getoption("--record-part")))


def pytest_runtest_setup(item):
    """Leave out, with the reason, what needs a GPU where there is none."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_collection_modifyitems(config, items):
    """Give each test the time that DISTLLM_TEST_PATIENCE asks for."""
    from distllm.testing.gloo import patient

    for item in items if patient(1) != 1 else ():
        mark = item.get_closest_marker("timeout")
        limit_s = mark.args[0] if mark else float(config.getini("timeout") or 0)
        item.add_marker(pytest.mark.timeout(patient(limit_s)), append=False)
