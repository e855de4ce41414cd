"""Converts a Hugging Face directory to a checkpoint of ours, and a run of ours to a Hugging Face directory.

  rlhf-jax convert --from-hf models/Llama-3.2-1B --to runs/base
  rlhf-jax convert --from runs/dpo --which best --to-hf export/dpo --dtype bfloat16 --check
  rlhf-jax convert --from runs/lora --to-hf export/adapter --adapter

Either source goes with either target: --from-hf with --to-hf changes a dtype, --from with --to merges adapters. A reward model becomes a sequence
classifier of one label, a value head is kept in a file of its own. Every config takes a Hugging Face directory as it is, so that training needs no
conversion. A target stands whole under its name, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from rlhf_jax.errors import UserError

FLAGS_HELP = {
    "--from-hf DIR": "a Hugging Face directory, or",
    "--from CKPT": "a run's workdir, its best/ or checkpoints/ folder, or one step",
    "--which latest|best|N": "which step of a workdir (default latest)",
    "--to CKPT": "a new workdir that init_from, reference_from, reward_from and every --model take, or",
    "--to-hf DIR": "a new Hugging Face directory; an earlier export is replaced",
    "--dtype float32|bfloat16|float16": "of the parameters (default: as they are; a checkpoint of ours holds no float16)",
    "--adapter": "write the adapters alone, as PEFT has them, instead of merging them into the kernels",
    "--check": "read what was written, and compare it with the source on a probe batch",
}
PROBES, PROBED = 4, 32  # rows and tokens of --check

flags.DEFINE_string("from-hf", "", "Hugging Face directory to read")
flags.DEFINE_string("to", "", "checkpoint to write")
flags.DEFINE_string("from", "", "checkpoint to read")
flags.DEFINE_string("to-hf", "", "Hugging Face directory to write")
flags.DEFINE_string("which", "latest", "step of a workdir")
flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16", "float16"], "of the parameters")
flags.DEFINE_bool("adapter", False, "write the adapters alone")
flags.DEFINE_bool("check", False, "compare what was written with the source")


def main() -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    read, path = _one_of("from-hf", "from", "what is converted")
    write, target = _one_of("to-hf", "to", "where it goes")
    if options.adapter and (write == "to" or options.dtype):
        raise UserError("--adapter writes a PEFT directory with its tensors as they are: name it with --to-hf, and leave out --dtype")
    if write == "to" and options.dtype == "float16":
        raise UserError("--dtype = 'float16': a checkpoint of ours holds float32 or bfloat16; choose one of them")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing needs an accelerator here, which a run in training may hold
    begun = time.monotonic()
    source = _opened(read, path)
    if os.path.realpath(path) == os.path.realpath(target):
        raise UserError(f"--{write} = {target!r} is the source: name a new folder")
    notes = _notes(source)
    if options.adapter:
        written, size, files = _write_adapter(source, target, notes)
    else:
        whole = _whole(source)
        dtype = options.dtype or _dtype(whole, write)
        notes += [f"parameters of {found} are rounded to {dtype}" for found in _rounded(whole, dtype)]
        size, files = _write_checkpoint(whole, target, dtype) if write == "to" else _write_directory(whole, target, dtype, notes)
        written = f"a {source.config.family} {_kind(source)} of {_count(whole.params):,} parameters in {dtype}"
    print(f"{target}: {written}, {_bytes(size)} in {files}, {time.monotonic() - begun:.1f} s")
    for note in notes:
        print(f"rlhf-jax: {note}", file=sys.stderr)
    if options.check:
        print(_checked(source, target, f"--{write}"))
    return 0


def _one_of(first: str, second: str, what: str) -> tuple[str, str]:
    """The flag of the two that is given, and its value."""
    values = {name: str(flags.FLAGS[name].value) for name in (first, second)}
    given = [name for name, value in values.items() if value]
    if len(given) != 1:
        raise UserError(f"--{first} and --{second}: give exactly one of them, to say {what}")
    return given[0], values[given[0]]


def _opened(flag: str, path: str) -> Any:
    """The source; --from-hf takes no run of ours, whose folder was meant for --from."""
    from rlhf_jax import checkpoint
    from rlhf_jax.models.hf.directory import is_directory, open_directory
    from rlhf_jax.saved import load_source

    which: Any = flags.FLAGS.which
    if which not in ("latest", "best"):
        if not which.isdigit():
            raise UserError(f"--which = {which!r}: must be latest, best or a step's number")
        which = int(which)
    foreign = "://" not in path and os.path.isdir(path) and not checkpoint.is_run(path)
    if flag == "from-hf" and "://" not in path and os.path.isdir(path) and not foreign:
        raise UserError(f"--from-hf = {path!r} is a run of rlhf-jax train: name it with --from")
    if flag == "from-hf" and not (foreign and is_directory(path)):
        open_directory(path, "--from-hf")  # says what is missing
    if foreign and which != "latest":
        raise UserError(f"--which = {which!r}: {path!r} is a Hugging Face directory, which has no steps")
    return load_source(path, f"--{flag}", which=which)


def _notes(source: Any) -> list[str]:
    """What the user should know, whatever is written."""
    notes = []
    if source.meta.get("critic_model"):
        notes.append("the separate critic of this run is not converted")
    if source.tokenizer is None:
        notes.append("the source has no tokenizer, so that neither has the target")
    if source.config.quantise != "none" and not flags.FLAGS.adapter:
        notes.append(f"the adapters were trained beside {source.config.quantise} kernels, and are merged into the kernels as they were before that")
    return notes


def _whole(source: Any) -> Any:
    """The source without adapters and quantisation."""
    source = source.for_adapters(None)
    return dataclasses.replace(source, config=dataclasses.replace(source.config, quantise="none"))


def _kind(source: Any) -> str:
    return "reward model" if source.network == "reward" else "policy"


def _bytes(size: int) -> str:
    """A size for people."""
    power = min(max(math.floor(math.log10(max(size, 1)) / 3), 0), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _count(params: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _dtypes(params: Any) -> set[str]:
    """Of all parameters but the value head, which directories keep in float32."""
    import jax

    return {str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "value_head" not in [entry.key for entry in path]}


def _dtype(source: Any, write: str) -> str:
    """The narrowest dtype of the target's that holds every parameter exactly."""
    from rlhf_jax.models.lazy import common_dtype

    common = str(common_dtype([*_dtypes(source.params)]))
    legal = ("float32", "bfloat16") if write == "to" else ("float32", "bfloat16", "float16")
    return common if common in legal else "float32"


def _rounded(source: Any, dtype: str) -> list[str]:
    """The parameters' dtypes that the target's does not hold exactly."""
    from rlhf_jax.models.lazy import common_dtype

    return sorted(name for name in _dtypes(source.params) if str(common_dtype([name, dtype])) != dtype)


# --- a checkpoint of ours ---


def _write_checkpoint(source: Any, target: str, dtype: str) -> tuple[int, str]:
    """A workdir with the one step 0. Returns bytes, and what they lie in."""
    import jax

    from rlhf_jax import checkpoint, distributed
    from rlhf_jax.cli.opened import new_folder
    from rlhf_jax.saved import CONFIG, TEMPLATE, TOKENIZER, place

    with new_folder(target, "--to") as folder:
        # Placed, because Orbax copies what is not: 1.4 GB at most for 0.67 GB of parameters, against 2.3 GB.
        config = dataclasses.replace(source.config, param_dtype=dtype)
        params = place(source.params, dataclasses.replace(config, scan_layers=False), distributed.make_mesh({}, devices=1))
        with checkpoint.Checkpointer(folder / checkpoint.CHECKPOINTS, every=0, keep=1) as saver:
            saver.save(0, {checkpoint.PARAMS: {source.network: params}}, _meta(source, config), force=True)
        if source.tokenizer is not None:
            source.tokenizer.save(folder / TOKENIZER)
        if source.template is not None:
            (folder / TEMPLATE).write_text(source.template.source, encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps({"converted_from": source.origin}, indent=2) + "\n")
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "one checkpoint"


def _meta(source: Any, config: Any) -> dict[str, Any]:
    """A run's meta as `rlhf-jax train` writes it, with what is known of the source."""
    kept = {name: value for name, value in source.meta.items() if name not in ("checkpoint", "base", "critic_model")}
    text = {} if source.tokenizer is None else {"tokenizer": source.tokenizer.digest, "control_tokens": source.tokenizer.control_tokens}
    return {**kept, "network": source.network, "model": config.to_json(), "step": 0, **text}


# --- a Hugging Face directory ---


def _write_directory(source: Any, target: str, dtype: str, notes: list[str]) -> tuple[int, str]:
    """config.json, generation_config.json, weights and the text side. Returns bytes, and what they lie in; `notes` grows."""
    from rlhf_jax.models import families
    from rlhf_jax.models.hf.export import write_directory

    longest = int(source.meta.get("longest", 0))
    described = families.write(source.config, longest) | {"dtype": dtype}
    tokens = _tokens(source, notes)
    generation = None
    if source.network == "policy":
        generation = dict(source.meta.get("generation") or {}) | tokens
        if source.tokenizer is not None and len(source.tokenizer.stop_ids) > 1:
            generation["eos_token_id"] = list(source.tokenizer.stop_ids)
    write_directory(
        target, families.load(source.config.family).ROWS, source.config, source.params, dtype=dtype, config_json=described | tokens,
        generation_config=generation, extra_files=_text_side(source, longest or source.config.context),
    )
    written = [path for path in pathlib.Path(target).iterdir() if path.suffix == ".safetensors"]
    return sum(path.stat().st_size for path in written), f"{len(written)} file{'s' * (len(written) > 1)}"


def _write_adapter(source: Any, target: str, notes: list[str]) -> tuple[str, int, str]:
    """A PEFT directory. Returns what was written, bytes, and what they lie in."""
    import jax

    from rlhf_jax import checkpoint
    from rlhf_jax.models import lora
    from rlhf_jax.models.hf.peft_export import write_adapter
    from rlhf_jax.saved import load_source

    base = source.meta.get("base", "")
    if source.config.lora is None:
        raise UserError(f"--adapter: {source.path!r} has no adapters of its own: leave the flag out")
    if base and load_source(base, "--from").config.vocab_size != source.config.vocab_size:
        raise UserError(f"--adapter: {source.path!r} reads more tokens than its base {base!r}, which PEFT could not load: leave the flag out, and "
                        "the whole network is written")
    if not base or checkpoint.is_run(base):
        notes.append(f"the base {base or source.path!r} is no Hugging Face directory: convert it too, and name it in adapter_config.json as "
                     "base_model_name_or_path")
    if "value_head" in source.params["ends"]:
        notes.append("PEFT has no place for the value head, which lies in a file of its own, value_head.safetensors")
    text = _text_side(source, int(source.meta.get("longest", 0)) or source.config.context)
    write_adapter(target, source.config, source.params, base, source.network, extra_files=text, key="--to-hf")
    size = sum(path.stat().st_size for path in pathlib.Path(target).glob("*.safetensors"))
    leaves = jax.tree_util.tree_leaves_with_path(source.params)
    count = _count([leaf for path, leaf in leaves if path[-1].key in lora.LEAVES])
    return f"adapters of rank {source.config.lora.rank} for a {source.config.family} {_kind(source)}, {count:,} parameters", size, "1 file"


def _tokens(source: Any, notes: list[str]) -> dict[str, int]:
    """Ids of control tokens for config.json. A classifier of transformers reads its score at the last token that is not padding: where padding is
    the token that ends a text, it would read it one token early, so that such a pad is left out."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        return {}
    tokens = {"eos_token_id": tokenizer.eos_id} | ({} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id})
    ends = (tokenizer.end_id,) if source.network == "reward" and source.template is not None else tokenizer.stop_ids  # Qwen pads with its eos
    if tokenizer.pad_id not in ends or (source.network == "policy" and "pad_token" in tokenizer.variables):
        return tokens | {"pad_token_id": tokenizer.pad_id}
    if source.network == "reward":
        notes.append(f"padding is {tokenizer.pad}, which ends texts: transformers would read scores before it, so that config.json names no "
                     "pad_token_id and transformers scores one row at a time")
    return tokens


def _text_side(source: Any, longest: int) -> Mapping[str, bytes]:
    """Tokenizer files and chat template."""
    from rlhf_jax.data import hf_tokenizer

    if source.tokenizer is None:
        return {}
    found = hf_tokenizer.files(source.tokenizer, source.template, model_max_length=longest)
    if any("/" in name for name in found):  # several templates, which tokenizer_config.json lists where no file names one
        found = {name: text for name, text in found.items() if "/" not in name and name != hf_tokenizer.TEMPLATE}
    return {name: text.encode() for name, text in found.items()}


# --- the check ---


def _checked(source: Any, target: str, key: str) -> str:
    """Reads the target and says how far its log-probs or scores lie from the source's, both computed in float32."""
    import numpy as np

    from rlhf_jax.data.mixed import Item
    from rlhf_jax.eval.scoring import Scorer
    from rlhf_jax.saved import load_source

    rng = np.random.default_rng(0)
    length = min(PROBED, source.config.context)
    items = [Item(rng.integers(0, source.config.vocab_size, length).astype(np.int32), None, "probe", i + 1) for i in range(PROBES)]

    def scores(one: Any) -> np.ndarray:
        exact = dataclasses.replace(one, config=dataclasses.replace(one.config, compute_dtype="float32"))
        return np.stack(Scorer(exact, key, batch_tokens=PROBES * length).score(items))

    what = "scores" if source.network == "reward" else "log-probs"
    gap = float(np.abs(scores(load_source(target, key)) - scores(source)).max())
    return f"checked: {what} of {PROBES} × {length} random tokens differ by at most {gap:.3g}"
