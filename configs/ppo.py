"""PPO with a learned critic on a reward model's score and a per-token KL penalty.

    rlhf-jax train --config configs/ppo.py --config.data.train=…jsonl --config.init_from=runs/sft --config.reward_from=runs/reward --workdir DIR
    rlhf-jax train --config configs/ppo.py:tiny --workdir runs/ppo_tiny      two steps in CI, seconds on a CPU

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
    c.reward_from = ""  # a reward model's run; or
    c.reward_fn = ""  # rules.NAME, or dotted path of a function (prompts, responses, references) -> scores; or
    c.rewards = ()  # several, weighted: dicts, see rlhf_jax/rewards/README.md
    c.reward_normalise = True  # reward_from, by the mean and deviation stored with it
    c.reward_failure = ConfigDict(dict(  # a reward that raises, takes too long or gives no finite number
        policy="raise", default=0.0,  # raise | mask (no training on the row) | default (this number instead)
        timeout=0.0,  # seconds a call may take; 0 = as long as it takes
    ))
    c.env = ConfigDict(dict(  # episodes of several turns, scored by the environment in a reward's place; see rlhf_jax/envs/README.md
        name="",  # calculator | guess | dotted path of your own; "" = one response per prompt
        max_turns=4,  # of the policy; sampling.max_new_tokens is the most of one turn
        max_tokens=1024,  # of an episode after the prompt, replies included
        widths=2, halvings=2,  # later turns are compiled for so many lengths, and for batches halved up to so many times
        parameters=ConfigDict(),  # the environment's own
    ))
    c.fused = True  # one jitted iteration where the reward allows it
    c.critic = ConfigDict(dict(kind="separate", init_from="policy"))  # none | shared (trunk) | separate; init_from: policy | a run | ""

    c.objective = ConfigDict(dict(
        name="ppo", kl_coef=0.05, kl_target=6.0, kl_horizon=float("inf"),  # a finite horizon (sequences, > 0.2 batches) adapts it
        kl_estimator="k1",  # k1 | k2 | k3
        gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, value_coef=0.1, entropy_coef=0.0,
        dual_clip=float("inf"),  # largest ratio that counts where the advantage is negative
        missing_eos_penalty=1.0, reward_scale=1.0, reward_clip=float("inf"), whiten_rewards=False,
        correction="none", correction_low=0.0, correction_high=3.0,  # old/sampler: none | token_ | sequence_ with truncate | mask
    ))

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
        kind="prompt",
        train="",  # JSONL file or folder
        valid="",
        template="plain",  # chat template: a name in rlhf_jax/data/templates, a file, or inherit (init_from's)
        max_length=2048,  # tokens of a row
        prompt_length=1024,  # tokens; longer prompts are an error
        pack=False,  # several rows per sequence, attention kept apart
        overlong="error",  # error | truncate | skip, counted
        cache="",  # folder of prepared data; "" = ~/.cache/rlhf_jax
    ))

    c.run = ConfigDict(dict(
        steps=1000,  # batches; 0 = as many as data_epochs needs
        data_epochs=0.0,
        batch_size=256,  # completions per iteration
        microbatches=4,  # gradient accumulation
        epochs=4,  # passes over a batch
        minibatches=4,  # updates per pass
        max_nonfinite=10,  # skipped updates in a row after which the run stops
        watchdog=0.0,  # seconds a step may take before the process ends with exit code 76, to be started again; 0 = off
    ))
    c.sampling = ConfigDict(dict(
        group_size=1,  # samples per prompt
        max_new_tokens=512, temperature=1.0, top_k=0, top_p=1.0,
        filters=(),  # more of them, in their order, e.g. (dict(name="min_p", p=0.05),); see rlhf_jax/sampling/filters.py
        old_logps="trainer",  # log π_old of the first ratio: trainer (a pass of its own) | sampler (its unfiltered ones; the same but for rounding)
        stop_strings=(),  # texts that end a response, beside the tokenizer's stop tokens; the token that completes one is kept
        cache="same",  # precision of the sampler's keys and values: same (as compute_dtype) | bfloat16 | int8
        slots=0,  # rows decoded at once, those that have ended replaced by others of the batch; 0 = all of the batch
    ))
    c.schedule = ConfigDict(dict(  # all zeros: synchronous; rlhf_jax/train/schedule.py
        ahead=0,  # iterations between the weights that draw a rollout and the update that trains on it
        refill=0,  # further rounds of sampling, at most, in the place of groups of equal scores; 0 = these groups stay
        replay=0.0, capacity=0,  # share of a batch's rows that are earlier ones; rows that are kept for it
        refresh=0,  # iterations after which the policy becomes the reference, again and again
        critic_only=0,  # first iterations, in which the critic trains alone
    ))

    c.optimizer = ConfigDict(dict(
        name="adamw",  # adamw | muon
        lr=1e-6, schedule="linear", warmup_steps=100, end_lr_ratio=0.0,
        b1=0.9, b2=0.999, eps=1e-8, muon_beta=0.95,
        weight_decay=0.01,  # not on norms and biases
        clip_norm=1.0,  # global; 0 = off
        ema_decay=0.0,  # evaluate a moving average of the parameters; 0 = off
        moment_dtype="float32",
    ))

    c.validation = ConfigDict(dict(
        every=0,  # batches; 0 = never
        batches=0,  # 0 = the whole set
        metric="eval/objective/score", mode="max",  # what early stopping and the best checkpoint go by
        patience=0,  # validations without improvement after which the run stops; 0 = never
    ))
    c.checkpoint = ConfigDict(dict(every=100, keep=2))  # batches; newest kept
    c.mesh = ConfigDict(dict(  # devices; -1 = what is left
        data=1, fsdp=-1, expert=1,
        sequence=1,  # over which the tokens of a row are spread, for long contexts; divides max_length, or prompt_length + max_new_tokens
        tensor=1, devices=0,  # devices 0 = all
        slices=1,  # TPU slices of a multislice job, which data is laid across
        rules="tensor",  # what the axis tensor does: tensor (splits kernels and what they compute) | fsdp2d (splits kernels and rows, as fsdp)
        multihost=False, heartbeat=100,  # several processes, see rlhf_jax/distributed.py; seconds after which a silent one counts as dead
    ))
    c.log = ConfigDict(dict(every=10, samples=4, tensorboard=True, wandb=""))  # wandb: a project's name

    if arg == "tiny":
        _tiny(c)
    elif arg == "demo":
        _demo(c)
    elif arg:
        raise ValueError(f"configs/ppo.py:{arg}: the variants are tiny and demo")
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
    c.data.update(train=sample_file("prompt"), valid=sample_file("prompt"), prompt_length=48)
    c.run.update(steps=4, batch_size=8, microbatches=2, epochs=2, minibatches=2)
    c.reward_fn, c.reward_normalise = "rlhf_jax.rewards.rules.brevity", False
    c.sampling.update(max_new_tokens=8)
    c.optimizer.update(lr=1e-3, warmup_steps=0)
    c.validation.update(every=2, batches=1)
    c.checkpoint.every = 1
    c.log.update(every=1, tensorboard=False)


def _demo(c: ConfigDict) -> None:
    """Tuned on two cores; see BUILD_NOTES.md."""
    _small_model(c)
    c.tokenizer.kind = "inherit"
    c.data.update(prompt_length=36)
    c.run.update(steps=120, batch_size=128, microbatches=1, epochs=2, minibatches=2)
    c.objective.update(kl_coef=0.1)
    c.sampling.update(max_new_tokens=16)
    c.optimizer.update(lr=3e-4, warmup_steps=10)
    c.validation.update(every=40)
    c.checkpoint.update(every=40, keep=3)
