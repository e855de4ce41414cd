"""The first objectives of tests/reference/objectives.py in the form of `Case`."""

from __future__ import annotations

from tests.reference import objectives


def sft(new, case):
    return objectives.sft(new["policy"], case.batch, case.h["z_loss"], case.h["label_smoothing"])


def lm(new, case):
    everywhere = case.batch.replace(loss_mask=case.batch.segment_ids != 0)
    return objectives.sft(new["policy"], everywhere, case.h["z_loss"], case.h["label_smoothing"])


def dpo(new, case):
    return objectives.dpo(new["policy"], case.ref, case.batch, case.h["beta"])


def reward(new, case):
    return objectives.reward(new["reward"], case.batch, case.h["center_coef"])


def ppo(new, case):
    fixed = objectives.ppo_prepare(case.old["policy"], case.old["critic"], case.ref, case.batch, float(case.carry["kl_coef"]), case.h)
    return objectives.ppo(new["policy"], new["critic"], case.batch, fixed, case.h)
