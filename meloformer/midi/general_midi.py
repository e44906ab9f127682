"""General MIDI: the names of the 128 programs and their sixteen families, and the way back from a name.

>>> instrument_name(33), instrument_name(128)
('Electric Bass (finger)', 'Drums')
>>> parse_instrument("electric bass"), parse_instrument("drums"), parse_instrument("0")
(33, 128, 0)

An instrument is an integer: a program 0..127 or DRUMS (128). The surprise: programs count from 0 here and in MIDI
files, while many printed lists count from 1.
"""

from __future__ import annotations

import difflib

from meloformer.errors import UserError
from meloformer.midi.score import DRUMS

FAMILY_SIZE = 8

_TABLE = {
    "Piano": """Acoustic Grand Piano, Bright Acoustic Piano, Electric Grand Piano, Honky-tonk Piano,
        Electric Piano 1, Electric Piano 2, Harpsichord, Clavinet""",
    "Chromatic Percussion": """Celesta, Glockenspiel, Music Box, Vibraphone,
        Marimba, Xylophone, Tubular Bells, Dulcimer""",
    "Organ": """Drawbar Organ, Percussive Organ, Rock Organ, Church Organ,
        Reed Organ, Accordion, Harmonica, Tango Accordion""",
    "Guitar": """Acoustic Guitar (nylon), Acoustic Guitar (steel), Electric Guitar (jazz), Electric Guitar (clean),
        Electric Guitar (muted), Overdriven Guitar, Distortion Guitar, Guitar Harmonics""",
    "Bass": """Acoustic Bass, Electric Bass (finger), Electric Bass (pick), Fretless Bass,
        Slap Bass 1, Slap Bass 2, Synth Bass 1, Synth Bass 2""",
    "Strings": """Violin, Viola, Cello, Contrabass,
        Tremolo Strings, Pizzicato Strings, Orchestral Harp, Timpani""",
    "Ensemble": """String Ensemble 1, String Ensemble 2, Synth Strings 1, Synth Strings 2,
        Choir Aahs, Voice Oohs, Synth Voice, Orchestra Hit""",
    "Brass": """Trumpet, Trombone, Tuba, Muted Trumpet,
        French Horn, Brass Section, Synth Brass 1, Synth Brass 2""",
    "Reed": """Soprano Sax, Alto Sax, Tenor Sax, Baritone Sax,
        Oboe, English Horn, Bassoon, Clarinet""",
    "Pipe": """Piccolo, Flute, Recorder, Pan Flute,
        Blown Bottle, Shakuhachi, Whistle, Ocarina""",
    "Synth Lead": """Lead 1 (square), Lead 2 (sawtooth), Lead 3 (calliope), Lead 4 (chiff),
        Lead 5 (charang), Lead 6 (voice), Lead 7 (fifths), Lead 8 (bass + lead)""",
    "Synth Pad": """Pad 1 (new age), Pad 2 (warm), Pad 3 (polysynth), Pad 4 (choir),
        Pad 5 (bowed), Pad 6 (metallic), Pad 7 (halo), Pad 8 (sweep)""",
    "Synth Effects": """FX 1 (rain), FX 2 (soundtrack), FX 3 (crystal), FX 4 (atmosphere),
        FX 5 (brightness), FX 6 (goblins), FX 7 (echoes), FX 8 (sci-fi)""",
    "Ethnic": """Sitar, Banjo, Shamisen, Koto,
        Kalimba, Bagpipe, Fiddle, Shanai""",
    "Percussive": """Tinkle Bell, Agogo, Steel Drums, Woodblock,
        Taiko Drum, Melodic Tom, Synth Drum, Reverse Cymbal""",
    "Sound Effects": """Guitar Fret Noise, Breath Noise, Seashore, Bird Tweet,
        Telephone Ring, Helicopter, Applause, Gunshot""",
}

FAMILY_NAMES: list[str] = list(_TABLE)
PROGRAM_NAMES: list[str] = [name.strip() for names in _TABLE.values() for name in names.split(",")]

# What the keys of channel 10 sound like, from 35 on (General MIDI level 1)
FIRST_PERCUSSION = 35
_PERCUSSION = """Low Bass Drum, Bass Drum, Side Stick, Snare, Clap, Electric Snare, Low Floor Tom, Closed Hi-hat,
    High Floor Tom, Pedal Hi-hat, Low Tom, Open Hi-hat, Low-mid Tom, High-mid Tom, Crash 1, High Tom, Ride 1, China,
    Ride Bell, Tambourine, Splash, Cowbell, Crash 2, Vibraslap, Ride 2, High Bongo, Low Bongo, Mute Conga, Open Conga,
    Low Conga, High Timbale, Low Timbale, High Agogo, Low Agogo, Cabasa, Maracas, Short Whistle, Long Whistle,
    Short Guiro, Long Guiro, Claves, High Woodblock, Low Woodblock, Mute Cuica, Open Cuica, Mute Triangle,
    Open Triangle"""
PERCUSSION_NAMES: list[str] = [name.strip() for name in _PERCUSSION.split(",")]


def percussion_name(pitch: int) -> str:
    """What a key of the drum channel sounds like, or its number outside General MIDI."""
    index = pitch - FIRST_PERCUSSION
    return PERCUSSION_NAMES[index] if 0 <= index < len(PERCUSSION_NAMES) else f"key {pitch}"


def instrument_name(instrument: int) -> str:
    """The General MIDI name of a program, or "Drums"."""
    if instrument == DRUMS:
        return "Drums"
    if not 0 <= instrument < DRUMS:
        raise UserError(f"instrument {instrument}: programs are 0..127, drums are {DRUMS}")
    return PROGRAM_NAMES[instrument]


def parse_instrument(text: str) -> int:
    """A program number, "drums", or the beginning of a General MIDI name in any case; the first that fits.

    An exact name wins over a longer one that begins with it. UserError names the nearest otherwise.
    """
    wanted = " ".join(text.split()).lower()
    if wanted.isdecimal() and int(wanted) <= DRUMS:
        return int(wanted)
    names = [name.lower() for name in PROGRAM_NAMES] + ["drums"]
    if wanted in names:
        return names.index(wanted)
    hint = ""
    if any(character.isalpha() for character in wanted):
        for instrument, name in enumerate(names):
            if name.startswith(wanted):
                return instrument
        hint = f"; the nearest is {instrument_name(_nearest(wanted, names))!r}"
    raise UserError(f'instrument {text!r}: 0..127, "drums" or a General MIDI name is accepted{hint}')


def _nearest(wanted: str, names: list[str]) -> int:
    """The first name that holds the words, else the most similar, or similarly begun, name."""
    for instrument, name in enumerate(names):
        if wanted in name:
            return instrument
    begun = {name[: max(len(wanted), 4)]: name for name in reversed(names)} | {name: name for name in names}
    return names.index(begun[difflib.get_close_matches(wanted, begun, n=1, cutoff=0)[0]])
