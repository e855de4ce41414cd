"""`python -m tests.conformance --vectors DIR`: a line per case, then `N passed, N failed`; exit 1 on a failure or a case without a function."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs every case of the folder that --vectors names."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    default = pathlib.Path(__file__).parent / "vectors" / "trl"
    parser.add_argument("--vectors", type=pathlib.Path, default=default, help="folder of .npz and .json files (default: the one that ships)")
    folder = parser.parse_args(arguments).vectors
    if not folder.is_dir():
        print(f"--vectors {folder}: no such folder; name one with .npz files", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.conformance import runner

    lines = runner.run(folder)
    if not lines:
        print(f"--vectors {folder}: no .npz or .json file in it", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    count = {status: sum(line.status == status for line in lines) for status in ("ok", "FAILED", "deviation")}
    if count["deviation"]:
        print(f"{count['deviation']} deliberate deviations, listed above with their reasons")
    print(f"{count['ok']} passed, {count['FAILED']} failed")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
