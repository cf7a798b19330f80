"""Where scores come from: a reward model, a function by import path, a classification pipeline.

Every reward is a function of texts, `(queries, responses) -> scores`, so the policy and its judge
may have different tokenizers. Whatever it is, what it returns is checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from suasion.core.errors import ConfigError, RewardError
from suasion.core.records import token_batch
from suasion.data.codec import Codec
from suasion.models.load import (
    context_of,
    device_for_training,
    load_codec,
    load_reward_model,
    score_head,
)
from suasion.models.roles import HiddenStates


class Reward(Protocol):
    """Scores responses, in the order given; higher is better."""

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """One finite number per response."""
        ...


class RewardModel:
    """A sequence-classification model with one output, read at the last token of the text.

    Args:
        model: The model.
        codec: Its own tokenizer and template.
        batch_tokens: Most tokens, padding included, in one forward pass.
        states: How to run it, where it is an adapter on another role's base.
    """

    def __init__(
        self,
        model: Any,
        codec: Codec,
        batch_tokens: int = 8192,
        *,
        states: HiddenStates | None = None,
    ) -> None:
        self.model = model.eval()
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        self._states = states or HiddenStates(model, score_head(plain))
        self.codec = codec
        self._batch_tokens = batch_tokens
        self.context = context_of(plain.config)

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Score texts; one that is over the context loses the beginning of its query."""
        rows = []
        for query, response in zip(queries, responses, strict=True):
            answer = self.codec.judged_ids(response)[: self.context - 1]
            prompt = self.codec.prompt_ids(query)[-(self.context - len(answer)) :]
            rows.append((prompt, answer))
        return self.score_tokens(rows)

    @torch.no_grad()
    def score_tokens(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Score (prompt, response) token pairs, longest first, in the order given."""
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -(len(rows[i][0]) + len(rows[i][1])))
        while order:
            longest = sum(map(len, rows[order[0]]))
            count = max(1, self._batch_tokens // longest)
            chunk, order = order[:count], order[count:]
            batch = token_batch(
                [rows[i][0] for i in chunk], [rows[i][1] for i in chunk], self.codec.pad_id
            ).to(self._states.device)
            hidden = self._states.at(batch, batch.ends).to(self._states.head.weight.dtype)
            found = self._states.head(hidden).squeeze(-1)
            for i, score in zip(chunk, found.float().tolist(), strict=True):
                scores[i] = score
        return scores


class Pipeline:
    """A text-classification pipeline; the score is the logit of one label, found by its name.

    By name because pipelines sort their output by confidence: a position means another label from
    one text to the next (huggingface/trl pull request 1738).

    Args:
        folder: Folder or Hub name of the classifier.
        label: Name of the label whose logit is the score.
    """

    def __init__(self, folder: str, label: str) -> None:
        from transformers import pipeline

        self._pipe: Any = pipeline(
            "text-classification", model=folder, top_k=None, device=device_for_training()
        )
        self._label = label
        known = list((self._pipe.model.config.id2label or {}).values())
        if label not in known:
            raise ConfigError(
                f"pipeline:{folder}#{label}: the classifier has no label {label!r}",
                f"its labels are {', '.join(map(str, known))}",
            )

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Score query and response as one text."""
        texts = [query + response for query, response in zip(queries, responses, strict=True)]
        found = self._pipe(texts, function_to_apply="none", truncation=True, batch_size=16)
        return [
            next(float(entry["score"]) for entry in row if entry["label"] == self._label)
            for row in found
        ]


class UserFunction:
    """A reward that someone else wrote: whatever it raises is theirs, and is told as such.

    Args:
        function: The reward.
        name: How the user named it.
    """

    def __init__(self, function: Reward, name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """One number per response.

        Raises:
            RewardError: the function raised; names the line.
        """
        try:
            return self._function(queries, responses)
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"reward {self._name} failed at {_place_of(error)}",
                "it is called as function(queries, responses), two lists of texts",
            ) from error


class Checked:
    """A reward whose output is looked at before anyone trains on it.

    Args:
        reward: The reward.
        name: How the user named it.
    """

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward = reward
        self._name = name

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number per response.

        Raises:
            RewardError: the count is wrong, or a score is no finite number; names the first.
        """
        found = self.reward(list(queries), list(responses))
        try:
            scores = [float(score) for score in found]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {self._name} must return one number per response ({error})"
            ) from error
        if len(scores) != len(responses):
            raise RewardError(
                f"reward {self._name} returned {len(scores)} scores for {len(responses)} responses",
                "return one number per response, in their order",
            )
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise RewardError(
                    f"reward {self._name} returned {score} for response {row}: "
                    f"{responses[row][:200]!r} (query {queries[row][:100]!r})",
                    "return a finite number for every text, the empty one too",
                )
        return scores


def load_reward(source: str, template: str, dtype: torch.dtype = torch.float32) -> Checked:
    """Build a reward from how a recipe names it.

    Args:
        source: A reward-model folder, `package.module:function`, `file.py:function`, or
            `pipeline:FOLDER#LABEL`.
        template: The run's template; a reward model trained with another is refused.
        dtype: Arithmetic of a reward model.

    Raises:
        ConfigError: the function or label does not exist.
        ModelError: the model folder cannot be used.
    """
    if source.startswith("pipeline:"):
        folder, _, label = source.removeprefix("pipeline:").partition("#")
        if not label:
            raise ConfigError(f"{source}: name the label", "write pipeline:FOLDER#LABEL")
        return Checked(Pipeline(folder, label), source)
    if ":" in source and not Path(source).is_dir():
        return Checked(UserFunction(load_function(source), source), source)
    codec = load_codec(source, template)
    model: Any = load_reward_model(source, dtype)
    return Checked(RewardModel(model.to(device_for_training()), codec), source)


def load_function(path: str) -> Any:
    """Import `package.module:name` or `file.py:name`.

    Raises:
        ConfigError: there is no such module, file or name, or importing it fails.
    """
    module_name, _, name = path.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _module_from_file(Path(module_name))
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"cannot import {path}: {error}", "write package.module:name or file.py:name"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"cannot import {path}: it failed at {_place_of(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{module_name} has no function {name!r}")
    return found


def _place_of(error: BaseException) -> str:
    """Where an exception was raised and what it says, in one line."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}: {message}" if frames else message


def _module_from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    spec = importlib.util.spec_from_file_location(f"suasion_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
