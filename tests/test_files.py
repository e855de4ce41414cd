"""A file stands whole under its name, or not at all; a growing one loses no line, on disk or in a bucket."""

from __future__ import annotations

import pathlib
from typing import ClassVar

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from rlhf_jax import checkpoint
from rlhf_jax.files import Growing, whole, write_whole
from rlhf_jax.train.metrics import MetricsLog, cut_back, read_metrics


def test_a_block_that_fails_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "before\n")
    with pytest.raises(ZeroDivisionError), whole(path) as stream:
        stream.write("half")
        assert path.read_text() == "before\n", "nobody sees what is not done"
        raise ZeroDivisionError
    assert path.read_text() == "before\n" and [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_a_block_that_ends_well_replaces_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "before\n")
    with whole(path) as stream:
        stream.write("ä\n")
    assert path.read_bytes() == "ä\n".encode() and len(list(tmp_path.iterdir())) == 1


class Bucket(MemoryFileSystem):
    """Objects that cannot be appended to: a file opened for it starts anew, as gcsfs has it. And no folders but those that hold one."""

    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gs:/"))

    def mkdir(self, path: str, create_parents: bool = True, **options: object) -> None:
        """Nothing to make."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to make."""

    def open(self, path: str, mode: str = "rb", **options: object) -> object:
        return super().open(path, mode.replace("a", "w"), **options)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """A folder of a bucket that is not there yet."""
    Bucket.store.clear()
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    return epath.Path("gs://bucket/run")


def test_lines_on_disk_are_there_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "log").write_bytes(b"1\n")
    with Growing(epath.Path(tmp_path / "log")) as file:
        file.write(b"2\n")
        assert (tmp_path / "log").read_bytes() == b"1\n2\n"


def test_lines_in_a_bucket_are_kept_over_restarts(bucket: epath.Path) -> None:
    for line in (b"1\n", b"2\n"):
        with Growing(bucket / "log") as file:
            file.write(line)
    assert (bucket / "log").read_bytes() == b"1\n2\n"


def test_lines_in_a_bucket_are_there_after_a_flush_and_now_and_then(bucket: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Growing(bucket / "log")
    file.write(b"1\n")
    assert not (bucket / "log").exists()
    file.flush()
    assert (bucket / "log").read_bytes() == b"1\n"
    file.write(b"2\n")
    monkeypatch.setattr("rlhf_jax.files.SECONDS", 0.0)
    file.write(b"3\n")
    assert (bucket / "log").read_bytes() == b"1\n2\n3\n"


def test_a_metrics_log_in_a_bucket_goes_on_after_a_kill(bucket: epath.Path) -> None:
    """The second log begins where the last save left the first, which was never closed."""
    for start in (0, 2):
        cut_back(bucket, start)
        log = MetricsLog(bucket, start_step=start, total_steps=4, every=1, tensorboard=False, wandb=None, console=False)
        for step in (start + 1, start + 2):
            log.write(step, {"loss": np.float32(step)})
        log.flush()
    log.write(5, {"loss": np.float32(5)})  # not saved
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside_though_no_folder_is_there_for_it(bucket: epath.Path) -> None:
    (bucket / "checkpoints/2/params/data").parent.mkdir(parents=True)
    (bucket / "checkpoints/2/params/data").write_bytes(b"x")
    (bucket / "checkpoints/2/params/data").with_name("more").write_bytes(b"y")
    checkpoint._set_aside(bucket / "checkpoints", "2", "a test")
    assert (bucket / "checkpoints/quarantine/2/params/data").read_bytes() == b"x"
    assert not (bucket / "checkpoints/2").exists()


def test_a_run_that_has_not_begun_has_no_steps_in_a_bucket(bucket: epath.Path) -> None:
    (bucket / "checkpoints").mkdir(parents=True, exist_ok=True)
    assert checkpoint._step_numbers(bucket / "checkpoints") == []
