"""Convert a checkpoint between SAT's, diffusers' and our format: `megacogvx convert` as a script."""

import sys

from megacogvx.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
