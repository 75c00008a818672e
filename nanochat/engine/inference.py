"""The model as it serves: weights laid out for decoding, a cache of keys and values, prefill and decode passes.

Shapes: N tokens of a pass, C channels, H heads, H_kv key heads, D head size, V vocabulary, S slots, R positions a slot
holds in a layer. A slot is one sequence's place in the cache. A pass reads either pieces of N tokens in all, each the
neighbouring positions of one slot (`prefill`), or one position of each of the first N slots (`decode`).

What differs from `GPT.forward`, which it must agree with:
- weights are cast to the compute dtype once, and q, k, v and the gate of the value embeddings are one matrix;
- the embedding table is normed once, and smear is a look-up: how much a token takes in depends on that token only;
- a windowed layer keeps its last `window` positions, each over the one that left the window;
- logits exist for the last position only.

Not here: which sequence sits where (`engine.py`), how a token is drawn (`sampling.py`).
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import DTYPES, UserError
from nanochat.engine.sampling import Drawing, draw
from nanochat.model.attention import band_mask, causal_attention
from nanochat.model.gpt import GPT, SMEAR_CHANNELS, VALUE_GATE_CHANNELS, VALUE_GATE_SCALE, GPTConfig, norm

WEIGHTS = ("float32", "bfloat16", "float16", "int8")
INT8_MAX_ROWS = 4  # more rows in one product are faster with the weights unpacked
PARTS_MAX_ROWS = 16  # more rows in one product keep all threads busy anyway
ROWS_MULTIPLE = 16  # the matrix of q, k, v and gate is filled up to this, so that threads can share it evenly
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a recorded CUDA graph
KEY_BUCKET = 256  # positions by which the keys of a recorded CUDA graph grow


class Product:
    """x @ weight.T for weight (M, K), laid out for the number of rows of x (N, K).

    8 bits: each output's weights are multiples of its own step, the largest being 127 of them. Few rows (decoding a
    few sequences is bound by reading weights) go through PyTorch's 8-bit kernel, which takes bfloat16; more rows
    through the same weights unpacked, so that a sequence's result does not depend on how many run beside it.

    Few rows in float32 on a CPU: PyTorch's product would leave them to one thread, so the outputs are divided among
    the threads as a batch of products. A matrix with more outputs than inputs is kept transposed for that: adding up
    rows of outputs is faster than a dot product for each. Two to three times faster together (`dev/LOG.md`).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, int8: bool = False):
        self.int8: tuple[Tensor, Tensor] | None = None
        self.parts: Tensor | None = None  # (P, K, M / P), a view of the weight or a copy
        weight = weight.detach()
        if int8:
            step = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
            packed = (weight.float() / step[:, None]).round().to(torch.int8)
            self.int8 = (packed.contiguous(), step.to(torch.bfloat16))
            weight = packed.float() * self.int8[1].float()[:, None]
        self.weight = weight.to(dtype).contiguous()
        if dtype == torch.float32 and weight.device.type == "cpu":
            M, K = self.weight.shape
            num_parts = max(p for p in range(1, torch.get_num_threads() + 1) if M % p == 0)
            self.parts = self.weight.view(num_parts, -1, K).transpose(1, 2)
            if M > K and not int8:
                self.parts = self.parts.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        N = x.size(0)
        if self.int8 is not None and N <= INT8_MAX_ROWS:
            return torch._weight_int8pack_mm(x.to(torch.bfloat16), *self.int8).to(x.dtype)
        if self.parts is not None and N <= PARTS_MAX_ROWS:
            y = torch.bmm(x.expand(self.parts.size(0), -1, -1), self.parts)  # (P, N, M / P)
            return y.transpose(0, 1).reshape(N, -1)
        return F.linear(x, self.weight)

    def copy_(self, other: "Product") -> None:
        """Take over the weights of `other`, in place."""
        self.weight.copy_(other.weight)
        if self.parts is not None:
            self.parts.copy_(other.parts)
        if self.int8 is not None:
            for own, new in zip(self.int8, other.int8, strict=True):
                own.copy_(new)


@dataclass
class _Layer:
    """Weights of a block: `attend` (q, k, v and gate), `attend_out`, `expand`, `contract`."""

    attend: Product
    attend_out: Product
    expand: Product
    contract: Product
    resid: float
    x0: float
    value_embed: slice | None  # this layer's columns of the table


class _Weights:
    def __init__(self, model: GPT, dtype: torch.dtype, *, int8: bool):
        config, V = model.config, model.config.vocab_size
        self.embed = norm(model.wte.weight.detach()[:V].to(dtype)).to(dtype)  # (V, C)
        self.smear = None
        if config.smear:
            gate = torch.sigmoid(self.embed[:, :SMEAR_CHANNELS] @ model.smear_gate.detach().to(dtype))
            self.smear = (model.smear_lambda.detach().to(dtype) * gate).unsqueeze(-1)  # (V, 1)
        self.value_embeds = model.value_embeds.weight.detach()[:V].to(dtype) if config.value_embeds else None
        self.layers = [_layer(model, layer, dtype, int8) for layer in range(config.n_layer)]
        self.head = Product(model.lm_head.weight[:V], dtype, int8=int8)
        self.backout = model.backout_lambda.item() if config.backout else 0.0

    def copy_(self, other: "_Weights") -> None:
        for name in ("embed", "smear", "value_embeds"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(other, name))
        for own, new in zip(self.layers, other.layers, strict=True):
            for name in ("attend", "attend_out", "expand", "contract"):
                getattr(own, name).copy_(getattr(new, name))
            own.resid, own.x0 = new.resid, new.x0
        self.head.copy_(other.head)
        self.backout = other.backout


def _layer(model: GPT, layer: int, dtype: torch.dtype, int8: bool) -> _Layer:
    config, block = model.config, model.h[layer]
    matrices = [block.attn.c_q.weight, block.attn.c_k.weight, block.attn.c_v.weight]
    value_embed = None
    if config.has_value_embed(layer):
        # the gate reads the first channels only: as a row of the whole matrix it is zero elsewhere
        matrices.append(F.pad(block.attn.value_gate.weight, (0, config.n_embd - VALUE_GATE_CHANNELS)))
        place = sum(config.has_value_embed(earlier) for earlier in range(layer)) * config.kv_dim
        value_embed = slice(place, place + config.kv_dim)
    scalars = config.residual_scalars
    attend = torch.cat(matrices)
    attend = F.pad(attend, (0, 0, 0, -attend.size(0) % ROWS_MULTIPLE))
    return _Layer(
        Product(attend, dtype, int8=int8),
        *(Product(m.weight, dtype, int8=int8) for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)),
        resid=model.resid_lambdas[layer].item() if scalars else 1.0,
        x0=model.x0_lambdas[layer].item() if scalars else 0.0,
        value_embed=value_embed,
    )


# --- cache ---------------------------------------------------------------------------------------


class Cache:
    """Keys and values of S slots: in each layer two tensors (S + 1, H_kv, R, D), R the window or the whole context.

    Position p of a slot lies at p % R. The last slot belongs to nobody: padding rows of a decode write there.
    """

    def __init__(self, config: GPTConfig, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.num_slots = num_slots
        self.lengths = [
            min(config.window(i) or config.sequence_len, config.sequence_len) for i in range(config.n_layer)
        ]
        shapes = [(num_slots + 1, config.n_kv_head, length, config.head_dim) for length in self.lengths]
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)
        )

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Make `target` hold what `source` holds of its first `num_tokens` positions."""
        for tensors in (self.keys, self.values):
            for tensor, length in zip(tensors, self.lengths, strict=True):
                used = min(num_tokens, length)
                tensor[target, :, :used] = tensor[source, :, :used]

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange two slots that hold at most `num_tokens` positions each."""
        for tensors in (self.keys, self.values):
            for tensor, length in zip(tensors, self.lengths, strict=True):
                used = min(num_tokens, length)
                kept = tensor[a, :, :used].clone()
                tensor[a, :, :used] = tensor[b, :, :used]
                tensor[b, :, :used] = kept

    def can_go_back(self, length: int, position: int) -> bool:
        """Whether a slot that has held `length` positions still holds all that a token at `position` looks back on."""
        shortest = min(self.lengths)  # what left the shortest window left it first
        return length <= max(shortest, position + 1)

    def extend(self, layer: int, slot: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (N, H_kv, D) at positions from `start`; returns keys and values (1, H_kv, K, D) of all positions
        up to them that the first of them can see, in order."""
        N, R = k.size(0), self.lengths[layer]
        visible = []
        for tensor, new in ((self.keys[layer], k.transpose(0, 1)), (self.values[layer], v.transpose(0, 1))):
            own = tensor[slot]  # (H_kv, R, D)
            if start + N <= R:
                own[:, start : start + N] = new
                visible.append(own[:, : start + N])
                continue
            past = torch.arange(max(0, start - R + 1), start, device=own.device) % R
            visible.append(torch.cat((own[:, past], new), dim=1))
            kept = torch.arange(max(start, start + N - R), start + N, device=own.device)
            own[:, kept % R] = new[:, kept - start]
        return visible[0].unsqueeze(0), visible[1].unsqueeze(0)


@dataclass
class _DecodePlace:
    """Where the N tokens of a decode lie: `rows` (N,) the slots they are written to, `positions` (N,), both int64;
    of each layer length R: `index` positions % R, `num_keys` read from each slot, `mask` (N, 1, 1, num_keys) bool or
    None where all of them are visible to all."""

    rows: Tensor
    index: dict[int, Tensor]
    num_keys: dict[int, int]
    mask: dict[int, Tensor | None]


# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tokens `ids` for a slot that holds `start` positions already; `previous` is the token before them, None at the
    beginning."""

    slot: int
    ids: Sequence[int]
    start: int
    previous: int | None


def add_weights_flag(parser: ArgumentParser) -> None:
    """The flag for the form of weights of those that answer."""
    parser.add_argument(
        "--weights",
        default="",
        choices=["", *WEIGHTS],
        help="in what form the weights that answer are kept (default: --dtype). Smaller is faster, a little less "
        "exact: bfloat16 and int8 added less than 0.001 nats a token to the loss where that was measured (dev/LOG.md)",
    )


class InferenceModel:
    """A GPT's weights and a cache of `num_slots` slots.

    `weights` is the dtype computed in, one of `WEIGHTS`, or "" for the model's own; "int8" computes in float32 with
    matrices in 8 bits, on a CPU. `use_graphs` records decode passes as CUDA graphs, on CUDA only.
    """

    def __init__(self, model: GPT, num_slots: int, *, weights: str = "", use_graphs: bool = True):
        if weights and weights not in WEIGHTS:
            raise UserError(f"--weights {weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")
        if weights == "int8" and model.device.type != "cpu":
            raise UserError("--weights int8 is for CPUs; on this device take bfloat16")
        self.config, self.device = model.config, model.device
        self.dtype = torch.float32 if weights == "int8" else DTYPES[weights] if weights else model.compute_dtype
        self._int8 = weights == "int8"
        self._weights = _Weights(model, self.dtype, int8=self._int8)
        self.cache = Cache(model.config, num_slots, self.dtype, model.device)
        self._cos, self._sin = self._rotary()
        self._graphs: _DecodeGraphs | None = None
        if use_graphs and model.device.type == "cuda":
            self._graphs = _DecodeGraphs(self)

    @torch.no_grad()
    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model`, in place; what the cache holds no longer fits them."""
        self._weights.copy_(_Weights(model, self.dtype, int8=self._int8))

    def _rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin for q and k side by side, (sequence_len, H + H_kv, D), the scale of QK-norm in those of q."""
        config = self.config
        D, H = config.head_dim, config.n_head
        frequencies = config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
        angles = torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), frequencies)
        cos = torch.cat((angles.cos(), angles.cos()), dim=-1)[:, None].repeat(1, H + config.n_kv_head, 1)
        sin = torch.cat((angles.sin(), -angles.sin()), dim=-1)[:, None].repeat(1, H + config.n_kv_head, 1)
        for table in (cos, sin):
            table[:, :H] *= config.qk_scale**2
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of sequences, each of another slot, in one pass over the weights. Returns the logits after the
        last token of each, (len(pieces), V) float32."""
        spans = [0, *accumulate(len(piece.ids) for piece in pieces)]
        host = [token for piece in pieces for token in piece.ids]
        before = [token for piece in pieces for token in (piece.previous or 0, *piece.ids[:-1])]
        places = [place for piece in pieces for place in range(piece.start, piece.start + len(piece.ids))]
        idx, previous, at = torch.tensor([host, before, places]).to(self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = [
                self._attend_to_piece(layer, piece, q[first:end], k[first:end], v[first:end])
                for piece, first, end in zip(pieces, spans, spans[1:], strict=False)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        x = self._blocks(self._embed(idx, previous, at), idx, self._cos[at], self._sin[at], attend)
        return self._logits(x[torch.tensor(spans[1:], device=self.device) - 1])

    def _attend_to_piece(self, layer: int, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k, v (T, H_kv, D) of a piece, and lets q (T, H, D) look at them and at what was there: (T, H, D)."""
        window = self.config.window(layer)
        keys, values = self.cache.extend(layer, piece.slot, piece.start, k, v)
        if piece.start == 0:
            return causal_attention(q[None], k[None], v[None], window=window)[0]
        mask = None if len(piece.ids) == 1 else band_mask(q.size(0), keys.size(2), window, q.device)
        return _sdpa(q.transpose(0, 1)[None], keys, values, mask)[0].transpose(0, 1)

    @torch.inference_mode()
    def decode_and_draw(
        self, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing
    ) -> tuple[Tensor, Tensor]:
        """`decode`, and the tokens (N,) int64 that `drawing` draws from its logits: (logits, tokens).

        As a CUDA graph the two are one; the logits are then overwritten by the next one.
        """
        if self._graphs is not None:
            return self._graphs.decode(idx, previous, positions, drawing)
        logits = self.decode(idx, previous, positions)
        return logits, draw(logits, drawing.columns.to(self.device), drawing.kind)

    @torch.inference_mode()
    def decode(self, idx: Tensor, previous: Tensor, positions: Sequence[int]) -> Tensor:
        """One token in each of the first N slots, at `positions` (at least 1): idx and previous (N,) int64 on the
        device. Returns the logits (N, V) float32 after them."""
        lengths = set(self.cache.lengths)
        at = torch.tensor(positions, device=self.device)
        place = _DecodePlace(
            rows=torch.arange(len(positions), device=self.device),
            index={R: at % R for R in lengths},
            num_keys={R: min(max(positions) + 1, R) for R in lengths},
            mask=dict.fromkeys(lengths),
        )
        for R in lengths:
            if min(positions) + 1 < place.num_keys[R]:
                place.mask[R] = _filled(at, place.num_keys[R])
        return self._decode(idx, previous, at, place)

    def _decode(self, idx: Tensor, previous: Tensor, at: Tensor, place: _DecodePlace) -> Tensor:
        N = idx.size(0)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            R = self.cache.lengths[layer]
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[place.rows, :, place.index[R]] = k
            values[place.rows, :, place.index[R]] = v
            K = place.num_keys[R]
            y = _sdpa(q.unsqueeze(2), keys[:N, :, :K], values[:N, :, :K], place.mask[R])  # (N, H, 1, D)
            return y.squeeze(2)

        x = self._embed(idx, previous, None)
        return self._logits(self._blocks(x, idx, self._cos[at], self._sin[at], attend))

    def _embed(self, idx: Tensor, previous: Tensor, at: Tensor | None) -> Tensor:
        """x (N, C) of idx (N,), each with a share of the token before it, which the one at position 0 has not; `at`
        (N,) are the positions, None where none of them is 0."""
        weights = self._weights
        x = F.embedding(idx, weights.embed)
        if weights.smear is None:
            return x
        share = F.embedding(idx, weights.smear)
        if at is not None:
            share = share * (at > 0).unsqueeze(-1)
        return torch.addcmul(x, share, F.embedding(previous, weights.embed))

    def _blocks(self, x: Tensor, idx: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        """Final normed hidden states (N, C). `attend(layer, q, k, v)` stores k, v (N, H_kv, D), returns (N, H, D)."""
        config, weights = self.config, self._weights
        H, H_kv, D = config.n_head, config.n_kv_head, config.head_dim
        rotated, valued = (H + H_kv) * D, (H + 2 * H_kv) * D
        ve = F.embedding(idx, weights.value_embeds) if weights.value_embeds is not None else None
        x0 = middle = x
        for i, layer in enumerate(weights.layers):
            if config.residual_scalars:
                x = torch.add(x * layer.resid, x0, alpha=layer.x0)
            if i == config.n_layer // 2:
                middle = x
            mixed = layer.attend(norm(x))
            qk = norm(mixed[:, :rotated].unflatten(-1, (H + H_kv, D)))
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)
            v = mixed[:, rotated:valued].unflatten(-1, (H_kv, D))
            if layer.value_embed is not None:
                gate = VALUE_GATE_SCALE * torch.sigmoid(mixed[:, valued : valued + H_kv, None])  # (N, H_kv, 1)
                v = torch.addcmul(v, gate, ve[:, layer.value_embed].unflatten(-1, (H_kv, D)))
            x = x + layer.attend_out(attend(i, qk[:, :H], qk[:, H:], v).flatten(1))
            x = x + layer.contract(F.relu(layer.expand(norm(x))).square())
        if config.backout:
            x = torch.sub(x, middle, alpha=weights.backout)
        return norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        softcap = self.config.softcap
        return softcap * torch.tanh(self._weights.head(hidden).float() / softcap)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


def _filled(at: Tensor, num_keys: int) -> Tensor:
    """(N, 1, 1, num_keys) bool: which places of a slot hold something once position `at` (N,) is written. In a layer
    that keeps its window only, all that is there is visible."""
    return (torch.arange(num_keys, device=at.device) <= at.unsqueeze(1))[:, None, None]


class _DecodeGraphs:
    """Decode passes with their draws as CUDA graphs: one for each number of rows and of keys, both rounded up to a
    bucket, and each kind of draw.

    Padding rows read whatever the slots beyond hold, write into the cache's last slot, and what they draw is dropped.
    """

    def __init__(self, model: InferenceModel, record=None):
        self._model = model
        self._record = record or _record_cuda_graph
        self._ready: dict[tuple, tuple] = {}

    def decode(
        self, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing
    ) -> tuple[Tensor, Tensor]:
        """As `InferenceModel.decode_and_draw`."""
        model, count = self._model, len(positions)
        num_rows = next((b for b in BATCH_BUCKETS if b >= count), count)
        num_rows = max(count, min(num_rows, model.cache.num_slots))
        num_keys = min(-(-(max(positions) + 1) // KEY_BUCKET) * KEY_BUCKET, model.config.sequence_len)
        key = (num_rows, num_keys, drawing.kind)
        if key not in self._ready:
            self._ready[key] = self._prepare(num_rows, num_keys, drawing)
        inputs, columns, replay = self._ready[key]
        padding = num_rows - count
        host = torch.tensor([list(range(count)) + [model.cache.num_slots] * padding, [*positions] + [1] * padding])
        inputs[:2, :count] = torch.stack((idx, previous))
        inputs[2:] = host.to(model.device, non_blocking=True)
        columns[:, :count] = drawing.columns.to(model.device, non_blocking=True)
        logits, tokens = replay()
        return logits[:count], tokens[:count].clone()  # these are read when the next pass is running

    def _prepare(self, num_rows: int, num_keys: int, drawing: Drawing) -> tuple:
        """Buffers (4, num_rows) int64 of ids, previous ids, slots and positions, and (6, num_rows) of `Drawing`'s
        columns, and the function that runs on them."""
        model = self._model
        inputs = torch.zeros(4, num_rows, dtype=torch.int64, device=model.device)
        inputs[2] = model.cache.num_slots
        columns = drawing.columns[:, :1].to(model.device).repeat(1, num_rows)
        lengths = set(model.cache.lengths)

        def run() -> tuple[Tensor, Tensor]:
            idx, previous, rows, at = inputs
            index, keys = {R: at % R for R in lengths}, {R: min(num_keys, R) for R in lengths}
            place = _DecodePlace(rows, index, keys, {R: _filled(at, keys[R]) for R in lengths})
            logits = model._decode(idx, previous, at, place)
            return logits, draw(logits, columns, drawing.kind)

        return inputs, columns, self._record(run)


def _record_cuda_graph(run):
    """`run` as one CUDA graph over the tensors it was recorded with; the result lies in the same memory each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries allocate their workspaces outside of the graph
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return result

    return replay
