"""Train a model on a preprocessed folder: python train.py --data_dir processed --model_size base"""

from meloformer.command_line import load
from meloformer.config import Config
from meloformer.errors import exit_cleanly


def main() -> None:
    config = load(Config, description=__doc__)
    # Imported here: torch takes seconds, and --help or a mistyped flag should answer at once.
    from meloformer.training.loop import train

    train(config)


if __name__ == "__main__":
    exit_cleanly(main)
