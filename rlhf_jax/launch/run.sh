#!/usr/bin/env bash
# Sets this machine up in the folder it lies in and hands over to the worker, which runs the job, restarts it and reports.
# Runs again after every reboot and restart; what is done is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH="$PATH:/snap/bin:$HOME/.local/bin" PIP_DISABLE_PIP_VERSION_CHECK=1

make_environment() {
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv --clear environment; then
    return
  fi
  # TPU VMs of Ubuntu 22.04 have Python 3.10: uv brings its own.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --clear --seed --python 3.12 environment
}

set_up() {
  mkdir -p code inputs
  if [ -f code.tar.gz ]; then
    tar -xzf code.tar.gz -C code || return
  fi
  make_environment && environment/bin/python -m pip install --quiet --requirement requirements.txt
}

wanted=$(sha256sum requirements.txt code.tar.gz 2>/dev/null || true)
pause=5
until [ "$(cat .ready 2>/dev/null)" = "$wanted" ]; do
  if (set_up); then
    echo "$wanted" >.ready
    break
  fi
  echo "set-up failed on $(hostname); again in $pause s" >&2
  sleep "$pause"
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
exec environment/bin/python -m rlhf_jax.launch.worker job.json
