"""Measure a checkpoint on held-out pieces: python evaluate.py --checkpoint runs/base
or generated music beside real music: python evaluate.py --generated out/ --reference held_out/ --training runs/base"""

from meloformer.command_line import load
from meloformer.errors import exit_cleanly
from meloformer.families import command_of, config_class, family_of_command_line


def main() -> None:
    family = family_of_command_line()
    config = load(config_class(family, "evaluate"), description=__doc__)
    # Looked up only now: torch takes seconds, and --help or a mistyped flag should answer at once.
    command_of(family, "evaluate")(config)


if __name__ == "__main__":
    exit_cleanly(main)
