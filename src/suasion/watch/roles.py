"""A check on the roles together: does one that computes leave the policy as it was?"""

from __future__ import annotations

from contextlib import suppress

import torch

from suasion.core.errors import RewardError
from suasion.watch.finding import Finding
from suasion.watch.subject import EXACT, Gap, Subject


def roles(subject: Subject) -> Finding:
    """Reference, critic and reward have their turn, and the policy computes what it did before.

    Roles may share a base, on which an adapter that stays active, or a mode that is not put back,
    makes the policy another function.
    """
    p = subject.parts
    batch = subject.batch
    learns = [(each, each.requires_grad) for each in p.policy.model.parameters()]
    before = subject.logprobs(batch)
    with torch.no_grad(), p.trainer.autocast():
        if p.reference is not None:
            p.reference.logprobs(batch)
        p.critic.values(batch, p.policy.logprobs(batch)[2])
    with suppress(RewardError):  # of which the check on the reward tells
        p.reward(subject.queries, subject.texts)
    gap = Gap.between(before, subject.logprobs(batch))
    changed = sum(each.requires_grad != learnt for each, learnt in learns)
    problems = []
    if not gap.within(EXACT):
        problems.append(f"the policy's log-probabilities moved by {gap.largest:.2g}")
    if changed:
        problems.append(f"{changed} of its parameters learn that did not, or no longer do")
    return Finding(
        "roles",
        ok=not problems,
        measured={"largest": gap.largest, "changed": changed, "tolerance": EXACT.largest},
        what="after the other roles had their turn " + " and ".join(problems),
        likely_cause="an adapter that was switched and not switched back, a model in use by two "
        "roles that one of them changes, or a reward that touches the policy",
        fix="give each role an adapter or model of its own, and switch adapters by "
        "AdapterScope.use alone",
    )
