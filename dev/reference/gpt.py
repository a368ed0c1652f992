"""GPT-2 in plain PyTorch on flat tokens: what train_gpt computes, written as a person would write it today.

Runs on Debian's PyTorch 1.13 and on current releases. Parameter names and shapes are those of a checkpoint of ours
(matrices [out, in]). dev/tests/test_reference.py compares train_gpt's tensors with this file's, dev/bench/cpu_vs_torch
its speed. N tokens in all sequences together, C channels, NH heads, HS head size, V vocabulary.
"""
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

HAS_FUSED_ATTENTION = hasattr(F, "scaled_dot_product_attention")


@dataclass
class Config:
    layers: int
    channels: int
    heads: int
    context: int
    vocab: int
    tied: bool = True

    def flops_per_token(self, length):
        """Training FLOPs: 6 for each weight of a matrix product, causal attention at half the square."""
        weights = 12 * self.layers * self.channels**2 + self.vocab * self.channels
        return 6 * weights + 6 * self.layers * self.channels * length


def causal_attention(q, k, v):  # [S, NH, T, HS] each -> [S, NH, T, HS]
    if HAS_FUSED_ATTENTION:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


def packed_attention(qkv, lengths, heads):  # [N, 3C] -> [N, C]
    """Block-diagonal causal attention: sequences lie one after the other; neighbours of equal length go together."""
    out, begin = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        rows = qkv[begin : begin + count * length].view(count, length, 3, heads, -1)  # [S, T, 3, NH, HS]
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        out.append(causal_attention(q, k, v).transpose(1, 2).reshape(count * length, -1))
        begin += count * length
    return out[0] if len(out) == 1 else torch.cat(out)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.c_attn = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, channels)


class MLP(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.c_fc = nn.Linear(channels, 4 * channels)
        self.c_proj = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn = Attention(channels)
        self.ln_2 = nn.LayerNorm(channels, eps=1e-5)
        self.mlp = MLP(channels)

    def pre_attention(self, x):  # [N, C] -> [N, 3C]
        return self.attn.c_attn(self.ln_1(x))

    def post_attention(self, x, attended):  # [N, C], [N, C] -> [N, C]
        x = x + self.attn.c_proj(attended)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.channels)
        self.wpe = nn.Embedding(config.context, config.channels)
        self.h = nn.ModuleList(Block(config.channels) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.channels, eps=1e-5)
        if not config.tied:
            self.lm_head = nn.Linear(config.channels, config.vocab, bias=False)

    def forward(self, tokens, lengths, borders=None):  # [N] -> logits [N, V]
        """`borders`, a dictionary, receives what passes between embed, pre, attention, post and head."""

        def keep(name, x):
            if borders is not None:
                borders[name] = x
                x.retain_grad()
            return x

        positions = [torch.arange(length, device=tokens.device) for length in lengths]
        x = keep("embed", self.wte(tokens) + self.wpe(torch.cat(positions)))
        for l, block in enumerate(self.h):
            qkv = keep(f"pre.{l}.qkv", block.pre_attention(x))
            attended = keep(f"attention.{l}.out", packed_attention(qkv, lengths, self.config.heads))
            x = keep(f"post.{l}.out", block.post_attention(x, attended))
        return F.linear(self.ln_f(x), self.wte.weight if self.config.tied else self.lm_head.weight)


def token_losses(logits, targets):  # [N, V], [N] -> [N]; 0 where the target is -1
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def parameter_groups(model, weight_decay):
    """Weight decay acts on matrices, not on biases and LayerNorms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def clip_gradients(parameters, clip):
    """Scales all gradients so that their common norm is at most `clip`, 0 = no limit. (PyTorch's own function adds 1e-6
    to the norm that it divides by, which comparisons in fp64 would show.)"""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    if 0 < clip < norm:
        for p in parameters:
            p.grad.mul_(clip / norm)


def adamw(w, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """One AdamW update in closed form, in place; `step` counts from 1."""
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    direction = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    w.sub_(lr * (direction + weight_decay * w))
