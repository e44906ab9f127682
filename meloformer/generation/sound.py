"""MIDI -> sound, through FluidSynth and a soundfont, both programs and files of the system.

>>> synth = Synthesizer()                       # doctest: +SKIP
>>> synth.render("out/a.mid", "out/a.wav")      # doctest: +SKIP

A wav is 44.1 kHz stereo, whole or absent. The surprise: the constructor refuses, with how to install what is missing,
so ask for it before hours of work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from meloformer.errors import UserError

INSTALL = "on Debian and Ubuntu: apt-get install fluidsynth fluid-soundfont-gm"
# Where distributions keep General MIDI soundfonts, best first.
SOUNDFONT_FOLDERS = ("/usr/share/sounds/sf2", "/usr/share/soundfonts", "/usr/local/share/fluidsynth/sf2")
SOUNDFONTS = ("FluidR3_GM.sf2", "default-GM.sf2", "default.sf2", "TimGM6mb.sf2")
SAMPLE_RATE = 44100


class Synthesizer:
    """FluidSynth with a soundfont, by default the first of the system's; UserError where either is missing."""

    def __init__(self, soundfont: str | Path | None = None):
        self.program = shutil.which("fluidsynth")
        if self.program is None:
            raise UserError(f"sound needs FluidSynth, and it is not installed; {INSTALL}")
        if soundfont is None:
            found = [Path(folder) / name for name in SOUNDFONTS for folder in SOUNDFONT_FOLDERS]
            soundfont = next((path for path in found if path.is_file()), None)
            if soundfont is None:
                raise UserError(f"sound needs a soundfont, and none is in {SOUNDFONT_FOLDERS[0]}; {INSTALL}")
        elif not Path(soundfont).is_file():
            raise UserError(f"--soundfont {soundfont}: no such file; {INSTALL}, or leave it out")
        self.soundfont = Path(soundfont)

    def render(self, midi: str | Path, wav: str | Path) -> None:
        """Write the sound of a MIDI file."""
        wav = Path(wav)
        aside = wav.with_name(f".{wav.name}.tmp")
        words = [self.program, "-ni", "-q", "-T", "wav", "-r", str(SAMPLE_RATE), "-F", str(aside)]
        try:
            done = subprocess.run([*words, str(self.soundfont), str(midi)], capture_output=True, text=True)
            if done.returncode or not aside.is_file():
                said = " ".join(done.stderr.split())[-200:] or f"exit status {done.returncode}"
                raise UserError(f"{midi}: FluidSynth made no sound of it ({said}); try another --soundfont")
            os.replace(aside, wav)
        finally:
            aside.unlink(missing_ok=True)
