"""Packs a git working tree, what is tracked and what is new but not ignored, into a .tar.gz that depends on its content alone.

    python -m rlhf_jax.launch.pack FOLDER FILE.tar.gz

Ignored files stay behind: runs, environments, and where people keep their keys.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile

from rlhf_jax.errors import DONE, MISTAKE, UserError

LARGEST = 64 * 2**20  # bytes of one file: larger ones are data, which belongs in a bucket


def pack(root: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Writes the archive; returns its SHA-256.

    Args:
      root: a git working tree.
      target: the archive; its folder exists.

    Raises:
      UserError: no working tree, or a file in it that is too large.
    """
    command = ["git", "-C", os.fspath(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=False, capture_output=True)
    if listed.returncode:
        raise UserError(f"--code tree: {os.fspath(root)!r} is no git working tree; run it in one, or name what pip "
                        "installs: --code git+https://…@REF")
    paths = sorted({os.fsdecode(name) for name in listed.stdout.split(b"\0") if name})
    with open(target, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as zipped, \
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            file = pathlib.Path(root, path)
            if not file.is_file():  # deleted and not yet committed, or a submodule
                continue
            if file.stat().st_size > LARGEST:
                raise UserError(f"--code tree: {path} has {file.stat().st_size / 2**20:.0f} MiB; keep data in a bucket and out of the tree, "
                                "or list it in .gitignore")
            archive.add(file, path, filter=_plain)
    return hashlib.sha256(pathlib.Path(target).read_bytes()).hexdigest()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who and when, so that the same content is the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.mode & 0o100 else 0o644
    return entry


if __name__ == "__main__":
    try:
        print(f"{sys.argv[2]}: sha256 {pack(sys.argv[1], sys.argv[2])}")
    except UserError as mistake:
        print(f"rlhf-jax: {mistake}", file=sys.stderr)
        sys.exit(MISTAKE)
    sys.exit(DONE)
