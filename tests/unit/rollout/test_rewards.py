"""Rewards: a model as transformers reads it, functions and labels by name, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from suasion.config.schema import QUESTION_ANSWER
from suasion.core.errors import ConfigError, ModelError, RewardError
from suasion.data.codec import Codec, Template
from suasion.rollout.rewards import Checked, RewardModel, UserFunction, load_function, load_reward
from tests.unit.conftest import FAMILIES, tiny_config

QUERIES = ["How long?", "Why is it so, and for how long?", "Q"]
RESPONSES = ["Not long at all.", "So.", "It is because it is, and it always was."]


def judge(family: str, pad_id: int, eos_id: int) -> Any:
    """A random classifier with one output."""
    torch.manual_seed(1)
    config = tiny_config(family)
    config.num_labels = 1
    config.pad_token_id, config.eos_token_id = pad_id, eos_id
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("pad_id", [1, 0], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_neo"])
def test_a_score_is_the_one_transformers_gives(
    tokenizer: PreTrainedTokenizerFast, family: str, pad_id: int
) -> None:
    """In one padded batch there, at the last token of each text here."""
    codec = Codec(tokenizer, Template.parse("{query} {response}"), (0,), pad_id)
    model = judge(family, pad_id, 0)
    texts = [
        codec.prompt_ids(q) + codec.judged_ids(r) for q, r in zip(QUERIES, RESPONSES, strict=True)
    ]
    width = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    ours = torch.tensor(RewardModel(model, codec)(QUERIES, RESPONSES))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 1e-3


def test_a_score_does_not_depend_on_the_batch(codec: Codec) -> None:
    """Nor on the order."""
    reward = RewardModel(judge("llama", 1, 0), codec)
    together = reward(QUERIES, RESPONSES)
    backwards = reward(QUERIES[::-1], RESPONSES[::-1])[::-1]
    alone = [reward([q], [r])[0] for q, r in zip(QUERIES, RESPONSES, strict=True)]
    small = RewardModel(judge("llama", 1, 0), codec, batch_tokens=1)(QUERIES, RESPONSES)
    for other in (backwards, alone, small):
        assert together == pytest.approx(other, abs=1e-5)


def test_a_text_over_the_context_loses_the_beginning_of_its_query(codec: Codec) -> None:
    """The answer, which is judged, stays."""
    reward = RewardModel(judge("llama", 1, 0), codec)
    long = "word " * 100
    one, two = reward([long + "How?", long + "How?"], ["So.", "No."])
    assert one != two
    assert len(reward([long], [long])) == 1


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 scores for 3 responses"),
        ([1.0] * 4, "returned 4 scores for 3 responses"),
        ([1.0, float("nan"), 0.0], "returned nan for response 1: 'So.' .query 'Why is it so"),
        ([1.0, 2.0, float("-inf")], "returned -inf for response 2"),
        (None, "must return one number per response"),
        (["a", "b", "c"], "must return one number per response"),
        (3.0, "must return one number per response"),
    ],
)
def test_what_is_no_score_is_refused(returned: Any, said: str) -> None:
    """With the first response it happened to."""
    checked = Checked(lambda _queries, _responses: returned, "my:reward")
    with pytest.raises(RewardError, match=f"reward my:reward {said}"):
        checked(QUERIES, RESPONSES)


@pytest.mark.parametrize("returned", [[1, 2, 3], (1.0, 2.0, 3.0), torch.tensor([1.0, 2.0, 3.0])])
def test_any_sequence_of_numbers_will_do(returned: Any) -> None:
    """Lists, tuples and tensors."""
    assert Checked(lambda _q, _r: returned, "r")(QUERIES, RESPONSES) == [1.0, 2.0, 3.0]


def test_the_function_gets_lists_of_its_own() -> None:
    """What it does to them is its own matter."""

    def greedy(queries: Any, responses: Any) -> Sequence[float]:
        queries.clear()
        return [float(len(responses.pop())) for _ in range(3)]

    texts = list(RESPONSES)
    assert len(Checked(greedy, "r")(QUERIES, texts)) == 3
    assert texts == RESPONSES


def test_an_exception_is_told_with_its_line() -> None:
    """As the user's, not ours."""

    def broken(queries: Any, responses: Any) -> Any:
        return responses[len(queries)]

    line = broken.__code__.co_firstlineno + 1
    where = rf"reward my:r failed at .*test_rewards\.py, line {line}: IndexError"
    with pytest.raises(RewardError, match=where):
        Checked(UserFunction(broken, "my:r"), "my:r")(QUERIES, RESPONSES)


def test_functions_are_found_by_module_and_by_file(tmp_path: Path) -> None:
    """And refused by name where there is none."""
    (tmp_path / "mine.py").write_text("def f(q, r):\n    return [1.0] * len(r)\nx = 3\n", "utf-8")
    assert load_function(f"{tmp_path / 'mine.py'}:f")([], ["a"]) == [1.0]
    assert load_function("math:sqrt")(4) == 2
    for name, said in [
        (f"{tmp_path / 'mine.py'}:g", "has no function 'g'"),
        (f"{tmp_path / 'mine.py'}:x", "has no function 'x'"),
        (f"{tmp_path / 'other.py'}:f", "no such file"),
        ("no_such_module_at_all:f", "No module named"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_function(name)


def test_a_model_folder_without_a_scoring_head_is_refused(model_folder: Path) -> None:
    """A language model's head would be drawn at random."""
    with pytest.raises(ModelError, match="weights are not in the folder"):
        load_reward(str(model_folder), QUESTION_ANSWER)


def test_a_pipeline_needs_a_label() -> None:
    """By its name."""
    with pytest.raises(ConfigError, match="name the label"):
        load_reward("pipeline:somewhere", QUESTION_ANSWER)
