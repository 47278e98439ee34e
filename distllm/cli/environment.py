"""Environment variables that must be set before torch, tokenizers or datasets are imported.

Each is a default: what the user has set stays. Threads and the allocator are tuned later, by `engines/hardware.py`.
"""

import os
from collections.abc import MutableMapping

DEFAULTS = {
    # OpenMP threads that spin at barriers starve each other when a neighbour takes a core; a short
    # spin costs little when the machine is idle. Read once, when libgomp is loaded by torch.
    "GOMP_SPINCOUNT": "2000",
    # The tokenizers library warns and falls back when a process forks after its threads have started.
    "TOKENIZERS_PARALLELISM": "false",
    # `datasets` looks up a host on the network even for local files unless told not to count.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # Nothing touches the network unless asked: set HF_HUB_OFFLINE=0 to fetch by hub id.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # An import of transformers would otherwise announce which other frameworks it did not find.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set yet."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)
