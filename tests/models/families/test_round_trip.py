"""Import, then export: the same bytes under the same names, and a config.json that means the same network."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.models import families
from rlhf_jax.saved import load_source
from tests.models import tiny
from tests.models.families import golden


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor of a safetensors file, read by the format's description alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])]) for name, entry in header.items()}


@pytest.mark.parametrize("name", golden.NAMES)
def test_an_export_holds_the_bytes_of_what_was_imported(name, tmp_path):
    source = golden.source(name)
    golden.export(tmp_path, source.config, source.params, source.meta["longest"])
    own, theirs = tensors(tmp_path / "model.safetensors"), tensors(golden.FOLDER / name / "model.safetensors")
    assert own.keys() == theirs.keys()
    for tensor in theirs:
        assert own[tensor] == theirs[tensor], tensor

    written, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, golden.FOLDER / name))
    assert (written["model_type"], written["architectures"]) == (given["model_type"], given["architectures"])
    one, other = families.read(written), families.read(given)
    assert one.left == []
    assert (one.fields, one.outputs, one.longest) == (other.fields, other.outputs, other.longest)

    again = load_source(str(tmp_path), "--model")
    assert again.config == source.config and again.network == source.network
    jax.tree.map(np.testing.assert_array_equal, again.params, source.params)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "mixtral", "phi3"])
def test_an_export_has_the_logits_of_what_was_imported(name, tmp_path):
    """Those fixtures whose tensors are fused, stacked or stored minus 1, through the running layout and back."""
    config, params = golden.network(name, scan_layers=name != "phi3")
    golden.export(tmp_path, config, params, golden.source(name).meta["longest"])
    again = jax.tree.map(np.asarray, load_source(str(tmp_path), "--model").params)
    config, params = golden.network(name, scan_layers=False)
    want = golden.expected(name)
    got = np.asarray(tiny.logits(config, again, golden.rows(want)))[want["segment_ids"] != 0]
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=golden.TOLERANCE)
    np.testing.assert_array_equal(got, np.asarray(tiny.logits(config, params, golden.rows(want)))[want["segment_ids"] != 0])
