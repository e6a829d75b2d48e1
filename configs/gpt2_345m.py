"""GPT-2 345M as Megatron-LM trained it in 2019 (Shoeybi et al. 2019, sections 3 and 4).

From the paper: 24 layers of width 1024 with 16 heads, sequences of 1024, 512 of them a step, 300k steps;
learning rate 1.5e-4 after 3k steps of warm-up, then one cosine down to 1e-5; Adam with weight decay 0.01,
gradients clipped at norm 1, dropout 0.1, initial weights N(0, 0.02) with residual projections divided by
sqrt(2 layers), activations recomputed per layer. The vocabulary of 50,257 is padded to 51,200, a multiple
of 1024. Its script (pretrain_gpt2.sh) has 320k iterations instead. Adam's betas are PyTorch's, the
defaults of that code. Attention crosses documents, as it did there.

Not reproduced: the text (174 GB of deduplicated web pages, news, stories and Wikipedia, on which the
released 345M checkpoint has a WikiText-103 perplexity of 19.31). The only data here are Python's
documentation as bytes, which leave most of the vocabulary unused; losses say nothing about Megatron's.
"""

from data import Concatenate, PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import Gelu, LayerNorm, Learned
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Steps


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=50_257,
            vocab_multiple=1024,
            layers=24,
            width=1024,
            attention=AttentionConfig(heads=16),
            mlp=Gelu(width=4096),
            norm=LayerNorm(epsilon=1e-5),
            positions=Learned(length=1024),
            dropout=0.1,
            attention_dropout=0.1,
            remat="full",
        ),
        data=PythonDocs(),
        packing=Concatenate(isolate_documents=False),
        batch=BatchConfig(global_size=512, micro_size=8, sequence_length=1024),
        optimizer=AdamW(
            b1=0.9,
            b2=0.999,
            weight_decay=0.01,
            clip_norm=1.0,
            schedule=Cosine(
                peak_lr=1.5e-4, warmup=Steps(count=3000), end=Steps(count=300_000), final_share=1e-5 / 1.5e-4
            ),
        ),
        mesh=MeshConfig(data=-1),
        steps=300_000,
        eval_every=1000,
    )
