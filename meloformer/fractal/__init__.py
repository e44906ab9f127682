"""FractalMIDI, the second model family: piano rolls generated patch by patch, patches within patches."""
