"""Write new MIDI files: python generate.py --checkpoint runs/base --output out"""

from meloformer.command_line import load
from meloformer.errors import exit_cleanly
from meloformer.families import family_of_command_line


def main() -> None:
    # The commands are imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    if family_of_command_line() == "fractal":
        from meloformer.fractal.request import FractalGenerateConfig

        config = load(FractalGenerateConfig, description=__doc__)
        from meloformer.fractal.command import run
    else:
        from meloformer.command_config import GenerateConfig

        config = load(GenerateConfig, description=__doc__)
        from meloformer.generation.command import run
    run(config)


if __name__ == "__main__":
    exit_cleanly(main)
