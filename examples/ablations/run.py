"""Train every ablation of the paper tiny, three seeds each, on the demo's clips; draw figure 10, report the order.

python examples/ablations/run.py [--only mmdit1]     after `make demo`; goes on where it was
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megacogvx.config import load_config, read_yaml
from megacogvx.evaluation.ablations import SEEDS, figure_10, finished, order_report, read_curves
from megacogvx.log import get_logger
from megacogvx.models.transformer.parameters import parameter_count
from megacogvx.parallel.groups import shutdown
from megacogvx.training.config import TrainConfig
from megacogvx.training.loop import train
from megacogvx.training.setup import build_transformer_run

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--only", action="append", metavar="NAME", help="of variants.yaml; more than once for several")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments, log = parser.parse_args(), get_logger(__name__)
    for name, changes in read_yaml(HERE / "variants.yaml").items():
        for seed in SEEDS if arguments.only is None or name in arguments.only else ():
            folder = arguments.output / name / f"seed-{seed}"
            here = [f"training.run_folder={folder}", f"training.seed={seed}"]
            config = load_config(TrainConfig, HERE / "base.yaml", [*changes, *arguments.overrides, *here])
            log.info("%s, seed %d: %s parameters", name, seed, f"{parameter_count(config.model):,}")
            if not finished(folder, config.training.steps):
                train(build_transformer_run(config))
                shutdown()
                shutil.rmtree(folder / "checkpoints")  # the curve is what is kept
    curves = read_curves(arguments.output)
    (arguments.output / "figure_10.svg").write_text(figure_10(curves))
    (arguments.output / "order.txt").write_text(order_report(curves))
    print(order_report(curves))


if __name__ == "__main__":
    main()
