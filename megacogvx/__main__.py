"""`python -m megacogvx <verb>`, the form that torchrun starts.

The guard matters: megatron-core's checkpoint writer starts a process that imports this module again.
"""

import sys

from megacogvx.cli import main

if __name__ == "__main__":
    sys.exit(main())
