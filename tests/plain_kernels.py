"""What the engine's GPU kernels compute, in PyTorch's operations: the reference they are tested against, and with which
`GpuModel` runs on any machine at the speed of a test."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.engine.sampling import draw
from nanochat.model.gpt import VALUE_GATE_SCALE, norm

PAGE = 8  # small, so that short sequences have several


def mix_and_norm(x, added, other, scales):
    mixed = x.float()
    if added is not None:
        mixed = mixed + added.float().reshape(-1, *x.shape).sum(0)
    if other is not None:
        mixed = scales[0].float() * mixed + scales[1].float() * other.float()
    mixed = mixed.to(x.dtype)
    return mixed, norm(mixed)


def place_heads(joined, at, places, keys, values, angles, num_heads, qk_scale, idx, value_embeds):
    _, H_kv, D = keys.shape
    heads = joined[:, : (num_heads + 2 * H_kv) * D].float().unflatten(1, (-1, D))
    q, k, v = heads.split((num_heads, H_kv, H_kv), dim=1)
    cos, sin = angles[at.long(), None].chunk(2, dim=-1)

    def turn(x):
        x1, x2 = norm(x).chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

    if value_embeds is not None:
        gates = VALUE_GATE_SCALE * torch.sigmoid(joined[:, heads.size(1) * D :][:, :H_kv, None].float())
        v = v + gates * value_embeds[idx].float().unflatten(1, (H_kv, D))
    keys[places.long()], values[places.long()] = turn(k).to(keys.dtype), v.to(values.dtype)
    return (turn(q) * qk_scale).to(joined.dtype)


def attend_to_pages(q, keys, values, table, at, window, num_splits):
    """With splits, the first one has everything. Entry i of a ring holds the newest position that is i modulo its
    length."""
    N, H, D = q.shape
    entry = torch.arange(table.size(1) * PAGE)
    places = table.long()[:, entry // PAGE] * PAGE + entry % PAGE  # (N, E * PAGE)
    back = (at[:, None] - entry) % len(entry)  # how far behind the query
    visible = (back < window) & (back <= at[:, None])
    k, v = (x[places].transpose(1, 2).float() for x in (keys, values))  # (N, H_kv, E * PAGE, D)
    mask = visible[:, None, None]
    out = F.scaled_dot_product_attention(q[:, :, None].float(), k, v, attn_mask=mask, enable_gqa=k.size(1) != H)
    out = out.squeeze(2).to(q.dtype)
    if num_splits == 1:
        return out, q.new_empty(0), q.new_empty(0)
    parts, peaks, sums = torch.zeros(num_splits, N, H, D), torch.zeros(num_splits, N, H), torch.zeros(num_splits, N, H)
    peaks[1:] = -torch.inf
    parts[0], sums[0] = out.float(), 1
    return parts, peaks, sums


def join_splits(parts, peaks, sums, dtype):
    weights = (peaks - peaks.amax(0)).exp()
    return ((parts * weights.unsqueeze(-1)).sum(0) / (weights * sums).sum(0).unsqueeze(-1)).to(dtype)


def relu_squared_(x):
    x.copy_(x.float().relu().square())


def few_rows_product(x, weight, step=None, *, relu_squared=False, num_splits=1):
    weight = weight.float() if step is None else weight.float() * step.float()[:, None]
    if num_splits > 1:
        parts = zip(x.float().tensor_split(num_splits, 1), weight.tensor_split(num_splits, 1), strict=True)
        return torch.stack([a @ b.T for a, b in parts])
    y = (x.float() @ weight.T).to(x.dtype)
    return y.relu().square() if relu_squared else y


def cap_and_draw(z, columns, kind, softcap, vocab_size):
    logits = softcap * torch.tanh(z[:, :vocab_size].float() / softcap)
    return logits, draw(logits, columns, kind)


KERNELS = (mix_and_norm, place_heads, attend_to_pages, join_splits, relu_squared_, few_rows_product, cap_and_draw)


@pytest.fixture(scope="module")
def plain_gpu_model():
    """`GpuModel`, computing with these, with small pages, and running its decode passes instead of recording them."""
    pytest.importorskip("triton")
    from nanochat.engine import gpu, gpu_blocks, pages

    with pytest.MonkeyPatch.context() as patch:
        for kernel in KERNELS:
            module = gpu_blocks if hasattr(gpu_blocks, kernel.__name__) else gpu
            patch.setattr(module, kernel.__name__, kernel)
        patch.setattr(gpu_blocks, "choose_splits", lambda M, K: 2)
        patch.setattr(gpu._DecodeGraphs, "_record", lambda self, run: run)
        patch.setattr(pages, "PAGE", PAGE)
        yield gpu.GpuModel
