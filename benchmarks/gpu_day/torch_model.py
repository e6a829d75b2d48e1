"""The rival of part 5: the same transformer in torch, with torch.compile, its best attention and fused AdamW."""

import contextlib
import statistics
import time
from typing import Any

import torch  # pyrefly: ignore[missing-import]
import torch.nn.functional as F  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]
from torch.nn.attention import SDPBackend, sdpa_kernel  # pyrefly: ignore[missing-import]

from mtx.layers import LayerNorm, Learned, Rotary, SwiGLU
from mtx.model import Transformer

OutOfMemory = torch.OutOfMemoryError


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: Transformer):
        super().__init__()
        D, H, N = config.width, config.head_size, config.attention.heads
        K, width, bias = config.attention.kv_heads or N, config.mlp.width, config.bias
        self.heads, self.gated = (N, K, H), isinstance(config.mlp, SwiGLU)
        self.norm_attention, self.norm_mlp = _norm(config), _norm(config)
        self.qkv = nn.Linear(D, (N + 2 * K) * H, bias=bias)
        self.out = nn.Linear(N * H, D, bias=bias)
        self.up = nn.Linear(D, width * (2 if self.gated else 1), bias=bias)
        self.down = nn.Linear(width, D, bias=bias)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        (N, K, H), (B, T, _) = self.heads, x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, T, N + 2 * K, H).transpose(1, 2).split((N, K, K), dim=1)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=N != K)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, N * H))
        h = self.up(self.norm_mlp(x))
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(h, approximate="tanh"))


class Model(nn.Module):
    """Returns the mean cross entropy of a batch."""

    def __init__(self, config: Transformer):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.padded_vocab, config.width)
        positions = config.positions
        self.position = nn.Embedding(positions.length, config.width) if isinstance(positions, Learned) else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = _norm(config)
        self.head = self.token if config.tied_head else nn.Linear(config.width, config.padded_vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=config.init_std)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        time = torch.arange(tokens.shape[1], device=tokens.device)
        rotation = None
        if self.position is not None:
            x = x + self.position(time)
        else:
            assert isinstance(self.config.positions, Rotary)
            H = self.config.head_size
            rate = self.config.positions.theta ** (-torch.arange(0, H, 2, device=tokens.device) / H)
            angle = time[:, None] * rate
            rotation = (angle.cos(), angle.sin())
        for block in self.blocks:
            x = block(x, rotation)
        return self.loss(x, targets)

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.norm(x), self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _norm(config: Transformer) -> nn.Module:
    if isinstance(config.norm, LayerNorm):
        return nn.LayerNorm(config.width, eps=config.norm.epsilon)
    return nn.RMSNorm(config.width, eps=config.norm.epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def best_attention(device: str) -> contextlib.AbstractContextManager:
    """cuDNN's kernel, which is the quickest on Hopper, then FlashAttention 2."""
    if device == "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def train(config: Transformer, rows: int, time_T: int, steps: int) -> dict[str, Any]:
    """Trains some steps on random tokens: bfloat16 compute by autocast, float32 masters, gradients clipped at norm 1.

    Returns: `parameters`, `compile_s`, `step_s` (median), `host_s` (median time that the host takes to launch a step),
    `peak_bytes` and `loss` (of the first step).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # what an earlier model left
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Model(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if device == "cuda":
        for block in model.blocks:  # alike, so that torch compiles one
            block.compile()
        model.loss = torch.compile(model.loss)
    tokens = torch.randint(config.vocab_size, (rows, time_T + 1), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16), best_attention(device):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    first = step().item()
    compile_s = time.perf_counter() - start
    step()
    wait()
    rounds, host = [], []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            launched = time.perf_counter()
            step()
            host.append(time.perf_counter() - launched)
        wait()
        rounds.append((time.perf_counter() - start) / steps)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "compile_s": compile_s,
        "step_s": statistics.median(rounds),
        "host_s": statistics.median(host),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "loss": first,
    }
