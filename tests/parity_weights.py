"""GPT-2 and Llama as transformers computes them: what test_parity compares with, by our names and shapes.

Imports torch and transformers: only test_parity imports this, and only where they are.
"""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
import torch
import transformers

from mtx.layers import Gelu, Learned, Rotary, SwiGLU
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Steps

IGNORED = -100
"""A label that transformers' loss leaves out."""


def fresh(config: Transformer) -> transformers.PreTrainedModel:
    """transformers' model of a config, with the initial weights that transformers gives it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gpt2(config) if isinstance(config.mlp, Gelu) else llama(config)
    model.set_attn_implementation("eager")
    return model.eval()


def random(config: Transformer) -> transformers.PreTrainedModel:
    """Weights with which logits, attention, gains and biases are far from what initial ones make of them."""
    model, noise = fresh(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.ndim > 1 else 0.2
            centre = 0.0 if parameter.ndim > 1 else parameter
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=noise))
    return model


def gpt2(config: Transformer) -> transformers.GPT2LMHeadModel:
    assert isinstance(config.mlp, Gelu) and isinstance(config.positions, Learned)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.positions.length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.attention.heads,
            n_inner=config.mlp.width,
            activation_function="gelu_new" if config.mlp.approximate else "gelu",
            layer_norm_epsilon=config.norm.epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(config: Transformer) -> transformers.LlamaForCausalLM:
    assert isinstance(config.mlp, SwiGLU) and isinstance(config.positions, Rotary)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.attention.heads,
            num_key_value_heads=config.attention.kv_heads,
            head_dim=config.attention.head_size,
            intermediate_size=config.mlp.width,
            max_position_embeddings=64,
            rms_norm_eps=config.norm.epsilon,
            rope_parameters=rope(config.positions),
            attention_bias=config.bias,
            mlp_bias=config.bias,
            tie_word_embeddings=config.tied_head,
        )
    )


def rope(rotary: Rotary) -> dict:
    if (s := rotary.scaling) is None:
        return {"rope_type": "default", "rope_theta": rotary.theta}
    return {
        "rope_type": "llama3",
        "rope_theta": rotary.theta,
        "factor": s.factor,
        "low_freq_factor": s.low_frequency_factor,
        "high_freq_factor": s.high_frequency_factor,
        "original_max_position_embeddings": s.original_length,
    }


# What it computes


def logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits_BTV of rows that begin at position 0."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens_BT).long()).logits.numpy()


def loss(model: transformers.PreTrainedModel, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """transformers' own loss of a batch without packing. It moves labels by one: no last target may count."""
    assert not arrays["weights"][:, -1].any() and set(np.unique(arrays["weights"])) == {0.0, 1.0}
    labels = np.full(arrays["targets"].shape, IGNORED, np.int64)
    labels[:, 1:] = np.where(arrays["weights"] > 0, arrays["targets"], IGNORED)[:, :-1]
    return model(input_ids=torch.from_numpy(arrays["tokens"]).long(), labels=torch.from_numpy(labels)).loss


def gradients(config: Transformer, model, arrays: Mapping[str, np.ndarray]) -> tuple[dict, float]:
    """(gradients of the mean loss, the loss)."""
    model.zero_grad()
    value = loss(model, arrays)
    value.backward()
    found = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    return ours(config, found, padding=0.0), value.item()


def train(model, optimizer: AdamW, batches: Iterable[Mapping[str, np.ndarray]]) -> list[dict[str, float]]:
    """Steps of torch.optim.AdamW under transformers' schedule, and what each step reports, by our metrics' names."""
    s = optimizer.schedule
    assert isinstance(s, Cosine) and isinstance(s.warmup, Steps) and isinstance(s.end, Steps)
    assert optimizer.clip_norm is not None
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=s.peak_lr, betas=(optimizer.b1, optimizer.b2), eps=optimizer.epsilon)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        adamw, s.warmup.count, s.end.count, min_lr_rate=s.final_share
    )
    rows = []
    for step, arrays in enumerate(batches, start=1):
        adamw.zero_grad()
        value = loss(model, arrays)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = s.peak_lr * schedule.lr_lambdas[0](step)
        adamw.step()
        rows.append({"train/loss": value.item(), "train/grad_norm": norm.item(), "lr": adamw.param_groups[0]["lr"]})
    return rows


# Its tensors, by our names and in our shapes: weights and gradients alike


def weights(config: Transformer, model: transformers.PreTrainedModel, padding: float = 0.7) -> dict:
    """Our params. The vocabulary's padding is large, so that whoever reads it is seen."""
    return ours(config, {name: p.detach().numpy().copy() for name, p in model.named_parameters()}, padding)


def ours(config: Transformer, theirs: Mapping[str, np.ndarray], padding: float) -> dict:
    names = gpt2_names if isinstance(config.mlp, Gelu) else llama_names
    left = dict(theirs)

    def pad(table_VD: np.ndarray) -> np.ndarray:
        return np.pad(table_VD, ((0, config.padded_vocab - config.vocab_size), (0, 0)), constant_values=padding)

    ends, blocks = names(config, left.pop, pad)
    assert not left, f"not mapped: {sorted(left)}"
    return {"ends": ends, "stacks": {"main": {"block": jax.tree.map(lambda *parts: np.stack(parts), *blocks)}}}


def gpt2_names(config: Transformer, take, pad) -> tuple[dict, list[dict]]:
    """Its projections are (in, out); c_attn's columns are all queries, then all keys, then all values."""
    N, H = config.attention.heads, config.head_size

    def norm(name: str) -> dict:
        return {"gain_D": take(f"{name}.weight"), "bias_D": take(f"{name}.bias")}

    def block(at: str) -> dict:
        qkv = take(f"{at}.attn.c_attn.weight").reshape(-1, 3, N, H)
        bias = take(f"{at}.attn.c_attn.bias").reshape(3, N, H)
        return {
            "norm_attention": norm(f"{at}.ln_1"),
            "attention": {
                "qkv_DKGH": qkv.swapaxes(1, 2),
                "bias_KGH": bias.swapaxes(0, 1),
                "out_NHD": take(f"{at}.attn.c_proj.weight").reshape(N, H, -1),
                "out_bias_D": take(f"{at}.attn.c_proj.bias"),
            },
            "norm_mlp": norm(f"{at}.ln_2"),
            "mlp": {
                "in_DF": take(f"{at}.mlp.c_fc.weight"),
                "bias_F": take(f"{at}.mlp.c_fc.bias"),
                "out_FD": take(f"{at}.mlp.c_proj.weight"),
                "out_bias_D": take(f"{at}.mlp.c_proj.bias"),
            },
        }

    ends = {
        "token_VD": pad(take("transformer.wte.weight")),
        "position_CD": take("transformer.wpe.weight"),
        "norm": norm("transformer.ln_f"),
    }
    return ends, [block(f"transformer.h.{i}") for i in range(config.layers)]


def llama_names(config: Transformer, take, pad) -> tuple[dict, list[dict]]:
    """Its projections are (out, in); consecutive query heads share a key and value head."""
    N, H = config.attention.heads, config.head_size
    K = config.attention.kv_heads or N

    def norm(name: str) -> dict:
        return {"gain_D": take(f"{name}.weight")}

    def packed(at: str, kind: str) -> np.ndarray:
        """(K, G, H, ...): each group's queries, its key, its value."""
        q, k, v = (take(f"{at}.self_attn.{letter}_proj.{kind}") for letter in "qkv")
        rest = q.shape[1:]
        q, k, v = q.reshape(K, N // K, H, *rest), k.reshape(K, 1, H, *rest), v.reshape(K, 1, H, *rest)
        return np.concatenate([q, k, v], axis=1)

    def block(at: str) -> dict:
        gate, up = (take(f"{at}.mlp.{name}_proj.weight") for name in ("gate", "up"))
        attention = {
            "qkv_DKGH": np.moveaxis(packed(at, "weight"), -1, 0),
            "out_NHD": take(f"{at}.self_attn.o_proj.weight").T.reshape(N, H, -1),
        }
        mlp = {"in_DJF": np.stack([gate.T, up.T], axis=1), "out_FD": take(f"{at}.mlp.down_proj.weight").T}
        if config.bias:
            gate, up = (take(f"{at}.mlp.{name}_proj.bias") for name in ("gate", "up"))
            attention |= {"bias_KGH": packed(at, "bias"), "out_bias_D": take(f"{at}.self_attn.o_proj.bias")}
            mlp |= {"bias_JF": np.stack([gate, up]), "out_bias_D": take(f"{at}.mlp.down_proj.bias")}
        return {
            "norm_attention": norm(f"{at}.input_layernorm"),
            "attention": attention,
            "norm_mlp": norm(f"{at}.post_attention_layernorm"),
            "mlp": mlp,
        }

    ends = {"token_VD": pad(take("model.embed_tokens.weight")), "norm": norm("model.norm")}
    if not config.tied_head:
        ends["head_VD"] = pad(take("lm_head.weight"))
    return ends, [block(f"model.layers.{i}") for i in range(config.layers)]
