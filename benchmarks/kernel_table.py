"""Which backend of attention does what: the table of docs/kernels.md, from what the backends say of themselves.

python -m benchmarks.kernel_table
"""

from dataclasses import replace

from pallas_kernels.attention import BackendName, Chip, Question, cannot
from pallas_kernels.masks import Blocks, Causal, Documents, Full, Prefix, Window
from pallas_kernels.patterns import Chosen, LocalGlobal

CHIPS: dict[BackendName, Chip] = {
    "cudnn": Chip("gpu", "NVIDIA H200", 9.0),
    "hopper": Chip("gpu", "NVIDIA H200", 9.0),
    "splash": Chip("tpu", "TPU v5"),
    "tpu": Chip("tpu", "TPU v5"),
    "chunked": Chip("cpu", "cpu"),
    "plain": Chip("cpu", "cpu"),
}
PACKED = Causal() & Documents()
USUAL = Question(
    chip=CHIPS["plain"],
    dtype="bfloat16",
    mask=Causal(),
    rows=1,
    queries=1024,
    keys=1024,
    heads=8,
    kv_heads=8,
    head_size=128,
    value_size=128,
)
ASKED: dict[str, dict] = {
    "full": {"mask": Full()},
    "causal": {},
    "window": {"mask": Causal() & Window(255)},
    "window, both ways": {"mask": Window(255, 255)},
    "documents": {"mask": PACKED},
    "documents, both ways": {"mask": Documents()},
    "prefix-LM": {"mask": (Causal() | Prefix()) & Documents()},
    "block patterns": {"mask": Blocks(LocalGlobal()) & PACKED},
    "pattern of blocks of 32": {"mask": Blocks(LocalGlobal(block=32)) & Causal()},
    "any matrix of blocks": {"mask": Blocks(Chosen(rows=((True,) * 8,) * 8))},
    "window or prefix (no interval)": {"mask": Window(255) | Prefix()},
    "GQA": {"kv_heads": 2},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "head size 64": {"head_size": 64, "value_size": 64},
    "head size 80": {"head_size": 80, "value_size": 80},
    "head size 256": {"head_size": 256, "value_size": 256},
    "head sizes 192 and 128": {"head_size": 192},
    "any length": {"queries": 1000, "keys": 1000},
    "T != S": {"queries": 512},
    "explicit positions (rings)": {"positions": True, "key_segments": True, "mask": PACKED},
    "soft-cap": {"softcap": True},
    "lse, sinks": {"lse": True},
    "dropout": {"dropout": True},
}


def table() -> str:
    lines = [f"| | {' | '.join(CHIPS)} |", "|---" * (len(CHIPS) + 1) + "|"]
    for what, changes in ASKED.items():
        answers = (cannot(name, replace(USUAL, chip=chip, **changes)) for name, chip in CHIPS.items())
        lines.append(f"| {what} | {' | '.join('yes' if answer is None else '-' for answer in answers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
