"""`ConstrainedState` for a batch as tensors: the grammar and the request without a word to the host.

    state = TensorState(start, batch_size, device)     # every stream where `start`, a ConstrainedState, stands
    mask = state.allowed()                             # (B, V) bool; nothing but PAD for a stream that has ended
    annotations = state.push(tokens)                   # (B,) -> (8, B) in the order of `Annotations`, segment -1

The rules are those of `StreamState` and `ConstrainedState`, which are its oracle: the masks are equal at every step.
Every value is a tensor on the device and changes in place, so that a captured graph of a step can be played again.

The surprise: what may follow is written as families, and inside a family as a range of values. All of the grammar fits
into that but for the meter, the tempo and the chord in force, which may not be repeated, and the two places of chords.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise

import torch
from torch import Tensor

from meloformer.generation.chosen import chord_places
from meloformer.generation.request import TRACK_LENGTH, ConstrainedState, Request
from meloformer.hid.grammar import Region
from meloformer.hid.vocabulary import Family
from meloformer.midi.score import DRUMS

_KNOWN = {"bars", "meter", "tempo", "instruments", "given", "chooses"}
_COUNTERS = (
    *("region", "family", "bar", "num_bars", "track", "num_tracks", "instrument", "ordinal", "fills", "num_onsets"),
    *("length", "meter", "tempo", "bar_length", "last_time", "last_pitch", "hit_limit"),
    *("last_chord", "due"),
)
_NOTE = (Family.TIME, Family.PITCH, Family.DURATION, Family.VELOCITY)


def covers(request: Request) -> bool:
    """Whether all that is asked for is known here; a request with other wishes goes through `ConstrainedState`."""
    return all(field.name in _KNOWN or getattr(request, field.name) == field.default for field in fields(request))


class TensorState:
    """See the module's docstring. Public, (B,) int64 each: the counters, named as in `StreamState`; `tokens` (B, max
    length), of which `length` (B,) are written."""

    def __init__(self, start: ConstrainedState, batch_size: int, device: torch.device | str = "cpu"):
        state, v, request = start.state, start.vocabulary, start.request
        if state.region in (Region.START, Region.END) or not covers(request):
            raise ValueError("a TensorState begins behind BOS and before EOS, for a request that it covers")
        self.vocabulary, self.max_length, self.device = v, start.max_length, torch.device(device)
        self.num_masks, self.given_tracks, self.has_given = (
            len(state.masks),
            start.given_tracks,
            request.given is not None,
        )
        self.bars = request.bars

        def table(values, dtype=torch.int64) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        self.ids = torch.arange(v.size, device=device)
        self.family_of, self.value_of, self.bar_ticks_of = (table(x) for x in (v.family_of, v.value_of, v.bar_ticks_of))
        self.family_size = table([v.family_size(family) for family in Family])
        self.wanted_meter = -1 if request.meter is None else v.meter(*request.meter)
        self.wanted_tempo = -1 if request.tempo is None else v.tempo(request.tempo)
        # The parts in their order, and none behind the last.
        self.num_parts = -1 if start.instruments is None else len(start.instruments)
        self.parts = table([*(start.instruments or []), -1])
        self.longest_step = start.longest_step
        self._plan_conditions(start, table)
        # Where a FILL goes: track, bar, instrument and ordinal of each MASK; the last row is for FILLs that are not.
        rows = [(t, b, state.instruments[t], state.ordinals[t]) for t, b in state.masks]
        self.cells = table([*rows, (-1, -1, -1, -1)])

        now = dict.fromkeys(_COUNTERS, -1)
        now.update({name: getattr(state, name) for name in ("region", "family", "bar", "track", "fills", "num_onsets")})
        now.update({name: getattr(state, name) for name in ("num_bars", "meter", "tempo", "bar_length")})
        now.update(num_tracks=len(state.instruments), length=len(start.tokens), hit_limit=int(start.hit_limit))
        now.update(last_time=state._last_time, last_pitch=state._last_pitch, last_chord=start.last_chord)
        if start.due:
            now.update(due=v.family_of[start.due[0].start])
        if state.track >= 0:
            now.update(instrument=state.instruments[state.track], ordinal=state.ordinals[state.track])
        for name, value in now.items():
            setattr(self, name, torch.full((batch_size,), int(value), device=device))
        bars = max(len(state.bar_lines), self.max_length) + 2
        self.bar_lines = torch.zeros(batch_size, bars, dtype=torch.int64, device=device)
        self.bar_lines[:, : len(state.bar_lines)] = table(state.bar_lines)
        counts = [state.instruments.count(i) for i in range(v.family_size(Family.INSTRUMENT))]
        self.instrument_counts = table(counts).repeat(batch_size, 1)
        self.tokens = torch.full((batch_size, self.max_length), v.PAD, device=device)
        self.tokens[:, : len(start.tokens)] = table(start.tokens)

    def _plan_conditions(self, start: ConstrainedState, table: Callable[..., Tensor]) -> None:
        """What `Chosen` says, as tables: which family is due behind which, and which of its values."""
        v, chosen = start.vocabulary, start.chosen
        self.has_chords, self.in_bar = chosen.chords, len(chosen.in_bar())
        # Tokens that the parts still to be written owe, by how many are; of one that was not asked for.
        self.part_owed = table([sum(map(len, start.parts[n:])) for n in range(len(start.parts) + 1)])
        self.any_part_owed = len(chosen.part_families)

        def chain(families: list[Family]) -> Tensor:
            behind = [-1] * len(Family)
            for before, family in pairwise(families):
                behind[before] = int(family)
            return table(behind)

        heads = (
            [Family(int(v.family_of[ids.start])) for ids in start.due] if start.state.region == Region.STREAM else []
        )
        self.behind_in_head = chain(heads)
        self.behind_in_part = chain([Family.INSTRUMENT, *chosen.part_families])
        bars = [-1] * len(Family)
        if self.in_bar:
            bars[Family.BAR] = int(Family.BAR_DENSITY)
        if self.has_chords:
            bars[Family.TIME] = int(Family.CHORD)
        self.behind_in_bar = table(bars)
        # Values of a role by instrument, and how many tags there are.
        roles = [chosen.roles(i) for i in range(v.family_size(Family.INSTRUMENT))]
        first = v.start(Family.ROLE)
        self.role_low = table([ids.start - first for ids in roles])
        self.role_high = table([ids.stop - first for ids in roles])
        tags = [ids for ids in start.due if v.family_of[ids.start] == Family.TAG]
        if tags:
            self.family_size[Family.TAG] = tags[0].stop - tags[0].start
        places = [0] * v.size  # the middle of a METER's bar, where a chord may begin in it
        for meter in range(v.size)[v.ids(Family.METER)]:
            places[meter] = int(v.value_of[chord_places(v, meter)[-1]])
        self.middle_of = table(places)

    # --- the whole of it ------------------------------------------------------------------------------------

    def _changing(self) -> list[str]:
        return [*_COUNTERS, "bar_lines", "instrument_counts", "tokens"]

    def save(self) -> list[Tensor]:
        """A copy for `restore`."""
        return [getattr(self, name).clone() for name in self._changing()]

    def restore(self, saved: list[Tensor]) -> None:
        for name, values in zip(self._changing(), saved):
            getattr(self, name).copy_(values)

    def keep(self, rows: Tensor) -> None:
        """Go on with these streams only."""
        for name in self._changing():
            setattr(self, name, getattr(self, name)[rows])

    @property
    def is_finished(self) -> Tensor:
        """(B,) bool."""
        return self.region == Region.END

    # --- what may come next ----------------------------------------------------------------------------------

    def allowed(self) -> Tensor:
        """(B, V) bool; sets `hit_limit` where the length limit leaves only the way to the end."""
        family, region = self.family, self.region
        no = torch.zeros_like(family, dtype=torch.bool)
        may = dict.fromkeys(Family, no)
        in_conductor, in_track, in_fill = (region == r for r in (Region.CONDUCTOR, Region.TRACK, Region.FILL))
        in_part = in_track | in_fill
        seen = (Family.BAR, Family.CONDUCTOR, Family.METER, Family.MASK, Family.FILL, Family.BAR_DENSITY)
        after = {f: family == f for f in (*_NOTE, *seen)}
        at_note, at_mask = after[Family.VELOCITY], after[Family.MASK]

        # The conductor: only the first bar waits for its meter and tempo.
        may[Family.CONDUCTOR] = region == Region.STREAM
        at_head = in_conductor & (after[Family.BAR] | after[Family.BAR_DENSITY])
        is_set = in_conductor & (self.tempo >= 0)
        may[Family.METER] = at_head
        may[Family.TEMPO] = (at_head & (self.bar > 0)) | (in_conductor & after[Family.METER])
        bar = is_set | (in_conductor & after[Family.CONDUCTOR])
        instrument = is_set
        if self.bars is not None:
            more = self.num_bars < self.bars
            bar = bar & (more | (self.num_bars == 0))
            instrument = instrument & ~more
        # Parts and fills.
        may[Family.PITCH] = in_part & (after[Family.TIME] | at_note)
        may[Family.DURATION] = in_part & after[Family.PITCH]
        may[Family.VELOCITY] = in_part & after[Family.DURATION]
        at_bar = in_track & (self.bar >= 0) & (after[Family.BAR] | at_note)
        may[Family.TIME] = at_bar | (in_fill & (at_note | after[Family.FILL]))
        if self.has_chords:
            may[Family.TIME] = may[Family.TIME] | is_set
        between = in_track & (at_note | at_mask)
        may[Family.BAR] = bar | (in_track & (self.bar < 0)) | ((at_bar | between) & (self.bar + 1 < self.num_bars))
        may[Family.INSTRUMENT] = instrument | between
        at_fill_end = in_fill & (at_note | after[Family.FILL])
        owed = self.fills < self.num_masks
        may[Family.FILL] = (between | at_fill_end) & owed
        may[Family.EOS] = (between & (self.num_masks == 0)) | (at_fill_end & ~owed)

        written = self.num_tracks - self.given_tracks
        if self.has_given:  # what was given is not gone on with
            new = (written > 0) | (self.fills > 0)
            for f in (Family.BAR, Family.TIME, Family.PITCH, Family.DURATION, Family.VELOCITY):
                may[f] = may[f] & new
        if self.num_parts >= 0:
            last = written == self.num_parts
            may[Family.INSTRUMENT] = may[Family.INSTRUMENT] & ~last
            may[Family.EOS], may[Family.FILL] = may[Family.EOS] & last, may[Family.FILL] & last
        self._close(may, written, after, in_conductor, in_track, in_part)
        is_due = self.due >= 0
        for f in Family:
            may[f] = torch.where(is_due, self.due == f, may[f])
        may[Family.PAD] = region == Region.END
        return self._spell(torch.stack([may[f] for f in Family], dim=1), at_note, written)

    def _close(self, may: dict, written: Tensor, after: dict, in_conductor: Tensor, in_track: Tensor, in_part: Tensor):
        """Where what is owed fills the rest, only steps that shorten it stay."""
        is_set = self.tempo >= 0
        is_between = after[Family.VELOCITY] | after[Family.MASK] | after[Family.FILL]
        owed = 1 + self.num_masks - self.fills
        owed = owed + in_conductor * (
            3 * after[Family.CONDUCTOR] + ~after[Family.CONDUCTOR] * ~is_set * (2 - after[Family.METER].long())
        )
        notes = 3 * after[Family.TIME] + 2 * after[Family.PITCH] + after[Family.DURATION].long()
        empty = in_track & ~is_between & (notes == 0)  # an empty BAR owes one note
        owed = owed + in_part * notes + empty * (4 + (self.bar < 0).long())
        parts = self.num_parts - written if self.num_parts >= 0 else (self.num_tracks == 0).long()
        conditions = self.part_owed[written] if self.num_parts >= 0 else self.any_part_owed * parts
        bars = ((self.bars or 1) - self.num_bars).clamp(min=0)
        owed = owed + TRACK_LENGTH * parts + conditions + (1 + self.in_bar) * bars
        owed = owed + 2 * self.has_chords * (in_conductor & ~is_set)
        is_near = (self.length + owed + self.longest_step > self.max_length) & (self.region != Region.END)
        is_near = is_near & (self.due < 0)

        head = is_near & in_conductor & is_set
        end = is_near & in_part & is_between
        first = is_near & in_track & after[Family.BAR]
        to_part, to_end = may[Family.INSTRUMENT], may[Family.EOS] | may[Family.FILL]
        stays = {Family.INSTRUMENT: head | (end & ~to_end), Family.BAR: head & ~to_part, Family.TIME: first}
        stays.update({Family.EOS: end, Family.FILL: end})
        closes = head | end | first
        for f in Family:
            may[f] = may[f] & (~closes | stays[f]) if f in stays else may[f] & ~closes
        self.hit_limit |= closes

    def _spell(self, may: Tensor, at_note: Tensor, written: Tensor) -> Tensor:
        """(B, families) bool -> (B, V) bool, the values of each family inside its range."""
        low, high = torch.zeros_like(may, dtype=torch.int64), self.family_size.expand(may.shape).clone()
        low[:, Family.TIME] = self.last_time + 1
        bar = self.bar.clamp(min=0)[:, None]
        lines = self.bar_lines.gather(1, torch.cat([bar, bar + 1], dim=1))
        high[:, Family.TIME] = lines[:, 1] - lines[:, 0]
        low[:, Family.PITCH] = torch.where(at_note, self.last_pitch + 1, 0)
        if self.num_parts >= 0:
            low[:, Family.INSTRUMENT] = self.parts[written.clamp(max=self.num_parts)]
            high[:, Family.INSTRUMENT] = low[:, Family.INSTRUMENT] + 1
        for family, wanted in ((Family.METER, self.wanted_meter), (Family.TEMPO, self.wanted_tempo)):
            if wanted >= 0:
                low[:, family] = wanted - self.vocabulary.start(family)
                high[:, family] = low[:, family] + 1
        of, value = self.family_of, self.value_of
        if self.any_part_owed:
            role_of = self.instrument.clamp(min=0)
            low[:, Family.ROLE], high[:, Family.ROLE] = self.role_low[role_of], self.role_high[role_of]
        mask = may[:, of] & (value >= low[:, of]) & (value < high[:, of])
        if self.has_chords:
            middle = torch.where(self.due >= 0, 0, self.middle_of[self.meter.clamp(min=0)])[:, None]
            elsewhere = (of == Family.TIME) & (value != 0) & (value != middle)
            mask = mask & ~(elsewhere & (self.region == Region.CONDUCTOR)[:, None])
            mask = mask & (self.ids != self.last_chord[:, None])
        return mask & (self.ids != self.meter[:, None]) & (self.ids != self.tempo[:, None])

    # --- taking a token ----------------------------------------------------------------------------------------

    def push(self, tokens: Tensor) -> Tensor:
        """Take an allowed token (B,) each; its annotations (8, B) int64. PAD changes nothing."""
        family, value = self.family_of[tokens], self.value_of[tokens]
        new = {f: family == f for f in Family}
        goes_on = ~new[Family.PAD]
        in_conductor = self.region == Region.CONDUCTOR
        self.tokens.scatter_(
            1,
            self.length[:, None].clamp(max=self.max_length - 1),
            torch.where(
                goes_on, tokens, self.tokens.gather(1, self.length[:, None].clamp(max=self.max_length - 1))[:, 0]
            )[:, None],
        )

        # A new part, a fill, the end.
        part, fill, end = new[Family.INSTRUMENT], new[Family.FILL], new[Family.EOS]
        cell = self.cells[torch.where(fill, self.fills, self.num_masks)]
        place = value.clamp(max=self.instrument_counts.shape[1] - 1)[:, None]
        ordinal = self.instrument_counts.gather(1, place)[:, 0]
        self.instrument_counts.scatter_add_(1, place, part.long()[:, None])
        bar = self.bar + new[Family.BAR]
        bar = torch.where(part | end, -1, torch.where(fill, cell[:, 1], bar))
        track = torch.where(part, self.num_tracks, torch.where(fill, cell[:, 0], self.track))
        self.track.copy_(torch.where(end, -1, track))
        self.bar.copy_(bar)
        instrument = torch.where(part, value, torch.where(fill, cell[:, 2], self.instrument))
        self.instrument.copy_(torch.where(end, -1, instrument))
        self.ordinal.copy_(
            torch.where(end, -1, torch.where(part, ordinal, torch.where(fill, cell[:, 3], self.ordinal)))
        )
        self.num_tracks += part
        self.fills += fill
        region = torch.where(new[Family.CONDUCTOR], int(Region.CONDUCTOR), self.region)
        region = torch.where(part, int(Region.TRACK), torch.where(fill, int(Region.FILL), region))
        self.region.copy_(torch.where(end, int(Region.END), region))

        # The conductor's bars, meters and tempos.
        self.num_bars += new[Family.BAR] & in_conductor
        self.meter.copy_(torch.where(new[Family.METER], tokens, self.meter))
        self.tempo.copy_(torch.where(new[Family.TEMPO], tokens, self.tempo))
        self.bar_length.copy_(torch.where(new[Family.METER], self.bar_ticks_of[tokens], self.bar_length))
        last = self.num_bars[:, None].clamp(min=1)
        line = self.bar_lines.gather(1, last - 1)[:, 0] + self.bar_length
        line = torch.where(
            in_conductor & (new[Family.BAR] | new[Family.METER]), line, self.bar_lines.gather(1, last)[:, 0]
        )
        self.bar_lines.scatter_(1, last, line[:, None])

        # Onset and pitch.
        opens = new[Family.BAR] | part | fill | end
        time, pitch = new[Family.TIME], new[Family.PITCH]
        self.last_time.copy_(torch.where(time, value, torch.where(opens, -1, self.last_time)))
        self.last_pitch.copy_(torch.where(pitch, value, torch.where(opens | time, -1, self.last_pitch)))
        self.num_onsets += time
        self.family.copy_(torch.where(goes_on, family, self.family))
        self.length += goes_on

        # The conditions that are due behind it.
        self.last_chord.copy_(torch.where(new[Family.CHORD], tokens, self.last_chord))
        due = torch.where(self.region == Region.STREAM, self.behind_in_head[family], -1)
        due = torch.where(in_conductor & ~part, self.behind_in_bar[family], due)
        if self.has_chords:
            due = torch.where(new[Family.TEMPO] & (self.bar == 0), int(Family.TIME), due)
        of_part = self.behind_in_part[family]
        of_part = torch.where((of_part == Family.POLYPHONY) & (self.instrument == DRUMS), -1, of_part)
        due = torch.where((self.region == Region.TRACK) & (self.bar < 0), of_part, due)
        self.due.copy_(torch.where(goes_on, due, -1))

        in_note = time | pitch | new[Family.DURATION] | new[Family.VELOCITY] | new[Family.CHORD]
        start = self.bar_lines.gather(1, self.bar[:, None].clamp(min=0))[:, 0]
        none = torch.full_like(family, -1)
        return torch.stack(
            [
                self.bar,
                self.track,
                self.instrument,
                self.ordinal,
                family,
                torch.where(in_note, self.num_onsets - 1, -1),
                none,
                torch.where(self.bar < 0, 0, start) + torch.where(in_note, self.last_time, 0),
            ]
        )
