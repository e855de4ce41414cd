import dataclasses

import pytest

from rlhf_jax.data.records import KINDS, Text, where


def test_records_are_frozen_and_name_their_place():
    record = Text(text="a", source="x.jsonl", line=3)
    assert where(record) == "x.jsonl:3"
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.text = "b"
    for kind in KINDS.values():
        assert {"source", "line"} <= {field.name for field in dataclasses.fields(kind)}
