"""Where the prompt ends, what ends a response, and what happens to what is too long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from suasion.core.errors import ConfigError, DataError
from suasion.data.codec import Codec, Template
from suasion.data.packing import pack
from suasion.models.load import train_tokenizer

TOKENIZER = train_tokenizer(["Question: how long?\n\nAnswer: not long at all, not long."], 290)
TEMPLATES = [
    "Question: {query}\n\nAnswer: {response}",
    "{query} {response}",
    "<{query}>{response}</>",
]

# A special token written out in a text is read as that token, as tokenizers do.
TEXTS = st.text(max_size=20).filter(lambda text: "<|" not in text)


def codec_of(template: str) -> Codec:
    """A codec over one tokenizer."""
    return Codec(TOKENIZER, Template.parse(template), (0,), 1)


@pytest.mark.parametrize("template", TEMPLATES)
@given(query=TEXTS, response=TEXTS)
@settings(max_examples=50, deadline=None)
def test_text_is_the_template_filled_in(template: str, query: str, response: str) -> None:
    """Prompt and response put together say what the template says."""
    parsed = Template.parse(template)
    before, after = template.split("{response}")
    filled = before.replace("{query}", query) + response + after
    assert parsed.prompt(query) + parsed.response(response) == filled


@pytest.mark.parametrize("template", TEMPLATES)
@given(query=TEXTS, response=TEXTS)
@settings(max_examples=50, deadline=None)
def test_training_and_rollout_share_the_prompt(template: str, query: str, response: str) -> None:
    """The prompt's tokens open the document's, whatever the answer begins with."""
    codec = codec_of(template)
    prompt, document = codec.prompt_ids(query), codec.document_ids(query, response)
    assert document[: len(prompt)] == prompt
    assert document[-1] == 0
    assert codec.text_of(document[len(prompt) : -1]) == response


def test_the_prompt_ends_before_white_space() -> None:
    """A tokenizer joins a space with the word after it."""
    template = Template.parse("Q: {query} A: {response} end")
    assert template.prompt("x") == "Q: x A:"
    assert template.response("y") == " y end"
    assert Template.parse("{query}\n\n{response}").glue == "\n\n"


@pytest.mark.parametrize(
    "template", ["", "{query}", "{response}", "{response} {query}", "{query} {query} {response}"]
)
def test_a_template_needs_both_fields_in_order(template: str) -> None:
    """Once each."""
    with pytest.raises(ConfigError, match="must name"):
        Template.parse(template)


def test_a_judge_reads_the_stop_token_unless_it_is_padding(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Classifiers of transformers read the last token that is not padding."""
    apart = codec_of(TEMPLATES[0])
    same = Codec(tokenizer, apart.template, (0,), 0)
    assert apart.judged_ids("so")[-1] == 0
    assert 0 not in same.judged_ids("so")
    assert same.response_ids("so")[-1] == 0


def test_what_is_too_long_stops_is_left_out_or_is_cut(codec: Codec) -> None:
    """Cut from its end, and never shorter than needed by more than a token's letters."""
    query = "How long is it? " * 10
    empty = len(codec.prompt_ids(""))
    assert codec.fit_query("How?", 60, "error", "t.jsonl, row 3") == "How?"
    assert codec.fit_query(query, 40, "drop", "") is None
    with pytest.raises(DataError, match=r"t\.jsonl, row 3: the prompt has \d+ tokens and only 40"):
        codec.fit_query(query, 40, "error", "t.jsonl, row 3")
    cut = codec.fit_query(query, 40, "cut", "")
    assert cut
    assert query.startswith(cut)
    assert 30 <= len(codec.prompt_ids(cut)) <= 40
    assert codec.fit_query(query, empty, "cut", "") == ""
    with pytest.raises(DataError, match="template alone"):
        codec.fit_query(query, empty - 1, "cut", "")


def test_blocks_hold_every_token_but_the_last_few() -> None:
    """In order, across documents."""
    documents = [[1, 2, 3], [4], [], [5, 6, 7, 8]]
    assert pack(documents, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert pack(documents, 8).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    with pytest.raises(DataError, match="8 tokens do not fill one block of 9"):
        pack(documents, 9)
