"""Turn the measured differences of the engine matrix into `docs/engine_matrix.md`.

`make matrix` measures every cell and writes the table; that is
    DISTLLM_MATRIX_DIR=runs/matrix python -m pytest -m "slow or not slow" tests/engines/test_matrix.py
    python tests/engines/matrix_table.py runs/matrix > docs/engine_matrix.md
"""

import json
import sys
from pathlib import Path

from matrix import CELLS

from distllm.cli.checkup import version

HEAD = """# The engine matrix

Ten optimizer steps of every stage under every engine, on real processes (gloo, CPU, fp32, dropout 0, lr 1e-3), against the
same ten steps on one process. Each cell holds the largest difference of the ten steps: of the loss, relative to the larger
of |loss| and the sum of |contributions| / weight; of the gradient norm, relative; and of the final weights, absolute.
Greedy responses before and after training were equal, token by token, in every cell. Bounds: 1e-5, 1e-5, 1e-4.
`zero` is engine=deepspeed; `accelerate x2, its ...` runs an FSDP or DeepSpeed file of `accelerate config`. `make matrix`
measures all cells anew and writes this page.
"""


def main(folder: Path) -> None:
    found = {c["cell"]: c for c in (json.loads(p.read_text()) for p in folder.glob("*.json"))}
    missing = [name for name in CELLS if name not in found]
    assert not missing, f"not measured: {', '.join(missing)}"
    cells = [found[name] for name in CELLS]
    stages = list(cells[0]["stages"])
    print(HEAD)
    packages = ("torch", "deepspeed", "accelerate")
    print(f"Measured with {', '.join(f'{name} {version(name)}' for name in packages)}.\n")
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
