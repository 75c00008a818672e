import torch
from nanochat.engine.sampling import draw


def cap_and_draw(z, columns, kind, softcap, vocab_size):
    l = softcap * torch.tanh(z[:, :vocab_size].float() / softcap)
    return l, draw(l, columns, kind)
