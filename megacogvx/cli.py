"""`megacogvx <verb>`: one line a verb here, the work in the room that owns it.

A verb's module has `add_arguments(parser)` and `run(arguments)`; it is imported only when its verb is asked for, so
`megacogvx --help` answers at once. A typed error ends the program with its text and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megacogvx import __version__
from megacogvx.errors import MegacogvxError
from megacogvx.log import get_logger

VERBS = {
    "clips": ("megacogvx.curation.clip", "cut captioned videos into short clips and images"),
    "train-vae": ("megacogvx.training.train_vae", "train a 3D causal VAE on clips"),
    "encode": ("megacogvx.curation.encode", "encode clips and captions into an indexed dataset"),
    "data": ("megacogvx.data.commands", "look into, verify, merge, split, filter, recover, import or export datasets"),
    "train": ("megacogvx.training.train", "pretrain a transformer on an indexed dataset"),
    "estimate": ("megacogvx.training.estimate.command", "say what a training costs on so many GPUs, without one"),
    "doctor": ("megacogvx.parallel.doctor", "look whether these machines are fit to train"),
    "convert": ("megacogvx.conversion.convert", "convert a checkpoint between our, diffusers' and SAT's format"),
    "inspect": ("megacogvx.conversion.inspect", "show what a checkpoint of any format holds, or how two differ"),
    "evaluate": ("megacogvx.evaluation.evaluate", "measure how well a VAE keeps videos and images"),
    "generate": ("megacogvx.inference.generate", "generate videos from prompts, images or videos"),
    "report": ("megacogvx.evaluation.report", "draw runs and samples as one HTML page"),
}
USER_ERROR_STATUS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in VERBS:
        return _run_verb(arguments[0], arguments[1:])
    parser = _overview()
    parser.parse_args(arguments or ["--help"])
    return 0


def _run_verb(verb: str, rest: Sequence[str]) -> int:
    name, summary = VERBS[verb]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=f"megacogvx {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=getattr(module, "EXAMPLE", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        module.run(_parse(parser, rest))
    except MegacogvxError as error:
        get_logger("megacogvx.cli").error("%s: %s", type(error).__name__, error)
        return error.exit_status
    return 0


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse with options before, between or after the overrides; a verb with subcommands takes them in order."""
    try:
        return parser.parse_intermixed_args(list(words))
    except TypeError:  # argparse's word for subcommands
        return parser.parse_args(list(words))


def _overview() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<10} {summary}" for verb, (_, summary) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="megacogvx",
        description="Pretrain CogVideoX-class text-to-video models.",
        epilog=f"verbs:\n{verbs}\n\n`megacogvx VERB --help` tells what a verb needs, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help="what to do; see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
