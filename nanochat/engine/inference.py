"""The model as it serves: weights laid out for decoding, a KV cache, prefill and decode passes.

Shapes: N tokens of a pass, C channels, H heads, H_kv key heads, D head size, V vocabulary, S slots (a slot holds one
sequence), R positions that a layer keeps of each slot. A pass reads either pieces of sequences, each a run of
consecutive positions of one slot (`prefill`), or one position of each of the first N slots (`decode`).

Differences from `GPT.forward`, whose results it must equal:
- weights are cast to the compute dtype once; q, k, v and the gate of the value embeddings are one matrix;
- the embedding table is normed once, and smear is a look-up: how much a token takes in depends on that token only;
- a windowed layer keeps its last `window` positions; each new one overwrites the one that leaves the window;
- logits are computed for the last position only.

Not here: which sequence has which slot (`slots.py`), how a token is drawn (`sampling.py`).
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import DTYPES, UserError
from nanochat.engine.sampling import Drawing, draw
from nanochat.model import gpt
from nanochat.model.attention import band_mask, causal_attention
from nanochat.model.gpt import GPT, GPTConfig, norm, rotary_angles

WEIGHTS = ("float32", "bfloat16", "float16", "int8")
INT8_MAX_ROWS = 4  # more rows in one product are faster with the weights unpacked
PARTS_MAX_ROWS = 16  # more rows in one product keep all threads busy anyway
ROWS_MULTIPLE = 16  # the matrix of q, k, v and gate is padded to a multiple, so that threads can share it evenly
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a recorded CUDA graph
KEY_BUCKET = 256  # keys of a recorded CUDA graph: a multiple of this
LogitsIds = tuple[Tensor, Tensor]  # (N, V) float32, and the tokens (N,) int64 drawn from them


# --- weights -------------------------------------------------------------------------------------


class Product:
    """x @ weight.T for weight (M, K), laid out for the number of rows of x (N, K).

    8 bits: an output's weights are multiples of its own step, the largest being 127 steps. Few rows (decoding is then
    bound by reading weights) go through PyTorch's 8-bit kernel, which takes bfloat16; more rows go through the same
    weights unpacked, so that a sequence's result does not depend on how many run beside it.

    Few rows in float32 on a CPU: PyTorch would leave the product to one thread, so the outputs are divided among the
    threads as a batch of products. A matrix with more outputs than inputs is kept transposed for that: adding up rows
    of outputs is faster than a dot product for each. Together this is two to three times faster (`dev/LOG.md`).
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
        self.weight = _converted(weight, dtype).contiguous()
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


class _Weights:
    """Everything learned. Scalars are tensors too: a recorded CUDA graph would keep the value of a Python number."""

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype, *, int8: bool):
        config, V = model.config, model.config.vocab_size
        self.embed = norm(model.wte.weight[:V].to(dtype)).to(dtype)  # (V, C)
        self.smear = None
        if config.smear:
            gate = torch.sigmoid(self.embed[:, : gpt.SMEAR_CHANNELS] @ model.smear_gate.to(dtype))
            self.smear = (model.smear_lambda.to(dtype) * gate).unsqueeze(-1)  # (V, 1)
        self.value_embeds = _converted(model.value_embeds.weight[:V], dtype) if config.value_embeds else None
        self.layers = [_Layer(model, layer, dtype, int8) for layer in range(config.n_layer)]
        self.head = Product(model.lm_head.weight[:V], dtype, int8=int8)
        self.minus_backout = -model.backout_lambda.to(dtype) if config.backout else None


class _Layer:
    """Weights of a block; `attend` makes q, k, v and the gate of the value embeddings."""

    def __init__(self, model: GPT, layer: int, dtype: torch.dtype, int8: bool):
        config, block = model.config, model.h[layer]
        matrices = [block.attn.c_q.weight, block.attn.c_k.weight, block.attn.c_v.weight]
        self.value_embed: slice | None = None  # this layer's columns of the table
        if config.has_value_embed(layer):
            # the gate reads the first channels only: as rows of the whole matrix it is zero elsewhere
            matrices.append(F.pad(block.attn.value_gate.weight, (0, config.n_embd - gpt.VALUE_GATE_CHANNELS)))
            start = sum(config.has_value_embed(earlier) for earlier in range(layer)) * config.kv_dim
            self.value_embed = slice(start, start + config.kv_dim)
        joined = torch.cat(matrices)
        joined = F.pad(joined, (0, 0, 0, -joined.size(0) % ROWS_MULTIPLE))
        self.attend, self.attend_out, self.expand, self.contract = (
            Product(weight, dtype, int8=int8)
            for weight in (joined, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
        )
        if config.residual_scalars:
            self.resid = model.resid_lambdas[layer].to(dtype, copy=True)
            self.x0 = model.x0_lambdas[layer].to(dtype, copy=True)


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype: on CUDA always a copy, for `refresh` writes to it; elsewhere maybe the model's own."""
    return weight.to(dtype, copy=weight.is_cuda)


def _tensors(weights) -> list[Tensor]:
    """All tensors among the attributes of an object and the items of lists and tuples, in a fixed order."""
    if isinstance(weights, Tensor):
        return [weights]
    items = weights if isinstance(weights, (list, tuple)) else getattr(weights, "__dict__", {}).values()
    return [tensor for item in items for tensor in _tensors(item)]


# --- cache ---------------------------------------------------------------------------------------


class Cache:
    """Keys and values of S slots: in each layer two tensors (S + 1, H_kv, R, D), R the window or the whole context.

    Position p of a slot is stored at p % R. The last slot belongs to nobody: padding rows of a decode write there.
    """

    def __init__(self, config: GPTConfig, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.num_slots, T = num_slots, config.sequence_len
        self.lengths = [min(config.window(layer) or T, T) for layer in range(config.n_layer)]
        shapes = [(num_slots + 1, config.n_kv_head, length, config.head_dim) for length in self.lengths]
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


def add_weights_flag(parser: ArgumentParser) -> None:
    """The flag for the form in which a serving model's weights are kept."""
    parser.add_argument(
        "--weights", default="", choices=["", *WEIGHTS],
        help="form in which the serving model's weights are kept (default: --dtype). Smaller is faster and a little "
        "less exact: bfloat16 and int8 added less than 0.001 nats a token to the loss where measured (dev/LOG.md)",
    )  # fmt: skip


class InferenceModel:
    """A GPT's weights and a cache of `num_slots` slots.

    `weights` is the dtype computed in, one of `WEIGHTS`, or "" for the model's own; "int8" computes in float32 with
    matrices in 8 bits, on a CPU. On CUDA, decode passes are recorded as CUDA graphs.
    """

    def __init__(self, model: GPT, num_slots: int, *, weights: str = ""):
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
        self._graphs = _DecodeGraphs() if self.device.type == "cuda" else None

    @torch.no_grad()
    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model`; what the cache holds no longer fits them."""
        new = _Weights(model, self.dtype, int8=self._int8)
        if self._graphs is None:
            self._weights = new
        else:  # recorded graphs read the tensors they were recorded with
            for own, tensor in zip(_tensors(self._weights), _tensors(new), strict=True):
                own.copy_(tensor)

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
        """Read pieces of sequences, each of another slot, in one pass over the weights. Returns the logits after the
        last token of each, (len(pieces), V) float32."""
        spans = [0, *accumulate(len(piece.ids) for piece in pieces)]
        host = [token for piece in pieces for token in piece.ids]
        before = [token for piece in pieces for token in (piece.previous or 0, *piece.ids[:-1])]
        positions = [piece.start + i for piece in pieces for i in range(len(piece.ids))]
        idx, previous, at = torch.tensor([host, before, positions]).to(self.device)

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            spanned = zip(pieces, spans[:-1], spans[1:], strict=True)
            parts = [self._attend_to_piece(layer, piece, *(x[first:end] for x in qkv)) for piece, first, end in spanned]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        x = self._blocks(self._embed(idx, previous, at), idx, self._cos[at], self._sin[at], attend)
        return self._logits(x[torch.tensor(spans[1:]).to(self.device) - 1])

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
        """`decode`, and a draw from its logits. A recorded CUDA graph does both; the next one overwrites the logits."""
        if self._graphs is not None:
            return self._graphs.decode(self, idx, previous, positions, drawing)
        logits = self.decode(idx, previous, positions)
        return logits, draw(logits, drawing.columns.to(self.device), drawing.kind)

    @torch.inference_mode()
    def decode(self, idx: Tensor, previous: Tensor, positions: Sequence[int]) -> Tensor:
        """One token in each of the first N slots, at `positions` (at least 1): idx and previous (N,) int64 on the
        device. Returns the logits (N, V) float32 after them."""
        rows, at = torch.arange(len(positions), device=self.device), torch.tensor(positions).to(self.device)
        return self._decode(idx, previous, rows, at, num_keys=max(positions) + 1, num_filled=min(positions) + 1)

    def _decode(
        self, idx: Tensor, previous: Tensor, rows: Tensor, at: Tensor, *, num_keys: int, num_filled: int
    ) -> Tensor:
        """`decode` at positions `at` (N,), stored in the slots `rows` (N,). Of each slot `num_keys` positions are read,
        of which at least the first `num_filled` hold something."""
        N = idx.size(0)
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

        x = self._embed(idx, previous, None)
        return self._logits(self._blocks(x, idx, self._cos[at], self._sin[at], attend))

    def _embed(self, idx: Tensor, previous: Tensor, at: Tensor | None) -> Tensor:
        """x (N, C) of idx (N,), each with a share of the token before it, except at position 0; `at` (N,) are the
        positions, None where none of them is 0."""
        weights = self._weights
        x = F.embedding(idx, weights.embed)
        if weights.smear is None:
            return x
        share = F.embedding(idx, weights.smear)
        if at is not None:
            share = share * (at > 0).unsqueeze(-1)
        return torch.addcmul(x, share, F.embedding(previous, weights.embed))

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
            x = torch.addcmul(x, middle, weights.minus_backout)
        return norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        softcap = self.config.softcap
        return softcap * torch.tanh(self._weights.head(hidden).float() / softcap)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


class _DecodeGraphs:
    """Decode passes with their draws as CUDA graphs: one for each number of rows and of keys, both rounded up to a
    bucket, and each kind of draw.

    Padding rows read whatever the slots beyond hold and write into the cache's last slot; their draws are dropped. The
    model is passed in, not kept: a cycle of references would leave gigabytes of cache to the garbage collector.
    """

    def __init__(self, record: Callable | None = None):
        self._record = record or _record_cuda_graph
        self._ready: dict[tuple, tuple[Tensor, Tensor, Callable]] = {}

    def decode(
        self, model: InferenceModel, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing
    ) -> LogitsIds:
        """As `InferenceModel.decode_and_draw`."""
        count = len(positions)
        num_rows = next((bucket for bucket in BATCH_BUCKETS if bucket >= count), count)
        num_rows = max(count, min(num_rows, model.cache.num_slots))
        num_keys = min(-(-(max(positions) + 1) // KEY_BUCKET) * KEY_BUCKET, model.config.sequence_len)
        columns = drawing.columns.to(model.device, non_blocking=True)
        key = (num_rows, num_keys, drawing.kind)
        if key not in self._ready:
            self._ready[key] = self._prepare(model, num_keys, columns[:, :1].repeat(1, num_rows), drawing.kind)
        own_inputs, own_columns, replay = self._ready[key]
        padding = num_rows - count
        host = torch.tensor([list(range(count)) + [model.cache.num_slots] * padding, [*positions] + [1] * padding])
        own_inputs[:2, :count] = torch.stack((idx, previous))
        own_inputs[2:] = host.to(model.device, non_blocking=True)
        own_columns[:, :count] = columns
        logits, tokens = replay()
        return logits[:count], tokens[:count].clone()  # these are read while the next pass is running

    def _prepare(
        self, model: InferenceModel, num_keys: int, columns: Tensor, kind: tuple
    ) -> tuple[Tensor, Tensor, Callable]:
        """A buffer (4, num_rows) int64 of ids, previous ids, slots and positions, the one of `Drawing`'s columns
        (6, num_rows), and the function that runs on them."""
        inputs = torch.zeros(4, columns.size(1), dtype=torch.int64, device=model.device)
        inputs[2] = model.cache.num_slots

        def run() -> LogitsIds:
            logits = model._decode(*inputs, num_keys=num_keys, num_filled=0)
            return logits, draw(logits, columns, kind)

        return inputs, columns, self._record(run)


def _record_cuda_graph(run: Callable) -> Callable:
    """`run` as a CUDA graph over the tensors it was recorded with; its result is at the same address each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries allocate their workspaces outside of the graph
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> LogitsIds:
        graph.replay()
        return result

    return replay
