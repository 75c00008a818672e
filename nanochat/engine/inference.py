"""The model as it serves: a KV cache, prefill and decode passes. On a GPU, `gpu.py` has passes of its own.

Shapes: N tokens of a pass, C channels, H heads, H_kv key heads, D head size, V vocabulary, S slots (a slot holds one
sequence), R positions that a layer keeps of each slot. A pass reads either pieces of sequences, each a run of
consecutive positions of one slot (`prefill`), or one position of each of the first N slots (`decode`).

Differences from `GPT.forward`, whose results it must equal:
- weights are cast to the compute dtype once; q, k, v and the gate of the value embeddings are one matrix;
- the embedding table is normed once, and smear is a look-up: how much a token takes in depends on that token only;
- a windowed layer keeps its last `window` positions; each new one overwrites the one that leaves the window;
- logits are computed where they are asked for, mostly for the last position only.

Not here: the form of the weights (`weights.py`), which sequence has which slot (`slots.py`), how a token is drawn
(`sampling.py`).
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import DTYPES, UserError
from nanochat.engine.sampling import Drawing, draw
from nanochat.engine.transfer import to_device
from nanochat.engine.weights import Weights
from nanochat.model import gpt
from nanochat.model.attention import band_mask, causal_attention
from nanochat.model.gpt import GPT, GPTConfig, norm, rotary_angles

WEIGHTS = ("float32", "bfloat16", "float16", "int8")
LogitsIds = tuple[Tensor, Tensor]  # (N, V) float32, and the tokens (N,) int64 drawn from them


# --- cache ---------------------------------------------------------------------------------------


class Cache:
    """Keys and values of S slots: in each layer two tensors (S, H_kv, R, D), R the window or the whole context.

    Position p of a slot is stored at p % R.
    """

    def __init__(self, config: GPTConfig, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.num_slots, T = num_slots, config.sequence_len
        self.lengths = [min(config.window(layer) or T, T) for layer in range(config.n_layer)]
        shapes = [(num_slots, config.n_kv_head, length, config.head_dim) for length in self.lengths]
        options = {"dtype": dtype, "device": device}
        self.keys, self.values = ([torch.zeros(shape, **options) for shape in shapes] for _ in range(2))

    def _used(self, num_tokens: int) -> list[Tensor]:
        """Of every tensor, the places that the first `num_tokens` positions occupy."""
        return [t[:, :, : min(num_tokens, t.size(2))] for t in (*self.keys, *self.values)]

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Make `target` hold what `source` holds of its first `num_tokens` positions."""
        for tensor in self._used(num_tokens):
            tensor[target] = tensor[source]

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange two slots that hold at most `num_tokens` positions each."""
        for tensor in self._used(num_tokens):
            kept = tensor[a].clone()
            tensor[a] = tensor[b]
            tensor[b] = kept

    def can_go_back(self, length: int, position: int) -> bool:
        """Whether a slot that has held `length` positions still holds everything that a token at `position` sees."""
        # beyond its window a layer has overwritten something; the one with the shortest window did so first
        return length <= max(min(self.lengths), position + 1)

    def extend(self, layer: int, slot: int, start: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """Store k, v (N, H_kv, D) at the positions from `start` on. Returns the keys and values (1, H_kv, K, D) of all
        positions that these see, from the first one that position `start` sees, in order."""
        N, R = k.size(0), self.lengths[layer]
        visible = []
        for tensor, new in ((self.keys[layer], k.transpose(0, 1)), (self.values[layer], v.transpose(0, 1))):
            own = tensor[slot]  # (H_kv, R, D)
            if start + N <= R:
                own[:, start : start + N] = new
                visible.append(own[None, :, : start + N])
                continue
            past = torch.arange(max(0, start - R + 1), start, device=own.device) % R
            visible.append(torch.cat((own[:, past], new), dim=1)[None])
            kept = torch.arange(max(start, start + N - R), start + N, device=own.device)
            own[:, kept % R] = new[:, kept - start]
        return visible


# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tokens `ids` for a slot that holds `start` positions already; `previous` is the token before them, None at the
    beginning."""

    slot: int
    ids: Sequence[int]
    start: int
    previous: int | None


def lay_out(pieces: Sequence[Piece]) -> list[list[int]]:
    """Of all tokens of a pass: the ids, those of the tokens before (0 at a beginning), and the positions."""
    return [
        [token for piece in pieces for token in piece.ids],
        [token for piece in pieces for token in (piece.previous or 0, *piece.ids[:-1])],
        [piece.start + i for piece in pieces for i in range(len(piece.ids))],
    ]


def add_weights_flag(parser: ArgumentParser) -> None:
    """The flag for the form in which a serving model's weights are kept."""
    parser.add_argument_group("runtime").add_argument(
        "--weights", default="", choices=WEIGHTS,
        help="form in which the serving model's weights are kept (default: --dtype). Smaller is faster and a little "
        "less exact: bfloat16 and int8 added less than 0.001 nats a token to the loss where measured (dev/LOG.md)",
    )  # fmt: skip


class InferenceModel:
    """A GPT's weights and a cache of `num_slots` slots.

    `weights` is the dtype computed in, one of `WEIGHTS`, or "" for the model's own; "int8" keeps the matrices in 8
    bits, and computes in float32 on a CPU.
    """

    takes_int8 = ("cpu",)  # types of devices

    def __init__(self, model: GPT, num_slots: int, *, weights: str = ""):
        if weights and weights not in WEIGHTS:
            raise UserError(f"--weights {weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")
        self.config, self.device = model.config, model.device
        self._int8 = weights == "int8"
        if self._int8 and self.device.type not in self.takes_int8:
            raise UserError(f"--weights int8 needs a CPU, or a GPU with Triton, not {self.device}; take bfloat16")
        self.dtype = DTYPES[weights] if weights and not self._int8 else model.compute_dtype
        if self._int8 and self.device.type == "cpu":
            self.dtype = torch.float32
        self._weights = Weights(model, self.dtype, int8=self._int8)
        self._allocate(num_slots)

    def _allocate(self, num_slots: int) -> None:
        """Make the cache, and what else the passes read."""
        self.cache = Cache(self.config, num_slots, self.dtype, self.device)
        self._cos, self._sin = self._rotary()

    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model`; what the cache holds no longer fits them."""
        self._weights = Weights(model, self.dtype, int8=self._int8)

    def _rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin for q and k side by side, (sequence_len, H + H_kv, D), those of q times the scale of QK-norm."""
        config, H = self.config, self.config.n_head
        angles = rotary_angles(config, config.sequence_len, "cpu")
        cos = torch.cat((angles.cos(), angles.cos()), dim=-1)[:, None].repeat(1, H + config.n_kv_head, 1)
        sin = torch.cat((angles.sin(), -angles.sin()), dim=-1)[:, None].repeat(1, H + config.n_kv_head, 1)
        for table in (cos, sin):
            table[:, :H] *= config.qk_scale**2
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        """`read`, and the logits after the last token of each piece, (len(pieces), V) float32."""
        return self.logits_of_last(pieces, self.read(pieces))

    def logits_of_last(self, pieces: Sequence[Piece], hidden: Tensor) -> Tensor:
        last = np.array(list(accumulate(len(piece.ids) for piece in pieces))) - 1
        return self.logits(hidden[to_device(last, self.device)])

    @torch.inference_mode()
    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of sequences, each of another slot, in one pass over the weights. Returns the final normed hidden
        states (N, C) of all their tokens."""
        spans = [0, *accumulate(len(piece.ids) for piece in pieces)]
        idx, previous, at = torch.tensor(lay_out(pieces)).to(self.device)

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            spanned = zip(pieces, spans[:-1], spans[1:], strict=True)
            parts = [self._attend_to_piece(layer, piece, *(x[first:end] for x in qkv)) for piece, first, end in spanned]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return self._blocks(self._weights.embedded(idx, previous, at), idx, self._cos[at], self._sin[at], attend)

    def _attend_to_piece(self, layer: int, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (T, H_kv, D) of a piece; attention of q (T, H, D) over them and what was there: (T, H, D)."""
        window = self.config.window(layer)
        keys, values = self.cache.extend(layer, piece.slot, piece.start, k, v)
        if piece.start == 0:
            return causal_attention(q[None], k[None], v[None], window=window)[0]
        mask = None if len(piece.ids) == 1 else band_mask(q.size(0), keys.size(2), window, q.device)
        return _sdpa(q.transpose(0, 1)[None], keys, values, mask)[0].transpose(0, 1)

    @torch.inference_mode()
    def decode_and_draw(self, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing) -> LogitsIds:
        """`decode`, and a draw from its logits."""
        logits = self.decode(idx, previous, positions)
        return logits, draw(logits, drawing.columns.to(self.device), drawing.kind)

    @torch.inference_mode()
    def decode(self, idx: Tensor, previous: Tensor, positions: Sequence[int]) -> Tensor:
        """One token in each of the first N slots, at `positions` (at least 1): idx and previous (N,) int64 on the
        device. Returns the logits (N, V) float32 after them."""
        N, num_keys, num_filled = len(positions), max(positions) + 1, min(positions) + 1
        rows, at = torch.arange(N, device=self.device), torch.tensor(positions).to(self.device)
        places: dict[int, tuple[Tensor, int, Tensor | None]] = {}  # of layers of R positions: where, keys, mask
        for R in set(self.cache.lengths):
            K = min(num_keys, R)
            # (N, 1, 1, K) bool, True where a slot holds something; in a windowed layer all of that is visible
            mask = (torch.arange(K, device=self.device) <= at.unsqueeze(1))[:, None, None] if num_filled < K else None
            places[R] = (at % R, K, mask)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            where, K, mask = places[self.cache.lengths[layer]]
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[rows, :, where] = k
            values[rows, :, where] = v
            return _sdpa(q.unsqueeze(2), keys[:N, :, :K], values[:N, :, :K], mask).squeeze(2)  # (N, H, D)

        x = self._weights.embedded(idx, previous, None)
        return self.logits(self._blocks(x, idx, self._cos[at], self._sin[at], attend))

    def _blocks(self, x: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Final normed hidden states (N, C). `attend(layer, q, k, v)` stores k, v (N, H_kv, D), returns (N, H, D)."""
        config, weights = self.config, self._weights
        H, H_kv, D = config.n_head, config.n_kv_head, config.head_dim
        rotated, valued = (H + H_kv) * D, (H + 2 * H_kv) * D
        ve = F.embedding(idx, weights.value_embeds) if weights.value_embeds is not None else None
        x0 = middle = x
        for i, layer in enumerate(weights.layers):
            if config.residual_scalars:
                x = torch.addcmul(x * layer.resid, x0, layer.x0)
            if i == config.n_layer // 2:
                middle = x
            mixed = layer.attend(norm(x))
            qk = norm(mixed[:, :rotated].unflatten(-1, (H + H_kv, D)))
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)
            v = mixed[:, rotated:valued].unflatten(-1, (H_kv, D))
            if layer.value_embed is not None:
                gate = gpt.VALUE_GATE_SCALE * torch.sigmoid(mixed[:, valued : valued + H_kv, None])  # (N, H_kv, 1)
                v = torch.addcmul(v, gate, ve[:, layer.value_embed].unflatten(-1, (H_kv, D)))
            x = x + layer.attend_out(attend(i, qk[:, :H], qk[:, H:], v).flatten(1))
            x = x + layer.contract(gpt.activation(layer.expand(norm(x))))
        if config.backout:
            x = torch.addcmul(x, middle, weights.backout[1])
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """After hidden states (N, C): (N, V) float32."""
        softcap = self.config.softcap
        return softcap * torch.tanh(self._head(hidden).float() / softcap)

    def _head(self, hidden: Tensor) -> Tensor:
        """The head's outputs (N, V), before the soft cap."""
        return self._weights.head(hidden)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
