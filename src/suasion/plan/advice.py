"""How far a stage could go on a card, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from suasion.plan.planner import Planner
from suasion.plan.records import Change, Room, StagePlan

MOST_ROWS = 4096
"""No larger batch is looked for."""
SAME = "none: the same step, in smaller pieces"
"""Effect of a change that costs time only."""


def rooms_of(planner: Planner, name: str, config: Any, plan: StagePlan) -> tuple[Room, ...]:
    """The largest batch and the greatest length that fit, one at a time.

    Args:
        planner: Plans.
        name: Of the stage.
        config: Of the stage.
        plan: Its plan as it is.
    """
    return tuple(
        Room(
            f"{name}.{key}",
            now,
            largest(
                partial(_peak, planner, name, changed),
                now,
                most,
                planner.card.memory,
                plan.peak.total,
            ),
        )
        for key, now, most, changed in _knobs(name, config, planner)
    )


def _peak(planner: Planner, name: str, changed: Callable[[int], Any], value: int) -> int:
    return planner.stage(name, changed(value)).peak.total


def largest(
    peak: Callable[[int], int], now: int, most: int, memory: int, peak_now: int, tries: int = 5
) -> int:
    """The largest value up to `most` whose peak is within `memory`; 0 if that of 1 is not.

    A peak grows nearly linearly with batch and length, so two values tell where to look for the
    third. What is returned was tried, and is within a sixteenth of the best.

    Args:
        peak: Bytes at a value; never falls as the value grows.
        now: A value whose peak is known.
        most: Upper limit.
        memory: Bytes that there are.
        peak_now: Peak at `now`.
        tries: Most other values to try, beside 1 and `most`.
    """
    known = {now: peak_now}

    def fits(value: int) -> bool:
        if value not in known:
            known[value] = peak(value)
        return known[value] <= memory

    if now > 1 and not fits(now) and not fits(1):
        return 0
    if not fits(min(now, most)):
        low, high = (1, now) if now > 1 else (0, 1)
    elif fits(min(max(2 * now, 16), most)):
        low, high = min(max(2 * now, 16), most), most + 1
    else:
        low, high = now, min(max(2 * now, 16), most)
    for _ in range(tries):
        if high - low <= max(1, low // 16):
            break
        below = sorted(value for value in known if value <= low)
        above = known.get(high)
        if above is not None:
            slope, base = (above - known.get(low, 0)) / (high - low), low
        else:
            slope, base = (known[below[-1]] - known[below[0]]) / max(1, low - below[0]), low
        guess = base + int((memory - known.get(low, 0)) / slope) if slope > 0 else high - 1
        value = min(max(guess, low + 1), high - 1)
        if fits(value):
            low = value
        else:
            high = value
    return low


Knob = tuple[str, int, int, Callable[[int], Any]]
"""Recipe key, value now, most, and how to change the configuration."""


def _knobs(name: str, config: Any, planner: Planner) -> list[Knob]:
    context = planner.context_of(name, config)
    if name in ("pretrain", "sft"):
        return [
            _knob(config, "batch_size", MOST_ROWS),
            _knob(config, "block", context),
        ]
    if name == "reward":
        length = min(config.max_length or context, context)
        return [
            _knob(config, "batch_size", MOST_ROWS),
            _knob(replace(config, max_length=length), "max_length", context),
        ]
    if name == "ppo":
        longest = context - min(config.prompt_tokens or 1, context - 1)
        return [
            _knob(config, "micro_batch_tokens", MOST_ROWS * context),
            _knob(config, "batch_size", MOST_ROWS),
            (
                "response.max_tokens",
                config.response.max_tokens,
                longest,
                lambda value: replace(config, response=replace(config.response, max_tokens=value)),
            ),
        ]
    return []


def _knob(config: Any, key: str, most: int) -> Knob:
    return key, getattr(config, key), most, lambda value: replace(config, **{key: value})


def changes_for(planner: Planner, name: str, config: Any) -> tuple[Change, ...]:
    """What to change so that a stage fits, in the order in which to try.

    First what changes nothing but the time, then what changes the model a little, then what trains
    less of it or on shorter texts. Each step keeps the ones before it; the last one fits, if any
    does.
    """
    found = []
    for key, value, effect, changed in _steps(name, config):
        try_config = changed(config)
        if try_config == config:
            continue
        config = try_config
        peak = planner.stage(name, config).peak.total
        found.append(Change(f"{name}.{key}", value(config), peak, effect))
        if peak <= planner.card.memory:
            break
    return tuple(found)


Step = tuple[str, Callable[[Any], str], str, Callable[[Any], Any]]
"""Recipe key, its new value as a text, what it does to the result, and the change."""


def _steps(name: str, config: Any) -> Iterator[Step]:
    if name == "evaluate":
        return
    if name == "ppo":
        budget = max(1, config.micro_batch_tokens // 4)
        yield _set("micro_batch_tokens", budget, SAME)
    else:
        rows = config.batch_size * config.accumulate
        small = max(1, config.batch_size // 4)
        yield (
            "batch_size",
            lambda c: f"{c.batch_size}, {name}.accumulate: {c.accumulate}",
            SAME,
            lambda c: replace(c, batch_size=small, accumulate=rows // small),
        )
    if hasattr(config, "lora"):
        yield from _lora_steps()
    if name == "ppo":
        yield _set("batch_size", max(1, config.batch_size // 4), "noisier steps")
        yield (
            "response.max_tokens",
            lambda c: str(c.response.max_tokens),
            "shorter responses",
            lambda c: replace(
                c, response=replace(c.response, max_tokens=max(1, c.response.max_tokens // 2))
            ),
        )
    else:
        yield (
            "batch_size",
            lambda c: f"1, {name}.accumulate: {c.accumulate}",
            SAME,
            lambda c: replace(c, batch_size=1, accumulate=c.accumulate * c.batch_size),
        )
    key = {"reward": "max_length", "ppo": "prompt_tokens"}.get(name, "block")
    length = getattr(config, key) or 512
    yield _set(key, max(1, length // 2), "shorter texts")
    if hasattr(config, "lora"):
        yield _base("nf4", "the base is rounded to 4 bits")


def _lora_steps() -> Iterator[Step]:
    yield (
        "lora.r",
        lambda _: "16",
        "adapters train instead of all weights",
        lambda c: c if c.lora.r else replace(c, lora=replace(c.lora, r=16)),
    )
    yield (
        "lora.checkpointing",
        lambda _: "true",
        "none: activations are computed again, a third more time",
        lambda c: replace(c, lora=replace(c.lora, checkpointing=True)),
    )
    yield _base("bf16", "the frozen base is rounded to 16 bits")
    yield _base("int8", "the frozen base is rounded to 8 bits")


def _base(held: str, effect: str) -> Step:
    order = ("fp32", "bf16", "int8", "nf4")

    def change(config: Any) -> Any:
        lora = config.lora
        if not lora.r or order.index(lora.base) >= order.index(held):
            return config
        return replace(config, lora=replace(lora, base=held))

    return "lora.base", lambda _: held, effect, change


def _set(key: str, value: int, effect: str) -> Step:
    return key, lambda c: str(getattr(c, key)), effect, lambda c: replace(c, **{key: value})
