"""Direct preference optimisation from the SFT policy, which is also the reference.

    rlhf-jax train --config configs/dpo.py --config.data.train=…jsonl --config.init_from=runs/sft --workdir DIR
    rlhf-jax train --config configs/dpo.py:tiny --workdir runs/dpo_tiny      two steps in CI, seconds on a CPU

`:demo` holds the values that `make demo` trains with (experiments/demo/pipeline.py sets its files).
"""

from ml_collections import ConfigDict

from rlhf_jax.data import sample_file


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.network = "policy"  # which network trains: policy | reward
    c.init_from = ""  # a run's workdir or checkpoint; "" draws fresh parameters
    c.trainable = ".*"  # regular expression over parameter paths; what does not match stays frozen
    c.reference_from = "init"  # "" = none; "init" = the initial policy; or a run

    c.objective = ConfigDict(dict(name="dpo", beta=0.1))

    c.model = ConfigDict(dict(
        family="llama",  # rlhf_jax/models/families; "inherit" = init_from's architecture and sizes, whatever is written here
        add_tokens=(),  # special tokens to add to init_from's tokenizer; their rows start as the mean of the others
        vocab_size=32_000,  # tokens, at least the tokenizer's
        hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=5632,  # 1 B parameters
        context=2048,  # tokens
        rope_theta=10_000.0, norm_eps=1e-5, tied=False, dropout=0.0,
        param_dtype="float32", compute_dtype="bfloat16",
        scan_layers=True, remat="full",
        logits_chunk=512,  # positions of a row whose logits exist at once; 0 = all
    ))
    c.lora = ConfigDict(dict(
        rank=0,  # of low-rank adapters beside frozen kernels; 0 = none, the kernels themselves train
        alpha=16.0, targets="query|key|value|output|gate|up|down", dropout=0.0, rslora=False, dora=False,
        base="same",  # the frozen kernels: same (as param_dtype) | bfloat16 | int8 | nf4
    ))
    c.tokenizer = ConfigDict(dict(
        kind="inherit",  # byte | bpe (trained on data.train) | file | inherit (init_from's)
        path="", vocab_size=0,
        pad="<|pad|>", bos="<|bos|>", end="<|end|>",  # control tokens of a file
    ))

    c.data = ConfigDict(dict(
        kind="preference",
        train="",  # JSONL file or folder
        valid="",
        template="plain",  # chat template: a name in rlhf_jax/data/templates, a file, or inherit (init_from's)
        max_length=2048,  # tokens of a row
        prompt_length=1024,  # tokens; longer prompts are an error
        pack=False,  # several rows per sequence, attention kept apart
        overlong="truncate",  # error | truncate | skip, counted
        cache="",  # folder of prepared data; "" = ~/.cache/rlhf_jax
    ))

    c.run = ConfigDict(dict(
        steps=0,  # batches; 0 = as many as data_epochs needs
        data_epochs=1.0,
        batch_size=64,  # rows
        microbatches=8,  # gradient accumulation
        epochs=1,  # passes over a batch
        minibatches=1,  # updates per pass
        max_nonfinite=10,  # skipped updates in a row after which the run stops
        watchdog=0.0,  # seconds a step may take before the process ends with exit code 76, to be started again; 0 = off
    ))

    c.optimizer = ConfigDict(dict(
        name="adamw",  # adamw | muon
        lr=5e-7, schedule="cosine", warmup_steps=100, end_lr_ratio=0.1,
        b1=0.9, b2=0.999, eps=1e-8, muon_beta=0.95,
        weight_decay=0.01,  # not on norms and biases
        clip_norm=1.0,  # global; 0 = off
        ema_decay=0.0,  # evaluate a moving average of the parameters; 0 = off
        moment_dtype="float32",
    ))

    c.validation = ConfigDict(dict(
        every=0,  # batches; 0 = never
        batches=0,  # 0 = the whole set
        metric="eval/loss/dpo", mode="min",  # what early stopping and the best checkpoint go by
        patience=0,  # validations without improvement after which the run stops; 0 = never
    ))
    c.checkpoint = ConfigDict(dict(every=500, keep=2))  # batches; newest kept
    c.mesh = ConfigDict(dict(  # devices; -1 = what is left
        data=1, fsdp=-1, expert=1,
        sequence=1,  # over which the tokens of a row are spread, for long contexts; divides max_length, or prompt_length + max_new_tokens
        tensor=1, devices=0,  # devices 0 = all
        slices=1,  # TPU slices of a multislice job, which data is laid across
        rules="tensor",  # what the axis tensor does: tensor (splits kernels and what they compute) | fsdp2d (splits kernels and rows, as fsdp)
        multihost=False, heartbeat=100,  # several processes, see rlhf_jax/distributed.py; seconds after which a silent one counts as dead
    ))
    c.log = ConfigDict(dict(every=10, samples=0, tensorboard=True, wandb=""))  # wandb: a project's name

    if arg == "tiny":
        _tiny(c)
    elif arg == "demo":
        _demo(c)
    elif arg:
        raise ValueError(f"configs/dpo.py:{arg}: the variants are tiny and demo")
    return c


def _small_model(c: ConfigDict) -> None:
    c.model.update(
        vocab_size=264, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=176, context=128, norm_eps=1e-6,
        compute_dtype="float32", scan_layers=False, remat="none", logits_chunk=0,
    )
    c.tokenizer.update(kind="byte", vocab_size=0)
    c.mesh.update(data=1, fsdp=1, devices=1)


def _tiny(c: ConfigDict) -> None:
    _small_model(c)
    c.data.update(train=sample_file("preference"), valid=sample_file("preference"), max_length=64, prompt_length=48)
    c.run.update(steps=4, data_epochs=0.0, batch_size=4, microbatches=2)
    c.optimizer.update(lr=1e-3, warmup_steps=0)
    c.validation.update(every=2, batches=1)
    c.checkpoint.every = 1
    c.log.update(every=1, tensorboard=False)


def _demo(c: ConfigDict) -> None:
    """Tuned on two cores; see BUILD_NOTES.md."""
    _small_model(c)
    c.tokenizer.kind = "inherit"
    c.data.update(max_length=48, prompt_length=36)
    c.objective.update(beta=0.3)
    c.run.update(steps=200, data_epochs=0.0, batch_size=64, microbatches=1)
    c.optimizer.update(lr=1e-4, warmup_steps=20)
    c.validation.update(every=100)
    c.checkpoint.update(every=50, keep=4)
