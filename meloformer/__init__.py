"""MeloFormer: train a multi-track music transformer on a folder of MIDI files and hear it play."""

__version__ = "0.1.0"
