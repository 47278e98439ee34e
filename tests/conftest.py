"""Shared test settings: one thread a process, no network, no telemetry."""

import os

from recording import Recording

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write commit, date and result into FILE")


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(Recording(config.getoption("--record")))
