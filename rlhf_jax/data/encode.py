"""Records to arrays: render the conversation once, tokenize once, read the mask off the offsets.

The first token of a response and its end-of-turn token are trained on; the prompt and the header are not. Position 0 never is: law 1
makes its log-prob zero. Contents are shielded, so that control strings inside a message stay text. `Encoder` also applies the length
policy: a prompt longer than the context or a row without loss tokens stops with file:line, and a response that runs over it is an
error, cut, or left out, by `config.data.overlong`, counted in `Stats`.
The steps of an answer are joined by a line break; a step's verdict sits on the token that holds its last character, and the last step's on
the row's last token, where every reward model's score is read. A step that a cut leaves incomplete loses its verdict.
A shipped template whose control tokens the tokenizer lacks, or any whose end token it lacks, would be split into bytes in silence: refused.
Deviation: a long document is cut into chunks that overlap by one token, so that every token but the first is trained exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.chat import ChatTemplate, rewritten, strings
from rlhf_jax.data.records import (
    Demo,
    Feedback,
    Message,
    Messages,
    Preference,
    Prompt,
    Ranking,
    Rating,
    Record,
    Stepwise,
    Text,
    Tools,
    where,
)
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, nearest

OVERLONG = ("error", "truncate", "skip")
SEPARATOR = "\n"  # between the steps of an answer
_SO_FAR = (Message(role="user", content="question"), Message(role="assistant", content="what-was-answered-so-far"))  # no template has these words
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>")  # how most models spell control tokens
Row = dict[str, Any]  # one row of the prepared set: arrays, text as str


@dataclasses.dataclass
class Stats:
    """What became of a file's rows."""

    read: int = 0  # rows of the file
    kept: int = 0  # rows written; more than `read` where documents were cut into chunks
    truncated: int = 0  # rows cut at the context
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)  # rows left out, by reason
    identical: int = 0  # pairs, or rankings, of which two branches are the same tokens: they teach nothing
    margins: int = 0  # pairs with a margin
    desirable: int = 0  # responses said to be good
    steps: int = 0  # steps with a verdict
    steps_cut: int = 0  # verdicts lost at the context
    tokens: int = 0
    loss_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"skipped": dict(self.skipped)}


class Encoder:
    """Turns records of any kind into rows of one prepared set.

    Args:
      tokenizer: ids and offsets.
      template: the conversation's layout; None serves plain text only.
      max_length: tokens of context, T ≥ 2; everything but prompts.
      prompt_length: tokens of prompt, P ≥ 1; prompts only.
      overlong: error, truncate or skip.

    Raises:
      UserError: an option is out of range, or the template does not fit the tokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, *, max_length: int, prompt_length: int | None, overlong: str
    ) -> None:
        if overlong not in OVERLONG:
            raise UserError(f"config.data.overlong expected one of {', '.join(OVERLONG)}, got {overlong!r}{nearest(overlong, OVERLONG)}")
        for key, value, least in (("max_length", max_length, 2), ("prompt_length", 1 if prompt_length is None else prompt_length, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"config.data.{key} expected a whole number of tokens, at least {least}, got {value!r}; raise it")
        self.tokenizer, self.template, self.stats = tokenizer, template, Stats()
        self.max_length, self.prompt_length, self.overlong = max_length, prompt_length, overlong
        self._header = ""  # what the template writes before an answer and marks as said
        if template is not None:
            self._check_template(template)

    def __call__(self, record: Record) -> Iterator[Row]:
        """The rows that a record becomes: one, none (skipped), or several (chunks of a document)."""
        self.stats.read += 1
        encode = {
            Demo: self._demo, Text: self._text, Preference: self._preference, Ranking: self._ranking, Feedback: self._feedback,
            Rating: self._rating, Stepwise: self._stepwise, Prompt: self._prompt,
        }
        for row in encode[type(record)](record):  # type: ignore[operator]
            self.stats.kept += 1
            yield row | {"source": record.source, "line": record.line}

    def conversation(self, messages: Messages, context: int = 0, tools: Tools = ()) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] int32 and loss mask [n] bool of a conversation; the first `context` messages are not trained on."""
        tokens, mask, _, _ = self._laid_out(messages, context, tools)
        return tokens, mask

    def _laid_out(self, messages: Messages, context: int, tools: Tools = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """`conversation`, and where each token comes from: offsets [n, 2] in the text."""
        hidden, schemas, stand = self._shielded(messages, tools)
        text, spans = self._template.render(hidden, tools=schemas, context=context, end=self.tokenizer.end)
        begin = 0
        if context:
            prompt = self._template.text(hidden[:context], add_generation_prompt=True, tools=schemas)
            begin = len(prompt)
            if not text.startswith(prompt):
                raise UserError(
                    f"config.data.template expected prompts to render as beginnings of conversations, got {self._template.name!r}, "
                    "which renders them differently; write the same header for add_generation_prompt as for an assistant message"
                )
        text, literal = self.tokenizer.unshield(text, stand)
        tokens, offsets = self.tokenizer.encode(text, literal=literal)
        mask = np.zeros(len(tokens), bool)
        for start, end in spans:
            start += len(self._header) if text.startswith(self._header, start) else 0
            mask |= (offsets[:, 0] < end) & (offsets[:, 1] > max(start, begin))
        mask[:1] = False
        return tokens, mask, offsets, text

    def prompt(self, messages: Messages, tools: Tools = ()) -> np.ndarray:
        """Tokens [n] int32 of a conversation up to where the assistant speaks, its header included."""
        hidden, schemas, stand = self._shielded(messages, tools)
        text, literal = self.tokenizer.unshield(self._template.text(hidden, add_generation_prompt=True, tools=schemas), stand)
        return self.tokenizer.encode(text, literal=literal)[0]

    def reply(self, messages: Messages) -> np.ndarray:
        """Tokens [n] int32 of what stands behind an assistant's end token when `messages` answer it, up to where the assistant speaks again.

        They are laid out behind a stand-in for the conversation so far, one question and one answer, and read off the whole text's tokens, so that
        the answer's own tokens need not be known, and stay as they are.

        Args:
          messages: the turns of others, at least one.

        Raises:
          UserError: the template refuses them.
        """
        hidden, _, stand = self._shielded((*_SO_FAR, *messages), ())
        text = self._template.text(hidden, add_generation_prompt=True)
        begin = text.find(self.tokenizer.end, text.find(hidden[1]["content"])) + len(self.tokenizer.end)
        text, literal = self.tokenizer.unshield(text, stand)
        tokens, offsets = self.tokenizer.encode(text, literal=literal)
        return tokens[offsets[:, 0] >= begin]

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise UserError("config.data.template expected a template for conversations, got none; name one, for example 'plain'")
        return self.template

    def _shielded(self, messages: Messages, tools: Tools):
        """Messages and tools without control strings in any of their texts; roles are the template's own words."""
        said = [{key: value for key, value in message.items() if key != "role"} for message in messages]
        texts, stand = self.tokenizer.shield(list(strings([*said, *tools])))
        hidden = rewritten([*said, *tools], iter(texts))
        shown = [{"role": message["role"], **rest} for message, rest in zip(messages, hidden)]
        return shown, hidden[len(messages) :], stand

    def _check_template(self, template: ChatTemplate) -> None:
        question, answer = (Message(role="user", content="question"), Message(role="assistant", content="answer"))
        text, spans = template.render((question, answer), end=self.tokenizer.end)
        # A foreign template may mean its headers as plain text (Zephyr), but an end that the model cannot say in one token is none.
        behind = _CONTROL.match(text.rpartition("answer")[2].lstrip())
        written = _CONTROL.findall(text) if template.shipped else [behind.group()] if behind else []
        if unknown := next((control for control in written if control not in self.tokenizer.added), None):
            raise UserError(
                f"config.data.template = {template.name!r} writes {unknown!r}, which is no token of the tokenizer and would be split into "
                "pieces; use the model's own template or 'roles', which needs no control tokens, or add it with config.model.add_tokens"
            )
        asked, opened = (template.text((question,), add_generation_prompt=prompted) for prompted in (False, True))
        header = opened.removeprefix(asked) if opened.startswith(asked) else ""
        if spans and header and text.startswith(header, spans[-1][0]):
            self._header = header
        tokens, mask = self.conversation((question, answer), context=1)
        if not mask.any() or tokens[mask][-1] != self.tokenizer.end_id:
            raise UserError(
                f"config.data.template expected every answer to end with {self.tokenizer.end} inside what the assistant says, got "
                f"{template.name!r}, which does not; add it there, or name the template's own end token in config.tokenizer.end"
            )

    def _placed(self, record: Record, messages: Messages, context: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask, _, _ = self._checked(record, messages, context)
        return tokens, mask

    def _checked(self, record: Record, messages: Messages, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """`_laid_out`, with the row's place in every complaint."""
        try:
            tokens, mask, offsets, text = self._laid_out(messages, context, _tools(record))
        except UserError as error:
            raise UserError(f"{where(record)} {error}") from None
        if not mask.any():
            raise UserError(f"{where(record)} response expected at least one token to train on, got none; fill it in or remove the row")
        first = int(mask.argmax())
        if first >= self.max_length:
            raise UserError(
                f"{where(record)} prompt expected fewer than {self.max_length} tokens (config.data.max_length), got {first}; "
                "shorten it or raise the limit"
            )
        return tokens, mask, offsets, text

    def _fits(self, record: Record, length: int) -> bool:
        """Whether the row is kept, by the policy; cutting is the caller's."""
        if length <= self.max_length:
            return True
        if self.overlong == "error":
            raise UserError(
                f"{where(record)} conversation expected at most {self.max_length} tokens (config.data.max_length), got {length}; "
                "raise the limit, or set config.data.overlong to 'truncate' or 'skip'"
            )
        if self.overlong == "skip":
            self.stats.skipped["longer than config.data.max_length"] += 1
            return False
        self.stats.truncated += 1
        return True

    def _count(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        self.stats.tokens += len(tokens)
        self.stats.loss_tokens += int(mask.sum())

    def _demo(self, record: Demo) -> Iterator[Row]:
        yield from self._one(record, record.messages, record.context)

    def _one(self, record: Record, messages: Messages, context: int, **more: Any) -> Iterator[Row]:
        """The row of one conversation, if it is kept."""
        tokens, mask = self._placed(record, messages, context)
        if self._fits(record, len(tokens)):
            tokens, mask = tokens[: self.max_length], mask[: self.max_length]
            self._count(tokens, mask)
            yield {"tokens": tokens, "loss_mask": mask, **more}

    def _feedback(self, record: Feedback) -> Iterator[Row]:
        for row in self._one(record, record.prompt + record.response, len(record.prompt), desirable=np.bool_(record.desirable)):
            self.stats.desirable += int(record.desirable)
            yield row

    def _rating(self, record: Rating) -> Iterator[Row]:
        yield from self._one(record, record.prompt + record.response, len(record.prompt), score=np.float32(record.score))

    def _stepwise(self, record: Stepwise) -> Iterator[Row]:
        answer = SEPARATOR.join(record.steps)
        messages = (*record.prompt, Message(role="assistant", content=answer))
        tokens, mask, offsets, text = self._checked(record, messages, len(record.prompt))
        ends = self._step_ends(record, answer, mask, offsets, text)
        if not self._fits(record, len(tokens)):
            return
        kept = ends < self.max_length
        self.stats.steps_cut += int((~kept).sum())
        if not kept.any():
            self.stats.skipped["no step ends within config.data.max_length"] += 1
            self.stats.truncated -= 1  # left out, not cut
            return
        tokens, mask = tokens[: self.max_length], mask[: self.max_length]
        self._count(tokens, mask)
        self.stats.steps += int(kept.sum())
        yield {"tokens": tokens, "loss_mask": mask, "steps": ends[kept], "labels": np.array(record.labels)[kept]}

    def _step_ends(self, record: Stepwise, answer: str, mask: np.ndarray, offsets: np.ndarray, text: str) -> np.ndarray:
        """The position of each step's verdict, [steps] int32, rising."""
        said = answer.strip()  # a template may strip the answer
        start = text.find(said, int(offsets[mask][0, 0]))
        if start < 0:
            raise UserError(
                f"{where(record)} completions expected a template that writes an answer as it stands, got "
                f"{self._template.name!r}, which rewrites it; choose another config.data.template"
            )
        start -= len(answer) - len(answer.lstrip())
        lengths = np.array([len(step) + len(SEPARATOR) for step in record.steps])
        trailing = np.array([len(step) - len(step.rstrip()) + len(SEPARATOR) for step in record.steps])
        last = start + np.cumsum(lengths) - trailing - 1  # each step's last character that is not white space
        # The bytes of one character share its offset, and a token may begin before it: the last one that begins there or before.
        ends = np.searchsorted(offsets[:, 0], last, side="right") - 1
        ends[-1] = len(offsets) - 1
        if (np.diff(ends) <= 0).any():
            raise UserError(f"{where(record)} completions expected steps that end in a token of their own, got two in one; join them")
        return ends.astype(np.int32)

    def _preference(self, record: Preference) -> Iterator[Row]:
        if branches := self._branches(record, record.prompt, (record.chosen, record.rejected)):
            row: Row = {"margin": np.float32(record.margin or 0.0)}
            self.stats.margins += int(record.margin is not None)
            for name, (tokens, mask) in zip(("chosen", "rejected"), branches):
                row[f"{name}_tokens"], row[f"{name}_mask"] = tokens, mask
            yield row

    def _ranking(self, record: Ranking) -> Iterator[Row]:
        if branches := self._branches(record, record.prompt, record.responses):
            tokens, masks = zip(*branches)
            sizes = np.array([len(branch) for branch in tokens], np.int32)
            yield {"tokens": np.concatenate(tokens), "loss_mask": np.concatenate(masks), "sizes": sizes}

    def _branches(self, record: Record, prompt: Messages, responses: Sequence[Messages]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, loss mask) of every response, cut at the context; none if the row is left out."""
        whole = [self._placed(record, prompt + response, len(prompt)) for response in responses]
        if not self._fits(record, max(len(tokens) for tokens, _ in whole)):
            return []
        branches = [(tokens[: self.max_length], mask[: self.max_length]) for tokens, mask in whole]
        for tokens, mask in branches:
            self._count(tokens, mask)
        self.stats.identical += int(len({tokens.tobytes() for tokens, _ in branches}) < len(branches))
        return branches

    def _prompt(self, record: Prompt) -> Iterator[Row]:
        try:
            tokens = self.prompt(record.messages, record.tools)
        except UserError as error:
            raise UserError(f"{where(record)} {error}") from None
        if self.prompt_length is not None and len(tokens) > self.prompt_length:
            raise UserError(
                f"{where(record)} prompt expected at most {self.prompt_length} tokens (config.data.prompt_length), got {len(tokens)}; "
                "shorten it or raise the limit"
            )
        self.stats.tokens += len(tokens)
        reference = "" if record.reference is None else json.dumps(record.reference)
        yield {"tokens": tokens, "messages": json.dumps(record.messages), "reference": reference}

    def _text(self, record: Text) -> Iterator[Row]:
        ids, _ = self.tokenizer.encode(record.text, control=False)
        first = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        tokens = np.concatenate([first, ids, [self.tokenizer.eos_id]]).astype(np.int32)
        for start in range(0, len(tokens) - 1, self.max_length - 1):
            chunk = tokens[start : start + self.max_length]
            mask = np.arange(len(chunk)) > 0
            self._count(chunk, mask)
            yield {"tokens": chunk, "loss_mask": mask}


def _tools(record: Record) -> Tools:
    return () if isinstance(record, Text) else record.tools
