"""Build a tiny T5 text encoder with random weights, offline, for the demo; real runs load t5-v1_1-xxl from a folder.

python examples/tiny_text_encoder.py --captions demo_run/videos/captions.jsonl --output demo_run/text_encoder
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megacogvx.log import get_logger
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True, help="JSON lines with a caption each")
    parser.add_argument("--output", type=Path, required=True, help="folder of tokenizer and encoder")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.captions.read_text(encoding="utf-8").splitlines()]
    build_tiny_text_encoder(arguments.output, [row["caption"] for row in rows])
    get_logger(__name__).info(
        "%s: a tiny T5 encoder with random weights; it tells captions apart but knows no language", arguments.output
    )


if __name__ == "__main__":
    main()
