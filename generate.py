"""Write new MIDI files: python generate.py --checkpoint runs/base --output out"""

from meloformer.command_line import load
from meloformer.errors import exit_cleanly
from meloformer.families import command_of, config_class, family_of_command_line


def main() -> None:
    family = family_of_command_line()
    config = load(config_class(family, "generate"), description=__doc__)
    # Looked up only now: torch takes seconds, and --help or a mistyped flag should answer at once.
    command_of(family, "generate")(config)


if __name__ == "__main__":
    exit_cleanly(main)
