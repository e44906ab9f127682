"""MeloFormer: one decoder-only transformer over `[S ; R]`, a summary for each bar of each instrument, then the stream.

    prepare(batch)        annotated rows (numpy, `hid.rows`) -> Inputs: tensors on the model's device, the mask included
    forward(inputs)       -> logits (B, N, V), in stream order
    training_loss(batch)  -> (sum of nats, number of targets, {"nats": (families,), "count": (families,)})
    token_nats(inputs)    -> (B, N) nats of each target, in stream order
    logits(tokens)        one plain stream (T,) -> (T, V)

>>> model = MeloFormer.from_pretrained("runs/base")   # doctest: +SKIP
>>> model.logits(tokens)[-1].argmax()                 # doctest: +SKIP

B rows, M summaries, N tokens, T = M + N, V the vocabulary. The surprise: the last layer computes keys and values of
summaries and nothing else of them, because nobody reads more; so a model has one feed-forward of summaries fewer than
layers, and every parameter has a gradient.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meloformer.config import ModelConfig
from meloformer.errors import UserError
from meloformer.files import write_atomic
from meloformer.hid import Family, Vocabulary
from meloformer.hid.rows import make_row, stack_rows
from meloformer.model.attention import (
    CUDA_OPTIONS,
    BlockVisibility,
    GatheredVisibility,
    PieceVisibility,
    Prepared,
    Visibility,
    attend,
)
from meloformer.model.block_table import order_of
from meloformer.model.layers import FeedForward, RMSNorm, Rotary, rotate
from meloformer.model.masks import AttentionRule, Fields, dense_mask, joint_fields, send
from meloformer.pretrained import CONFIG, WEIGHTS, find_pretrained, read_about

FORMAT = 1
FAMILY = "meloformer"
NUM_INSTRUMENTS = 130  # 0..127, drums, and none (annotation -1) last
NUM_ORDINALS = 17  # 0..15, later ones share 15, and none last

# (number of the layer, q, k, v) -> attention output; in the last layer q holds the regular tokens only
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Inputs:
    """A batch on its device. Token fields (B, N), segment fields (B, M); M = 0 if no summaries.

    `mask` is what sees what: (B, T, T) bool for the dense backend, what `attend` takes for the others. With `flex` the
    tokens stand in the order that leaves the fewest blocks, and `place` (B, N) says where the stream's i-th is.
    `target_index` (K,) picks the positions with a target out of the flattened (B * N), `targets` (K,) are theirs.
    """

    tokens: Tensor
    instrument: Tensor
    ordinal: Tensor
    position: Tensor
    time: Tensor
    segment_instrument: Tensor
    segment_ordinal: Tensor
    segment_position: Tensor
    segment_time: Tensor
    mask: Tensor | Prepared
    target_index: Tensor
    targets: Tensor
    place: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.targets)


class Layer(nn.Module):
    """Attention and feed-forward, each behind its RMSNorm, added to the stream."""

    def __init__(self, config: ModelConfig, summary_ff: bool, is_last: bool):
        super().__init__()
        d_model = config.d_model
        self.n_head, self.is_last, self.dropout = config.n_head, is_last, config.dropout
        self.norm = RMSNorm(d_model)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.query_norm = RMSNorm(d_model // config.n_head)
        self.key_norm = RMSNorm(d_model // config.n_head)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = FeedForward(d_model, config.d_ff)
        self.summary_feed_forward = FeedForward(d_model, config.d_ff) if summary_ff and not is_last else None

    def forward(self, x: Tensor, m: int, rotary: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        """x (B, m + n, d_model), summaries first -> the same; the last layer returns the n regular tokens alone."""
        h = self.norm(x)
        k, v = self.key_value(h).unflatten(-1, (2, self.n_head, -1)).unbind(2)  # (B, m + n, H, D)
        k = rotate(self.key_norm(k), *rotary)
        if self.is_last:
            x, h, rotary, m = x[:, m:], h[:, m:], tuple(angle[:, m:] for angle in rotary), 0
        q = rotate(self.query_norm(self.query(h).unflatten(-1, (self.n_head, -1))), *rotary)
        x = x + self._drop(self.out(attend(q, k, v).flatten(2)))
        if m == 0 or self.summary_feed_forward is None:
            return x + self._drop(self.feed_forward(x))
        s, r = x[:, :m], x[:, m:]
        return torch.cat([s + self._drop(self.summary_feed_forward(s)), r + self._drop(self.feed_forward(r))], dim=1)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class MeloFormer(nn.Module):
    """The model of one config and one vocabulary; float32 parameters, initialised from torch's global generator.

    max_seq_len: tokens of the longest stream it is trained on. Nothing breaks beyond it, but nothing was learnt there.
    conditions: names (of `hid.controls.CONDITIONS`) of what it was told of its pieces; predicted: which of them it
    learnt to write itself; tags: names of TAG 0, 1, ...
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, max_seq_len: int = 24576):
        super().__init__()
        config.validate()
        self.config, self.vocabulary, self.max_seq_len = config, vocabulary, max_seq_len
        self.static_shapes = False  # every batch must look the same to torch.compile
        self.conditions: list[str] = []
        self.predicted: list[str] = []
        self.tags: list[str] = []
        self.gradient_checkpointing = False  # keep only what enters each layer, and compute the rest twice
        self.rule = AttentionRule(config)
        self.rotary = Rotary(config.d_model // config.n_head, config.rotary_axes, vocabulary.resolution)
        self.register_buffer(
            "family_of", torch.from_numpy(vocabulary.family_of.astype(np.int64)).clone(), persistent=False
        )
        d_model, summaries = config.d_model, self.rule.summaries
        self.token = nn.Embedding(vocabulary.size, d_model)
        self.instrument = nn.Embedding(NUM_INSTRUMENTS, d_model)
        self.ordinal = nn.Embedding(NUM_ORDINALS, d_model)
        self.summary = nn.Parameter(torch.empty(d_model)) if summaries else None
        self.input_norm = RMSNorm(d_model)
        separate = summaries and config.summary_ff == "separate"
        self.layers = nn.ModuleList(Layer(config, separate, i == config.n_layer - 1) for i in range(config.n_layer))
        self.output_norm = RMSNorm(d_model)
        self._initialise()

    def _initialise(self) -> None:
        """Unit-variance linear maps, branches scaled so that the stream's variance does not grow with depth.

        The token table is also the head. A stream that still points along its own token's embedding gives that token
        a logit of d_model * std: held to 4, so that the loss starts near ln V at every width. `input_norm`
        brings the small vectors back to unit scale.
        """
        std = min(0.02, 4 / self.config.d_model)
        for table in (self.token.weight, self.instrument.weight, self.ordinal.weight, self.summary):
            if table is not None:
                nn.init.normal_(table, std=std)
        branch = (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                scale = branch if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def compile_layers(self) -> None:
        """Have torch.compile fuse what lies between the tokens and the head; batches then keep one shape.

        UserError for a backend whose every batch has a shape of its own, and would be compiled anew."""
        self.static_shapes = True
        if self.backend() in ("fused", "gathered"):
            raise UserError(
                f"--compile with the {self.backend()} backend would compile every batch anew; leave it out, or give "
                "--backend dense"
            )
        self.rotary.move(self.device)
        options = CUDA_OPTIONS if self.device.type == "cuda" and self.backend() == "flex" else None
        self.hidden = torch.compile(self.hidden, dynamic=False, options=options)

    @property
    def device(self) -> torch.device:
        return self.token.weight.device

    def num_parameters(self) -> int:
        """Parameters, the tied table counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    # --- input ----------------------------------------------------------------------------------------------

    def backend(self) -> str:
        """The name of what computes attention: the config's choice, or for `auto` the fastest on this device."""
        if self.config.backend != "auto":
            return self.config.backend
        on_cpu = self.device.type == "cpu"
        if on_cpu and self.static_shapes:
            return "dense"
        if self.rule.full_causal:
            return "fused"
        return "gathered" if on_cpu else "flex"

    def prepare(self, batch: Mapping[str, np.ndarray], backend: str | None = None) -> Inputs:
        """Tensors, and what sees what, of annotated rows; another `backend` than the model's if one is named."""
        backend = backend or self.backend()
        joint = joint_fields(batch, self.rule.summaries)
        m = joint.document.shape[1] - np.shape(batch["tokens"])[1]
        # (B, M + N), where each token of the physical order comes from.
        order = np.broadcast_to(np.arange(joint.document.shape[1]), joint.document.shape)
        reorder = backend == "flex" and not self.rule.full_causal
        if reorder:
            order = np.stack([order_of(joint.at(b), m) for b in range(len(order))])
            joint = Fields(*(field.gather(1, torch.from_numpy(order)) for field in joint))

        def at(name: str, index: np.ndarray) -> Tensor:
            return send(np.take_along_axis(np.asarray(batch[name]), index, axis=1), self.device)

        regular, summaries = order[:, m:] - m, order[:, :m]
        targets = np.take_along_axis(np.asarray(batch["targets"]), regular, axis=1).reshape(-1)
        target_index = np.flatnonzero(targets >= 0)
        named = ("tokens", "instrument", "ordinal", "position", "time")
        segment = (("instrument", "instrument"), ("ordinal", "ordinal"), ("position", "start"), ("time", "time"))
        return Inputs(
            **{name: at(name, regular) for name in named},
            **{f"segment_{name}": at(f"segment_{source}", summaries) for name, source in segment},
            mask=self._visibility(backend, joint, m),
            target_index=send(target_index, self.device),
            targets=send(targets[target_index].astype(np.int64), self.device),
            place=send(regular.argsort(axis=1), self.device) if reorder else None,
        )

    def _visibility(self, backend: str, joint: Fields, m: int) -> Tensor | Prepared:
        if backend == "flex":
            return BlockVisibility(self.rule, joint, m, self.device)
        if backend == "fused":
            return PieceVisibility(joint.document.numpy(), self.device)
        mask = dense_mask(self.rule, joint, m)
        if backend == "gathered":
            if self.device.type != "cpu":
                raise UserError(f"model.backend is 'gathered', made for a CPU, on {self.device}; take --backend auto")
            return GatheredVisibility(mask, np.stack([order_of(joint.at(b), m) for b in range(len(mask))]))
        return send(mask, self.device)

    def embed(self, tokens: Tensor | None, instrument: Tensor, ordinal: Tensor) -> Tensor:
        """(B, T, d_model) of regular tokens, or of summaries where `tokens` is None; -1 means none."""
        first = self.summary if tokens is None else self.token(tokens)
        return (
            first
            + self.instrument(instrument.remainder(NUM_INSTRUMENTS))
            + self.ordinal(torch.where(ordinal < 0, NUM_ORDINALS - 1, ordinal.clamp(max=NUM_ORDINALS - 2)))
        )

    def run_layers(self, x: Tensor, m: int, position: Tensor, time: Tensor, attend: Attend) -> Tensor:
        """Embedded x (B, m + n, d_model), summaries first, with positions and ticks -> normed (B, n, d_model)."""
        x = self.input_norm(x)
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        rotary = self.rotary(position, time)
        for i, layer in enumerate(self.layers):
            arguments = (x, m, rotary, lambda q, k, v, i=i: attend(i, q, k, v))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return self.output_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary; the table is the token embedding."""
        return F.linear(hidden, self.token.weight)

    # --- whole rows -----------------------------------------------------------------------------------------

    def joint(self, inputs: Inputs) -> tuple[Tensor, int, Tensor, Tensor]:
        """The joint sequence as `run_layers` takes it: x (B, T, d_model), M, positions and ticks (B, T)."""
        x = self.embed(inputs.tokens, inputs.instrument, inputs.ordinal)
        m = inputs.segment_position.shape[1]
        if m == 0:
            return x, 0, inputs.position, inputs.time
        x = torch.cat([self.embed(None, inputs.segment_instrument, inputs.segment_ordinal), x], dim=1)
        position = torch.cat([inputs.segment_position, inputs.position], dim=1)
        return x, m, position, torch.cat([inputs.segment_time, inputs.time], dim=1)

    def hidden(self, inputs: Inputs) -> Tensor:
        """(B, N, d_model), what the head reads, in the physical order of `inputs`."""
        mask = inputs.mask
        visibility = Visibility(mask, self.compute_dtype()) if isinstance(mask, Tensor) else mask
        return self.run_layers(*self.joint(inputs), lambda i, q, k, v: attend(q, k, v, visibility))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, N, V), in stream order."""
        hidden = self.hidden(inputs)
        if inputs.place is not None:
            hidden = hidden.gather(1, inputs.place[..., None].expand_as(hidden))
        return self.head(hidden)

    def training_loss(self, batch: Mapping[str, np.ndarray] | Inputs) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of nats over the targets, their number, and both by Family of the target; no synchronisation."""
        inputs = batch if isinstance(batch, Inputs) else self.prepare(batch)
        nats = self._target_nats(inputs)
        with torch.no_grad():
            family = self.family_of[inputs.targets]
            zeros = nats.new_zeros(len(Family))
            metrics = {
                "nats": zeros.index_add(0, family, nats.detach()),
                "count": zeros.index_add(0, family, torch.ones_like(nats)),
            }
        return nats.sum(), inputs.num_targets, metrics

    def token_nats(self, inputs: Inputs) -> Tensor:
        """(B, N) float32, in stream order: nats of the target at each position, 0 where it has none."""
        spread = torch.zeros(inputs.tokens.numel(), device=self.device)
        spread[inputs.target_index] = self._target_nats(inputs)
        spread = spread.view(inputs.tokens.shape)
        return spread if inputs.place is None else spread.gather(1, inputs.place)

    def _target_nats(self, inputs: Inputs) -> Tensor:
        """(K,) float32 nats of `inputs.targets`."""
        # The head over V ids is a fifth of a small model's work: only positions with a target go through it.
        hidden = self.hidden(inputs).flatten(0, 1)[inputs.target_index]
        return F.cross_entropy(self.head(hidden).float(), inputs.targets, reduction="none")

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> Tensor:
        """Logits (T, V) of one plain stream, a valid one or a prefix of one."""
        tokens = np.asarray(tokens)
        row = make_row([tokens], self.vocabulary)
        # Dense: a stream has any length, and `flex` would compile a graph for each.
        return self(self.prepare(stack_rows([row]), "fused" if self.backend() == "fused" else "dense"))[0]

    def compute_dtype(self) -> torch.dtype:
        """What matrix products run in: autocast's type where it is on, else the parameters'."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.token.weight.dtype

    # --- files ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        write_atomic(folder / WEIGHTS, save_tensors(state))
        about = {
            "family": FAMILY,
            "format": FORMAT,
            "model": self.config.to_dict(),
            "vocabulary": self.vocabulary.to_dict(),
            "max_seq_len": self.max_seq_len,
            "conditions": self.conditions,
            "predicted": self.predicted,
            "tags": self.tags,
        }
        write_atomic(folder / CONFIG, json.dumps(about, indent=1).encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, vocabulary: Vocabulary | None = None) -> MeloFormer:
        """The model of a checkpoint's folder, or of a run's: its best checkpoint, else its latest.

        UserError where there is none, where a file is damaged, or where it was trained on another `vocabulary`.
        """
        folder = find_pretrained(folder)
        about = read_about(folder / CONFIG, FAMILY, {"model", "vocabulary", "max_seq_len"}, FORMAT)
        saved = Vocabulary.from_dict(about["vocabulary"], str(folder / CONFIG))
        if vocabulary is not None and saved != vocabulary:
            raise UserError(
                f"{folder}: the model was trained on vocabulary {saved.hash} (resolution {saved.resolution}), "
                f"this is {vocabulary.hash} (resolution {vocabulary.resolution}): use the data it was trained with"
            )
        config = ModelConfig.from_dict(about["model"], f"{folder / CONFIG}: model")
        model = cls(config, saved, about["max_seq_len"])
        model.conditions, model.tags = about.get("conditions", []), about.get("tags", [])
        model.predicted = about.get("predicted", [])
        try:
            model.load_state_dict(load_tensors((folder / WEIGHTS).read_bytes()))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder / WEIGHTS}: cannot be loaded ({reason}); take another checkpoint") from None
        return model.eval()
