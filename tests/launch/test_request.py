"""What is refused before a plan is made, each with the flag or key, the value and the remedy."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.launch import planning
from rlhf_jax.launch.request import check, check_mesh, parse_secrets
from tests.launch.asked import ROOT, config, request

README = str(ROOT / "README.md")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "PPO_1"}, ("--name", "PPO_1")),
        ({"name": "ppo-"}, ("--name", "hyphen")),
        ({"workdir": "runs/ppo"}, ("--workdir", "gs://BUCKET/runs/ppo-1")),
        ({"workdir": "gs://bucket"}, ("--workdir", "folder of a bucket")),
        ({"project": ""}, ("--project",)),
        ({"zone": ""}, ("--zone",)),
        ({"slices": 0}, ("--slices 0", "at least 1")),
        ({"backend": "tpu-vm", "slices": 2}, ("--slices 2", "--backend queued")),
        ({"backend": "sky", "slices": 2}, ("--slices 2", "--backend queued")),
        ({"max_restarts": -1}, ("--max-restarts -1",)),
        ({"backend": "xpk", "cluster": ""}, ("--cluster", "xpk cluster create")),
        ({"cluster": "c1"}, ("--cluster", "xpk only")),
        ({"image": "python:3.12"}, ("--image", "--runtime-version")),
        ({"backend": "xpk", "runtime": "tpu-x"}, ("--runtime-version", "--image")),
        ({"backend": "xpk", "topology": "v5e:2x2"}, ("v5e:2x2", "v5e:2x4")),
        ({"topology": "v5p:4x4x16"}, ("v5p:4x4x16", "v5p:4x8x8", "--backend xpk")),
        ({"backend": "sky", "topology": "v4:4x4x16"}, ("v4:4x4x16", "v4:4x8x8")),
        ({"code": "my package"}, ("--code", "git+https://")),
        ({"experiment": "demo"}, ("--experiment", "one host", "v5e:2x4")),
        ({"experiment": "demo", "topology": "v5e:1x1", "code": "rlhf-jax==1"}, ("--experiment", "--code")),
        ({"backend": "sky", "secrets": (("A", "b"),)}, ("--secret", "sky")),
        ({"pipeline_flags": ("--token=hf_abcdefghij",)}, ("credential", "--secret")),
    ],
)
def test_flags(changes, said):
    with pytest.raises(UserError) as caught:
        check(request(**changes))
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"slices": 4}, {"backend": "xpk", "topology": "v5p:4x4x16"}, {"topology": "v4:4x4x16"},
                                     {"experiment": "demo", "topology": "v5e:2x4"}, {"code": "rlhf-jax>=0.1"}, {"backend": "sky", "zone": ""}])
def test_legal_flags(changes):
    check(request(**changes))


SECRETS = ["hf_" + "a1B2c3D4e5" * 3, "sk-" + "x" * 20, "0123456789abcdef" * 2, "AbCdEf0123456789AbCdEf0123", "ghp_" + "z" * 30, "a b", "a/b", ""]


@pytest.mark.parametrize("value", SECRETS)
def test_a_secret_itself_is_refused_and_not_repeated(value):
    with pytest.raises(UserError, match="gcloud secrets create") as caught:
        parse_secrets([f"WANDB_API_KEY={value}"])
    assert not value or value not in str(caught.value)


def test_secrets_are_named():
    assert parse_secrets(["WANDB_API_KEY=wandb-key", "HF_TOKEN"]) == (("WANDB_API_KEY", "wandb-key"), ("HF_TOKEN", "HF_TOKEN"))
    with pytest.raises(UserError, match="VARIABLE=NAME"):
        parse_secrets(["3=x"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh__multihost": False}, ("config.mesh.multihost", "4 hosts", "--config.mesh.multihost=True")),
        ({"mesh__fsdp": 8}, ("fsdp=8", "16 chips")),
        ({"mesh__tensor": 3}, ("tensor=3", "16 chips")),
        ({"mesh__devices": 8}, ("devices=8", "16 chips")),
        ({"init_from": README}, ("config.init_from", "gcloud storage cp", "gs://bucket/runs/ppo-1/inputs/")),
        ({"data__train": README}, ("config.data.train", "gcloud storage cp")),
        ({"log__wandb": "sk-" + "x" * 20}, ("config.log.wandb", "--secret")),
    ],
)
def test_configs(changes, said):
    with pytest.raises(UserError) as caught:
        planning.start(request(), config(**changes))
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "sk-x" not in str(caught.value)


def test_the_mesh_is_held_against_the_chips_of_all_slices():
    mesh = {"data": 2, "fsdp": 16, "expert": 1, "tensor": 1, "devices": 0, "multihost": True}
    check_mesh(mesh, 32)
    check_mesh({**mesh, "fsdp": -1}, 64)
    for wrong in (16, 64):
        with pytest.raises(UserError, match=f"the {wrong} chips"):
            check_mesh(mesh, wrong)


def test_one_host_needs_no_multihost():
    planning.start(request(topology="v5e:2x4"), config(mesh__multihost=False))


@pytest.mark.parametrize("action", ["status", "logs", "stop"])
def test_an_action_needs_what_says_which_run(action):
    with pytest.raises(UserError, match="--name"):
        planning.act(request(name=""), action)
    with pytest.raises(UserError, match="--project"):
        planning.act(request(project=""), action)


def test_logs_lie_in_the_bucket():
    with pytest.raises(UserError, match="--workdir"):
        planning.act(request(workdir=""), "logs")
    assert planning.act(request(workdir=""), "logs", live=True).steps and planning.act(request(workdir=""), "stop").steps
