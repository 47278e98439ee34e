"""Every checkpoint family beside transformers, as a table: `python -m distllm.testing.parity_table` writes docs/parity.md.

The figures are those that `tests/contracts/test_parity.py` holds to their limits; how they are taken is in `pairs.py`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from distllm.testing.pairs import BF16_ROOM, CASES, GRADIENT_TOLERANCE, TOLERANCE, Pair

HEADER = (
    "family", "logits, fp32", "packed, fp32", "gradients, fp32", "bf16 max", "bf16 mean", "greedy tokens", "export",
)  # fmt: skip
BF16_ROWS = 256


def text() -> str:
    """Explain the columns above the table."""
    return f"""# Equality with transformers

Written by `python -m distllm.testing.parity_table`; `tests/contracts/test_parity.py` holds every row to the limits. transformers
{version("transformers")} builds a small random model of the family (every parameter drawn anew, the gains of norms too; windows shorter
than the rows; logits large enough to feel soft-caps) and saves it, ours is read from the files. torch {version("torch")}, one thread of a
CPU.

- **logits**: the largest difference as a share of the largest logit, without, with right and with left padding (BART and
  Marian count positions from the row's start and have no left padding). Limit {TOLERANCE:g}.
- **packed**: the same for three documents in each row, held to what transformers says of each alone. Limit {TOLERANCE:g}.
- **gradients**: the largest difference in a tensor's gradient as a share of that gradient's largest value (of a thousandth
  of the largest gradient of all, where that is more). Limit {GRADIENT_TOLERANCE:g}.
- **bf16 max** and **mean**: our error in bfloat16 as a multiple of transformers' own, both against transformers in float32,
  over {BF16_ROWS} rows. The mean is over all logits, max over the largest error of each row, with the ratio of the two single
  largest errors in brackets: that one is a matter of luck and goes either way from draw to draw. Limit {BF16_ROOM} for the first two.
- **greedy tokens**: how many rows of 8, of unlike lengths and padded, go on with the same 64 tokens as `generate` of transformers.
- **export**: whether the files we write hold the same tensors byte for byte and settings under which transformers computes
  the same logits bit for bit.

Encoder-decoders stand here on random weights alone. `tests/contracts/test_real_weights.py` holds a MiniLM (BERT) and a small
Llama to their trained weights, `tests/arch/test_glm.py` the original GLM to GPT-2 with a prefix mask.
"""


def row(name: str, folder: Path) -> list[str]:
    """Measure a case; the cells in the order of `HEADER`."""
    pair = Pair(name, folder)
    ratios, problems = pair.bf16_ratios(BF16_ROWS), pair.export(folder / f"{name}-exported")
    greedy = "no decoder"
    if pair.family.arch != "encoder":
        ours, theirs = pair.greedy()
        greedy = f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(theirs)}"
    return [
        name,
        f"{max(pair.logits_error(side) for side in pair.sides):.1e}",
        f"{pair.packed_error():.1e}",
        f"{max(pair.gradient_errors().values()):.1e}",
        f"{ratios['max']:.2f} ({ratios['single']:.2f})",
        f"{ratios['mean']:.2f}",
        greedy,
        "; ".join(problems) or "equal",
    ]


def lines(names: list[str]) -> Iterator[str]:
    """Yield the table's lines, each as soon as it is measured."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|---" * len(HEADER) + "|"
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            yield "| " + " | ".join(row(name, Path(folder))) + " |"


def main(names: list[str]) -> None:
    """Print the rows of the named cases; without names, of all, and write them to docs/parity.md."""
    warnings.simplefilter("ignore")
    found = []
    for line in lines(names or list(CASES)):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        found.append(line)
    if not names:
        path = Path("docs/parity.md")
        path.write_text(text() + "\n" + "\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
