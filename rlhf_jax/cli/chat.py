"""Talks with a policy in a terminal; or answers the lines of a pipe, one after the other.

  rlhf-jax chat --model runs/dpo
  rlhf-jax chat --model models/Qwen2.5-0.5B-Instruct --system "Answer in one sentence." --temperature 0.7 --dtype bfloat16

Every line is a message, but for commands:

  /reset        begins anew; the system message stays
  /system TEXT  begins anew with another system message, or with none
  /undo         takes back the last message and its answer
  /save FILE    writes the conversation as one row of JSONL
  /exit         ends, as does the end of the input
  //TEXT        is the message /TEXT

Ctrl-C ends an answer. When the context is full, the oldest turns are left out of what the policy reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from absl import flags

from rlhf_jax.cli import drawn
from rlhf_jax.errors import UserError, nearest

FLAGS_HELP = {
    "--model DIR": "a policy: a run's workdir, its best/ folder, one step, or a Hugging Face directory; adapters included",
    "--system TEXT": "system message",
    "--template NAME": "chat template in place of the model's own: a shipped name or a file",
    "--temperature T": "default 1.0; 0 is greedy",
    "--top_k K, --top_p P": "filters; 0 and 1.0 switch them off (default)",
    **drawn.FLAGS_HELP,
    "--max_new_tokens N": "of an answer (default 512)",
    "--seed S": "the same seed and messages draw the same answers (default 0)",
    "--context N": "tokens of the longest conversation (default: the model's)",
    "--dtype float32|bfloat16": "of the computation (default: a run's own; float32 for a Hugging Face directory)",
    "--tensor N": "devices over which the model is split (default 1)",
}
UNSEEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # what would steer the terminal
COMMANDS = ("/reset", "/system", "/undo", "/save", "/exit", "/help")

flags.DEFINE_string("model", "", "policy to talk with")
flags.DEFINE_string("system", "", "system message")
flags.DEFINE_string("template", "", "chat template")
flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0)
flags.DEFINE_integer("top_k", 0, "0 = off", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "1 = off", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_multi_string("filters", [], "name:key=value or JSON")
flags.DEFINE_multi_string("stop_strings", [], "ends of answers")
flags.DEFINE_integer("max_new_tokens", 512, "tokens", lower_bound=1)
flags.DEFINE_integer("seed", 0, "of the answers")
flags.DEFINE_integer("context", 0, "tokens; 0 = the model's", lower_bound=0)
flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "of the computation")
flags.DEFINE_integer("tensor", 1, "devices", lower_bound=1)


def main() -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    if not options.model:
        raise UserError("--model is missing: name a policy's workdir or a Hugging Face directory")
    if options.top_p <= 0:
        raise UserError(f"--top_p = {options.top_p}: must be above 0; 1.0 switches it off")
    drawn.check_temperature(options.temperature)
    terminal = sys.stdin.isatty()
    chat = _opened()
    chat.system(options.system)
    if terminal:
        print("A line is a message; /help lists the commands.")
    while (line := _line(terminal)) is not None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                if line.split()[0] == "/exit":
                    break
                print(_command(chat, line), file=sys.stderr if not terminal else sys.stdout, flush=True)
            elif line.strip():
                _answer(chat, line.removeprefix("/") if line.startswith("//") else line, terminal)
        except UserError as error:
            print(f"rlhf-jax: {error}", file=sys.stderr, flush=True)
    return 0


def _opened() -> Any:
    """The conversation, nothing said yet."""
    import dataclasses

    from rlhf_jax.cli.opened import chosen, conversing, meshed
    from rlhf_jax.eval.conversation import Chat, Sampling
    from rlhf_jax.eval.models import Policy

    options = flags.FLAGS
    source = conversing(options.model, "--model", options.template)
    tokenizer = source.reader("--model")
    config = chosen(source.config, options.context, options.dtype)
    with meshed(1, options.tensor) as mesh:
        policy = Policy(dataclasses.replace(source, config=config), "--model", mesh)
    composed = drawn.compose(options.filters, options.stop_strings, tokenizer, config.vocab_size, options.max_new_tokens)
    settings = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, max_new_tokens=options.max_new_tokens,
                        seed=options.seed, filters=composed)
    return Chat(policy, tokenizer, source.layout("--model"), settings)


def _line(terminal: bool) -> str | None:
    """The next line without its end; None when there is no more."""
    try:
        line = input("> ") if terminal else sys.stdin.readline()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if terminal:
            print()
            return None
        raise
    except UnicodeDecodeError:
        raise UserError("the input is not UTF-8 text") from None
    if not terminal and not line:
        return None
    return line.removesuffix("\n").removesuffix("\r")


def _answer(chat: Any, text: str, terminal: bool) -> None:
    """Prints an answer as it comes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the message is not UTF-8 text") from None
    pieces = chat.say(text)
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                sys.stdout.write(piece.translate(UNSEEN) if terminal else piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not terminal:
            raise
    print(" …" if chat.truncated else "", flush=True)
    if chat.forgotten:
        print(f"rlhf-jax: the context of {chat.context} tokens is full: the oldest {chat.forgotten} messages were not read", file=sys.stderr,
              flush=True)


def _command(chat: Any, line: str) -> str:
    """Does what a command says; returns what to tell the user."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/help":
        return (__doc__ or "").split("commands:\n\n")[1].split("\n\n")[0]
    if name == "/system":
        chat.system(rest)
        return "a new conversation" + (" with this system message" if rest else " without a system message")
    if name == "/save":
        return _save(chat, rest)
    if name not in COMMANDS:
        raise UserError(f"{name} is no command{nearest(name, COMMANDS)}; a message that begins with / is written with two")
    if rest:
        raise UserError(f"{name} takes nothing behind it, got {rest!r}")
    if name == "/undo":
        return "taken back" if chat.undo() else "nothing to take back"
    chat.system(chat.messages[0]["content"] if chat.messages and chat.messages[0]["role"] == "system" else "")
    return "a new conversation"


def _save(chat: Any, path: str) -> str:
    from rlhf_jax.files import write_whole

    if not path:
        raise UserError("/save needs a file: /save talk.jsonl")
    if os.path.exists(path):
        raise UserError(f"{path} exists: name another file")
    try:
        write_whole(path, json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} cannot be written ({error}); choose another path") from error
    return f"{len(chat.messages)} messages in {path}"
