"""Measure a checkpoint on held-out pieces: python evaluate.py --checkpoint runs/base
or generated music beside real music: python evaluate.py --generated out/ --reference held_out/ --training runs/base"""

from meloformer.command_line import load
from meloformer.config import EvaluateConfig
from meloformer.errors import exit_cleanly


def main() -> None:
    config = load(EvaluateConfig, description=__doc__)
    # Imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    from meloformer.evaluation.command import run

    run(config)


if __name__ == "__main__":
    exit_cleanly(main)
