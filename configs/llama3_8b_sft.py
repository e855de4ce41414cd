"""Supervised fine-tuning of Llama-3-8B at 4096 tokens, all parameters, laid out for v5p:4x4x4.

    rlhf-jax train --config configs/llama3_8b_sft.py --config.data.train=…jsonl --config.init_from=models/Meta-Llama-3-8B --workdir DIR
    rlhf-jax train --config configs/llama3_8b_sft.py:tiny --workdir runs/llama3_8b_sft_tiny      two steps in CI, seconds on a CPU
    rlhf-jax compile --config configs/llama3_8b_sft.py --topology v5p:4x4x4      whether it fits there, and what bounds it; no TPU needed

What is not written here is configs/sft.py's.
"""

from ml_collections import ConfigDict

from rlhf_jax.cli.configs import like


def get_config(arg: str = "") -> ConfigDict:
    c = like(__file__, "sft", arg)
    if arg:
        return c
    c.model.update(
        vocab_size=128_256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, context=4096, rope_theta=500_000.0,
    )
    c.data.update(max_length=4096, template="inherit")
    c.run.update(batch_size=64, microbatches=1)  # a row a chip
    # Not fsdp = 64: on a three-dimensional torus the compiler reduces what it should gather over so many chips (BUILD_NOTES.md).
    c.mesh.update(data=4, fsdp=16, multihost=True)
    return c
