"""Turn the measured differences of the engine matrix into `docs/engine_matrix.md`.

Usage: DISTLLM_MATRIX_DIR=docs/matrix python -m pytest -m "slow or not slow" tests/engines/test_matrix.py
       python tests/engines/matrix_table.py docs/matrix > docs/engine_matrix.md
"""

import json
import sys
from pathlib import Path

HEAD = """# The engine matrix

Ten optimizer steps of every stage under every engine, on real processes (gloo, CPU, fp32, dropout 0, lr 1e-3), against the
same ten steps on one process. Each cell holds the largest difference of the ten steps: of the loss, relative to the larger
of |loss| and the sum of |contributions| / weight; of the gradient norm, relative; and of the final weights, absolute.
Greedy responses before and after training were equal, token by token, in every cell. Bounds: 1e-5, 1e-5, 1e-4.
"""


def main(folder: Path) -> None:
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    stages = list(cells[0]["stages"])
    print(HEAD)
    print(f"| engine | {' | '.join(stages)} |")
    print(f"|---|{'---|' * len(stages)}")
    for cell in cells:
        assert all(found["samples"] == 1.0 for found in cell["stages"].values())
        columns = [
            " / ".join(f"{found[q]:.0e}" for q in ("loss", "grad_norm", "weights"))
            for found in cell["stages"].values()
        ]
        print(f"| {cell['cell']} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
