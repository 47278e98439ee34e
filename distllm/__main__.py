"""`python -m distllm` and `torchrun -m distllm` are the same program as `distllm`."""

import sys

from distllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
