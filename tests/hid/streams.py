"""Random valid HID streams, drawn token by token from the grammar itself."""

from __future__ import annotations

import numpy as np

from meloformer.hid import Family, StreamState, Vocabulary

VOCABULARY = Vocabulary()
# How often a family is chosen where the grammar lets it; small streams with every feature in them.
WEIGHTS = {
    Family.BAR: 3.0,
    Family.TIME: 3.0,
    Family.PITCH: 2.0,
    Family.MASK: 1.0,
    Family.METER: 0.5,
    Family.TEMPO: 0.5,
    Family.INSTRUMENT: 0.6,
    Family.EOS: 0.3,
    Family.FILL: 0.8,
}
CONTROL_WEIGHT = 0.15
INSTRUMENTS = (0, 0, 33, 128)  # few, so that several tracks share one


def random_stream(
    seed: int, max_length: int = 200, masks: bool = True, controls: bool = True, tracks: bool = False
) -> np.ndarray:
    """A valid stream of about `max_length` tokens at most; tracks=True asks for at least one track."""
    rng = np.random.default_rng(seed)
    state, tokens = StreamState(VOCABULARY), []
    conductor_length = int(rng.integers(5, 40))
    while not state.is_finished:
        allowed = state.allowed(masks=masks)
        families = np.unique(VOCABULARY.family_of[allowed]).tolist()
        weights = np.array([_weight(Family(f), controls) for f in families])
        if tracks and not state.instruments and Family.INSTRUMENT in families:
            weights[families.index(Family.EOS)] = 0
        if state.region == 2 and len(tokens) > conductor_length and Family.INSTRUMENT in families:
            weights[:] = [1.0 if f in (Family.INSTRUMENT, Family.EOS) else 0.0 for f in families]
            if tracks:
                weights[families.index(Family.EOS)] = 0
        if len(tokens) + state.closing_length() >= max_length:
            weights = _closing_weights(families, weights)
        family = Family(families[rng.choice(len(families), p=weights / weights.sum())])
        choices = np.flatnonzero(allowed[VOCABULARY.ids(family)]) + VOCABULARY.start(family)
        if family == Family.INSTRUMENT:
            token = VOCABULARY.instrument(int(rng.choice(INSTRUMENTS)))
        elif family in (Family.TIME, Family.PITCH) and rng.random() < 0.8:
            token = int(choices[min(rng.integers(0, 12), len(choices) - 1)])  # leave room for more behind it
        else:
            token = int(rng.choice(choices))
        state.push(token)
        tokens.append(token)
    return np.array(tokens, dtype=np.uint16)


def _weight(family: Family, controls: bool) -> float:
    if family >= Family.PIECE_BEGIN and family != Family.CHORD:
        return CONTROL_WEIGHT if controls else 0.0
    return WEIGHTS.get(family, 1.0)


def _closing_weights(families: list[int], weights: np.ndarray) -> np.ndarray:
    for family in (Family.EOS, Family.FILL, Family.VELOCITY, Family.DURATION, Family.PITCH, Family.CHORD, Family.TIME):
        if family in families:
            return np.array([1.0 if f == family else 0.0 for f in families])
    return weights
