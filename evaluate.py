"""Measure a checkpoint on held-out pieces: python evaluate.py --checkpoint runs/base
or generated music beside real music: python evaluate.py --generated out/ --reference held_out/ --training runs/base"""

from meloformer.command_line import load
from meloformer.errors import exit_cleanly
from meloformer.families import family_of_command_line


def main() -> None:
    # The commands are imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    if family_of_command_line() == "fractal":
        from meloformer.fractal.config import FractalEvaluateConfig

        config = load(FractalEvaluateConfig, description=__doc__)
        from meloformer.fractal.evaluate import run
    else:
        from meloformer.command_config import EvaluateConfig

        config = load(EvaluateConfig, description=__doc__)
        from meloformer.evaluation.command import run
    run(config)


if __name__ == "__main__":
    exit_cleanly(main)
