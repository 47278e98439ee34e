"""Training rows out of a corpus that is larger than the memory limit of the process."""

import subprocess
import sys

import numpy as np
import pytest

from distllm.data.token_files import Manifest, Shard, places_at
from distllm.testing.gloo import patient

MIB = 2**20

PROBE = """
import sys
from pathlib import Path
import numpy as np, psutil
from distllm.data.sampler import Sampler
from distllm.data.shards import ShardedRows
from distllm.data.token_files import TokenFiles

rows = ShardedRows(TokenFiles(Path(sys.argv[1]), "train"), 512, eos_id=0, pad_id=0)
order = Sampler(len(rows), 0)
me = psutil.Process()
sizes = []
for step in range(0, 12000, 8):
    for i in order.indices(step, 8):
        assert rows[i].labels.shape == (512,)
    if step % 800 == 0:
        sizes.append(me.memory_info().rss)
print(max(sizes) - sizes[0], sizes[-1] - sizes[0])
"""


def write_corpus(folder, num_shards, shard_tokens):
    """Shards of random ids, written without going through text."""
    dtype, rng, shards = np.dtype("<u2"), np.random.default_rng(0), []
    for number in range(num_shards):
        ids = rng.integers(1, 500, shard_tokens, dtype="<u2")
        ids[199::200] = 0
        places = np.arange(0, shard_tokens, 200, dtype="<i8")
        path = folder / f"train-{number:05d}.bin"
        padding = b"\0" * (places_at(shard_tokens, dtype) - ids.nbytes)
        path.write_bytes(ids.tobytes() + padding + places.tobytes())
        shards.append(Shard(path.name, shard_tokens, len(places), shard_tokens * 4, ""))
    import json

    manifest = Manifest(vocab_size=500, eos_id=0, tokenizer="", settings={})
    manifest.shards, manifest.is_complete = {"train": shards, "heldout": []}, True
    (folder / "shards.json").write_text(json.dumps(manifest.to_json()))
    return sum((folder / s.file).stat().st_size for s in shards)


def growth(folder, code):
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=patient(250),
    )
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()]


@pytest.mark.slow
def test_resident_memory_stays_flat_over_a_corpus_many_times_its_size(tmp_path):
    size = write_corpus(tmp_path, 4, 200 * 350_000)
    assert size > 500 * MIB
    peak, end = growth(tmp_path, PROBE)
    print(f"corpus {size / MIB:.0f} MiB, resident memory grew by {peak / MIB:.1f} MiB at most")
    assert peak < 48 * MIB and end < 48 * MIB
    # Without handing pages back, what was read stays: the check must see that.
    kept = PROBE.replace("rows = Sh", "TokenFiles.release = lambda self: None\nrows = Sh")
    assert growth(tmp_path, kept)[0] > 96 * MIB
