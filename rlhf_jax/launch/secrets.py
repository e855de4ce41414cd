"""Secrets from Secret Manager, read on the machine that needs them by its own service account: into the environment of the job, nowhere else.

    GET metadata server → access token;   GET secretmanager.googleapis.com/v1/projects/P/secrets/NAME/versions/latest:access → the value

Values travel in headers and bodies, never on a command line, and the service account needs roles/secretmanager.secretAccessor.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping

from rlhf_jax.errors import UserError

TOKEN = "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token"
SERVICE = "https://secretmanager.googleapis.com/v1"
SECONDS = 30.0  # of one request


def values(names: Mapping[str, str]) -> dict[str, str]:
    """Environment variables and the values of the secrets that they name.

    Args:
      names: variable → projects/P/secrets/NAME.

    Raises:
      UserError: the secret does not exist, or this machine's service account may not read it.
      OSError: a request failed and may succeed later.
    """
    if not names:
        return {}
    token = json.loads(_get(TOKEN, {"Metadata-Flavor": "Google"}))["access_token"]
    return {variable: _value(name, token) for variable, name in names.items()}


def _value(name: str, token: str) -> str:
    try:
        answer = json.loads(_get(f"{SERVICE}/{name}/versions/latest:access", {"Authorization": f"Bearer {token}"}))
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403, 404):
            raise
        raise UserError(f"--secret {name.rpartition('/')[2]}: Secret Manager answers {error.code}; make it with `gcloud secrets create`, and give "
                        "this machine's service account roles/secretmanager.secretAccessor on it") from None
    return base64.b64decode(answer["payload"]["data"]).decode()


def _get(url: str, headers: Mapping[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=SECONDS) as answer:
        return answer.read()
