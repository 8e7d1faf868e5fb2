"""Write synthetic clips of moving shapes with true captions, for runs without network.

python examples/moving_shapes.py --output progressive_run/videos --count 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megacogvx.testing.moving_shapes import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the videos and captions.jsonl")
    parser.add_argument("--count", type=int, default=6, help="videos (default 6)")
    arguments = parser.parse_args()
    write_shapes(arguments.output, arguments.count)


if __name__ == "__main__":
    main()
