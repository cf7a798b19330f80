"""Text to tokens and back: one template, one tokenizer, one rule for where the prompt ends.

The prompt is the template up to the response, without its trailing white space; that white space
opens the response instead. A tokenizer joins a space with the word after it, so a prompt ending in
a space would be tokenised differently in training, where the answer follows, than in a rollout.
Prompt and response are always encoded apart, so that the boundary is the same in every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suasion.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class Template:
    """How a query and a response become text."""

    before: str
    """Text in front of the query."""
    between: str
    """Text between query and response that belongs to the prompt."""
    glue: str
    """White space that opens the response."""
    after: str
    """Text behind the response, in front of the EOS."""

    @classmethod
    def parse(cls, template: str) -> Template:
        """Split `template` at its two fields.

        Raises:
            ConfigError: it does not name {query} once and then {response} once.
        """
        if template.count("{query}") != 1 or template.count("{response}") != 1:
            raise ConfigError(
                f"template {template!r} must name {{query}} once and {{response}} once"
            )
        before, rest = template.split("{query}")
        if "{response}" not in rest:
            raise ConfigError(f"template {template!r} must name {{query}} before {{response}}")
        middle, after = rest.split("{response}")
        between = middle.rstrip()
        return cls(before, between, middle[len(between) :], after)

    def prompt(self, query: str) -> str:
        """Everything up to where the response begins."""
        return f"{self.before}{query}{self.between}"

    def response(self, response: str) -> str:
        """The response as it is trained on."""
        return f"{self.glue}{response}{self.after}"


@dataclass(frozen=True)
class Codec:
    """A tokenizer, a template, and the tokens that end a response."""

    tokenizer: PreTrainedTokenizerBase
    """The model's own tokenizer."""
    template: Template
    """The same in every stage."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response; the first one is appended in training."""
    pad_id: int
    """Fills batches; may equal a stop token, since lengths are always kept apart."""

    def prompt_ids(self, query: str) -> list[int]:
        """Tokens of the prompt, with the tokenizer's own opening token if it has one."""
        return list(self.tokenizer(self.template.prompt(query))["input_ids"])

    def response_ids(self, response: str, *, ended: bool = True) -> list[int]:
        """Tokens of a response, with the stop token if it `ended`."""
        text = self.template.response(response)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, self.stop_ids[0]] if ended else ids

    def document_ids(self, query: str, response: str) -> list[int]:
        """Tokens of a whole question and answer, ended."""
        return self.prompt_ids(query) + self.response_ids(response)

    def judged_ids(self, response: str) -> list[int]:
        """Tokens of a response for a reward model, which reads its score at the last of them.

        The stop token is there unless it is the padding token too: transformers looks for the last
        token that is not padding, and both must find the same one.
        """
        return self.response_ids(response, ended=self.pad_id not in self.stop_ids)

    def text_of(self, response_ids: Sequence[int]) -> str:
        """The response as people read it: no special tokens, no template white space."""
        text = str(self.tokenizer.decode(list(response_ids), skip_special_tokens=True))
        return text.removeprefix(self.template.glue).removesuffix(self.template.after)

    def fit_query(self, query: str, room: int, too_long: TooLong, where: str) -> str | None:
        """The query, if its prompt has at most `room` tokens.

        Args:
            query: The query.
            room: Most tokens of the prompt.
            too_long: "error" stops, "drop" gives None, "cut" shortens the query from its end.
            where: Names the row in the message.

        Raises:
            DataError: the prompt is too long and `too_long` is "error", or even an empty query is.
        """
        length = len(self.prompt_ids(query))
        if length <= room:
            return query
        if too_long == "drop":
            return None
        if too_long == "error":
            raise DataError(
                f"{where}: the prompt has {length} tokens and only {room} fit beside the response",
                "set too_long to drop or cut, shorten the response, or take a longer context",
            )
        characters = len(query)
        while length > room and characters:
            characters = min(characters - 1, characters * room // length)
            length = len(self.prompt_ids(query[:characters].rstrip()))
        if length > room:
            raise DataError(f"{where}: the template alone has {length} tokens and {room} fit")
        return query[:characters].rstrip()
