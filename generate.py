"""Write new MIDI files: python generate.py --checkpoint runs/base --output out"""

from meloformer.command_line import load
from meloformer.config import GenerateConfig
from meloformer.errors import exit_cleanly


def main() -> None:
    config = load(GenerateConfig, description=__doc__)
    # Imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    from meloformer.generation.command import run

    run(config)


if __name__ == "__main__":
    exit_cleanly(main)
