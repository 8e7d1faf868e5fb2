"""Show what a checkpoint of any format holds, or how two differ: `megacogvx inspect` as a script."""

import sys

from megacogvx.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
