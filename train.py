"""Train a model: python train.py --data_dir processed --model_size base

or, of piano rolls: python train.py --family fractal --train_data train.txt --val_data valid.txt"""

import sys

from meloformer.command_line import load
from meloformer.errors import ended_at_once, exit_cleanly
from meloformer.families import config_class, family_of_command_line


def main() -> None:
    config = load(config_class(family_of_command_line(), "train"), description=__doc__)
    # Imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    with ended_at_once():
        from meloformer.training.loop import train

    stopped_by = train(config)
    if stopped_by:  # as a shell counts: 130 for Ctrl-C, 143 for SIGTERM
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    exit_cleanly(main)
