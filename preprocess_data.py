"""Turn MIDI files into shards of tokens.

Killed and started again, it goes on; rejected.jsonl says what was left out and why, the last line what to run next.
For example: python preprocess_data.py --input midi --output processed
"""

from meloformer.errors import ended_at_once, exit_cleanly


def main() -> None:
    from meloformer.command_line import load
    from meloformer.config import PreprocessConfig

    config = load(PreprocessConfig, description=__doc__)
    # After the flags, for numpy and symusic take a moment, and --help or a mistyped flag should answer at once. What
    # the workers need is imported in a process of its own meanwhile: until they start none of them works.
    with ended_at_once():
        from meloformer.data.pool import begin_imports

        begin_imports("meloformer.data.encoder")
        from meloformer.data.preprocess import preprocess

    preprocess(config)


if __name__ == "__main__":
    exit_cleanly(main)
