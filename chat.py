#!/usr/bin/env python
"""Chat in the terminal with a fine-tuned model and its base, and see what the fine-tune changed.

    python chat.py                                 the newest adapter beside its base; F2 switches between the two
    python chat.py --adapter faq_sample-smollm2    another adapter, by name or folder; give it again for several
    python chat.py --continue                      go on with the last conversation
    python chat.py "What is a deductible?"         one answer on stdout, then done; add --compare for every model's
    python chat.py --json < questions.txt          one question a line in, one JSON object a line out
    python chat.py --review faq_sample-smollm2     judge the answers of base and adapter blind; needs no model

In the chat /help lists the commands. Piped questions are independent of each other.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TextIO, get_type_hints

import psutil
import tyro
from annotated_types import Ge, Le
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.markdown import Markdown, MarkdownIt
from rich.table import Table
from rich.text import Text
from typing_extensions import Doc

import finetune
from finetune import BadInput, Source, brief, chat_ids, clean, peft, safetensors, torch, transformers

bnb, bnb_nn, functional = map(finetune.Lazy, ("bitsandbytes.functional", "bitsandbytes.nn", "torch.nn.functional"))
lora_layers, prompt_toolkit = map(finetune.Lazy, ("peft.tuners.lora", "prompt_toolkit"))

# ----------------------------------------------------------------------------------------------------------------------
# Constants and flags: takes the command line, gives Options
# Must not import anything heavy, so that --help and bad flags answer at once.

BASE = "base"  # the name under which the model without adapter answers
CACHE_SIZE = 512  # tokens that a new static KV cache holds; small, as attention reads all of it; doubled when full
PREFILL = 512  # prompt tokens in one forward: Ctrl-C is heard between two of them
WINDOW = 64  # prompt tokens in one CUDA graph of prefill: about as many as a next question has
REPEAT_LAST = 64  # tokens that repeat_penalty looks back over, as in ollama
TURN_LENGTH = 8  # tokens that one model writes in /compare before the next one's turn
TOP = 3  # most likely tokens that /compare shows where two answers diverge
PROBE = "What does this cover?"  # an adapter that changes no logit after this question has no effect
NO_EFFECT = "has no effect: its logits are the base's"
RETRIEVED = "retrieved"  # the name under which the base answers with looked-up rows in its prompt
WITH_ROWS = "+rows"  # what follows an adapter's name when it answers so
NEAR, SAME = 55, 70  # two questions so many percent alike are near; so many, the same in other words
NARROW = 38  # columns of /compare that would be narrower are shown one under the other
KEPT = Path("data/kept.jsonl")  # where /keep collects rows


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How an answer is sampled, with ollama's names. Each has its lowest value, its highest, and its help."""

    temperature: Annotated[float, Ge(0), Le(2), Doc("0 always takes the most likely token")] = 0.8
    top_p: Annotated[float, Ge(0), Le(1), Doc("sample among the most likely tokens that make up this share")] = 0.9
    top_k: Annotated[int, Ge(0), Le(10**6), Doc("sample among so many most likely tokens; 0: all")] = 40
    repeat_penalty: Annotated[float, Ge(0.5), Le(2), Doc("above 1: tokens of the last 64 are less likely")] = 1.0
    num_predict: Annotated[int, Ge(-1), Le(10**6), Doc("tokens an answer may have; -1: as the context allows")] = 512
    seed: Annotated[int | None, Ge(0), Le(2**63 - 1), Doc("the same seed gives the same answer; None: random")] = None
    strength: Annotated[float, Ge(0), Le(2), Doc("how much the adapter counts: 0 is the base, 1 as trained")] = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    question: tyro.conf.Positional[str | None] = None  # Answer this and leave; else chat, or read stdin if piped.
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # Name in adapters/, or folder. Default: the newest.
    model: str | None = None  # Hub id, folder or .gguf file, instead of the base that the adapter names.
    system: str | None = None  # System prompt.
    go_on: Annotated[bool, tyro.conf.arg(name="continue")] = False  # Open the last conversation again.
    compare: bool = False  # Base and every adapter answer each question, without and with looked-up rows.
    json: bool = False  # One JSON object a line: model, question, answer, tokens, seconds, seed; rows, if looked up.
    # All of stdin is one question, not each line; it follows the question given here, if any.
    whole_input: bool = False
    review: str | None = None  # Judge this adapter's saved answers blind, beside the base's: no model is loaded.
    votes: Path | None = None  # With --review: take in the votes that the page's blind mode has saved.
    num_ctx: Annotated[int, Ge(64)] = 4096  # Context in tokens, at most what the model can.
    version: bool = False  # Print the version and leave.
    parameters: tyro.conf.OmitArgPrefixes[Parameters] = dataclasses.field(default_factory=Parameters)
    given: tyro.conf.Suppress[tuple[str, ...]] = ()  # names of the parameters that stand on the command line


def parse_options(argv: list[str] | None = None) -> Options:
    flags = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, args=argv, prog="chat.py", description=__doc__, config=flags)
    if options.version:
        print(f"chat.py {finetune.__version__}")
        raise SystemExit(0)
    for problem in finetune.check_bounds(options):
        raise BadInput(problem)
    for name, value in dataclasses.asdict(options.parameters).items():
        parse_parameter(name, value, "--" + name.replace("_", "-"))
    words = {word.partition("=")[0].replace("-", "_") for word in (sys.argv[1:] if argv is None else argv)}
    return dataclasses.replace(options, given=tuple(name for name in PARAMETERS if f"__{name}" in words))


# name -> (type, lowest, highest, help)
PARAMETERS = {
    name: (float if hint.__origin__ is float else int, low.ge, high.le, meaning.documentation)
    for name, hint in get_type_hints(Parameters, include_extras=True).items()
    for low, high, meaning in [hint.__metadata__]
}


def parse_parameter(name: str, given: Any, shown: str) -> float | int | None:
    """The value of a parameter. Raises BadInput that says what it may be."""
    kind, low, high, _ = PARAMETERS[name]
    if name == "seed" and given in (None, "random", "none"):
        return None
    try:
        value = kind(str(given))
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < 1000 else f"of {low:g} or more"
        raise BadInput(f"{shown} must be {what} {limits}, not {clean(str(given))!r}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Main and scripting: takes the command line, gives an exit code
# Answers go to stdout, all else to stderr. Nothing that a library prints may reach either: it goes to a log.


def main(argv: list[str] | None = None) -> int:
    """0: done, 1: failed, 2: a bad flag, adapter or model, 130: interrupted, 143: ended by SIGTERM."""
    # Waiting threads that spin would starve the others wherever cores are few.
    for name, value in {**finetune.QUIET, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    code = 0
    try:
        options = parse_options(argv)
        with finetune.own_screen(state_file_or_null("chat.log")) as (out, err):
            finetune.console.file = err  # the progress of a download is no answer
            run(options, out, err)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as signalled:
        code = signalled.code
        if hasattr(signal, "alarm"):
            signal.alarm(0)  # see end()
    except BrokenPipeError:  # the reader of stdout has seen enough, as `head` has
        pass
    except Exception as error:
        code = 2 if isinstance(error, BadInput) else 1
        errors.print(Text(f"chat.py: {clean(describe(error))}", "red" if errors.is_terminal else ""))
    if any(thread.name.startswith("load") for thread in threading.enumerate()):
        os._exit(code)  # torch cannot be torn down in the middle of its import
    return code


def end(number: int, _: Any = None) -> None:
    """What SIGTERM and SIGHUP do. Python drops the exception if it comes inside an object's __del__, and the chat would
    go on: so it is raised again after two seconds, until main() hears it.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: end(number))
        signal.alarm(2)
    sys.exit(128 + number)


def run(options: Options, out: TextIO, err: TextIO) -> None:
    """A chat if there is a terminal and no question, else a script."""
    at_terminal = bool(sys.stdin and sys.stdin.isatty())
    if at_terminal:  # which is put back as it was when a signal ends the program
        for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
            signal.signal(getattr(signal, name), end)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold any bytes
    if options.review is not None or options.votes:
        run_review(options, out)
        return
    source, adapters = choose_models(options)
    talks = options.question is None and not (options.json or options.whole_input) and out.isatty()
    if talks and at_terminal:
        run_chat(options, source, adapters, out)
    else:
        run_script(options, source, adapters, out, err)


def run_script(options: Options, source: Source, adapters: list[Adapter], out: TextIO, err: TextIO) -> None:
    """Answer the questions, each on its own."""
    if options.go_on:
        raise BadInput("--continue: goes on in the chat, and this is none: a question is given or something is piped")
    engine, console = None, make_console(out)
    for question in read_questions(options):
        problems = []
        if engine is None:
            engine = Engine(source, options.num_ctx, adapters)
            problems += [f"{model.name} {NO_EFFECT}" for model in engine.models.values() if model.no_effect]
            problems += engine.find_rows() if options.compare else []
        messages = Conversation(readable(options.system or "")).messages(question)
        names, left_out = engine.that_fit(messages, engine.context - 1)
        err.writelines(f"chat.py: {clean(problem)}\n" for problem in [*problems, *left_out])
        names = names if options.compare else names[1:2] or names[:1]  # the first adapter, else the base
        parameters = with_seed(options.parameters)
        for name in names:
            if options.json:
                answer = engine.answer(messages, name, parameters)
                fields = {"model": answer.model, "question": question, "answer": answer.text, "tokens": answer.tokens}
                fields |= {"seconds": round(answer.seconds, 3), "seed": answer.seed}
                fields |= {"rows": answer.rows} if answer.rows else {}
                out.write(finetune.json_text(fields) + "\n")
                continue
            if options.compare:
                out.write(f"[{clean(name)}]\n")
            answer = write_answer(console, engine.stream(messages, name, parameters))
            err.writelines(f"{clean(line)}\n" for line in rows_read([answer]))


def read_questions(options: Options) -> Iterator[str]:
    """The question of the command line, else those of stdin, whatever bytes it holds."""
    texts: Iterable[str] = [options.question or ""]
    if options.question is None or options.whole_input:
        if sys.stdin is None:
            raise BadInput("stdin is closed, and no question is given")
        texts = [f"{options.question or ''}\n\n{sys.stdin.read()}"] if options.whole_input else sys.stdin
    for text in texts:
        if question := readable(text).replace("\ufeff", "").strip():  # Windows puts that mark before a text
            yield question


def run_chat(options: Options, source: Source, adapters: list[Adapter], out: TextIO) -> None:
    """The terminal chat. The model loads in a thread while the first question is typed."""
    finetune.fetch_weights(source)  # before the prompt, because it shows its progress

    def load() -> Engine:
        engine = Engine(source, options.num_ctx, adapters)
        for model in engine.models.values():
            model.capture_ahead()
        engine.find_rows()
        return engine

    chat = Chat(options, source, adapters, Future(), out)
    loader = ThreadPoolExecutor(1, "load")
    chat.loading = loader.submit(load)  # after Chat() has made the prompt, whose imports would wait for torch's
    chat.loading.add_done_callback(chat.stop_prompt)
    loader.shutdown(wait=False)  # the thread ends with its work
    chat.run()


def describe(error: Exception) -> str:
    """A line for the person; the traceback of what was not foreseen is in the log."""
    if isinstance(error, BadInput):
        return str(error)
    return f"failed: {type(error).__name__}: {brief(error)}; see {state_file_or_null('chat.log')}"


def readable(text: str) -> str:
    """Replace lone surrogates: Python makes them of bytes that are no UTF-8, and no tokenizer, no file takes them."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def state_file(name: str) -> Path:
    """Where something is kept between two starts. Creates the file, for its owner's eyes only. Raises OSError."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    try:
        path = Path(base or Path.home() / ".local/state") / "faq-finetune" / name
    except RuntimeError as error:  # no HOME and no entry in passwd, as in some containers
        raise OSError(str(error)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.chmod(0o600)  # where it had been opened to others
    return path


def state_file_or_null(name: str) -> Path:
    """Where no state can be kept, a file that forgets what is written to it."""
    try:
        return state_file(name)
    except OSError:
        return Path(os.devnull)


# ----------------------------------------------------------------------------------------------------------------------
# The chat: takes typed lines, gives answers on the screen and turns in the conversation
# Its loop, and how a question is answered. Must not touch torch: the engine answers.


class Chat:
    """What the chat holds between two lines. The commands, below, are functions that take it."""

    def __init__(self, options: Options, source: Source, adapters: list[Adapter], loading: Future[Engine], out: TextIO):
        self.options, self.source, self.loading = options, source, loading
        self.conversation = first_conversation(options)
        self.console = make_console(out)
        self.first_names = [BASE, *(adapter.name for adapter in adapters)]
        self.model_name = self.adapter_name = adapters[0].name if adapters else BASE  # who answers; whom F2 brings back
        self.files: list[str] = []  # texts of /read that go with the next question
        self.last: Answer | None = None
        self.compared: tuple[Turn, dict[str, Answer]] | None = None  # what the last /compare asked, and the answers
        self.typed = ""  # what the next prompt begins with
        self.saved = self.trouble = ""  # the conversation as it is on disk; why state files cannot be written
        self.session = make_session(self)

    @property
    def engine(self) -> Engine:
        """The models; waits for them if they are still loading."""
        if not self.loading.done():
            self.note("Loading the model ...")
        return self.loading.result()

    def failure(self) -> BaseException | None:
        """Why the model could not be loaded."""
        return self.loading.exception() if self.loading.done() else None

    @property
    def parameters(self) -> Parameters:
        return self.conversation.parameters

    def known_models(self) -> list[str]:
        """Those that are loaded, then those on disk."""
        loaded = self.loading.result().models if self.loading.done() else self.first_names
        return list(dict.fromkeys([*loaded, *finetune.adapters_on_disk()]))

    def note(self, text: str, style: str = "dim") -> None:
        say(self.console, text, style)

    def ask(self, question: str) -> str:
        """A question of ours within the chat; Ctrl-C and Ctrl-D are an empty answer."""
        self.note(question, "none")
        try:
            session = prompt_toolkit.PromptSession(output=prompt_output(self.console.file))
            return readable(session.prompt("? ")).strip()
        except (KeyboardInterrupt, EOFError):
            return ""

    def run(self) -> None:
        self.greet()
        while not self.failure():
            line = ""
            try:
                line = self.read_line()
                self.obey(line)
            except KeyboardInterrupt:
                self.note("Ctrl-D on an empty line or /bye leaves; /help lists the commands")
            except EOFError:
                return
            except Exception as error:
                if self.failure():
                    break
                if not isinstance(error, BadInput):
                    traceback.print_exc()  # stderr is the log
                self.note(describe(error), "red")
            self.save_state()
            if line.strip():
                self.console.print()
        raise self.failure()

    def read_line(self) -> str:
        typed, self.typed = self.typed, ""
        line = readable(self.session.prompt(">>> ", default=typed))
        if self.session.refresh_interval and self.loading.done():
            self.session.refresh_interval = 0  # the toolbar no longer waits for the model
            for name in self.engine.models:
                self.warn_of_no_effect(name)
        return line

    def stop_prompt(self, loading: Future[Engine]) -> None:
        """Called in the loading thread at its end; if the model could not be loaded, it ends the prompt too."""
        app = self.session.app
        if loading.exception() and app.loop:
            app.loop.call_soon_threadsafe(lambda: app.is_running and not app.is_done and app.exit(result=""))

    def save_state(self) -> None:
        """The conversation is on disk after every turn, for --continue."""
        text = finetune.json_text(self.conversation.as_json(), indent=1)
        if self.conversation.turns and text != self.saved:
            try:
                finetune.write_whole(state_file("conversation.json"), text)
                self.saved = text
            except (OSError, BadInput) as error:
                self.trouble = self.trouble or brief(error)
        if self.trouble and self.trouble != "told":
            self.note(f"History and conversation may not be on disk from now on: {self.trouble}", "yellow")
            self.trouble = "told"

    def greet(self) -> None:
        adapters = ", ".join(self.first_names[1:])
        self.note(f"{self.source.id} in 4 bits" + (f" with {adapters}" if adapters else ""), "bold")
        with_adapter = "F2 switches the adapter off and on, /compare shows both"
        start = with_adapter if adapters else "No adapter yet: python finetune.py trains one"
        self.note(f"{start}, /help lists the commands, Ctrl-D leaves")
        if self.options.go_on:
            show_last_turn(self)

    def warn_of_no_effect(self, name: str) -> None:
        if self.engine.models[name].no_effect:
            self.note(f"{name} {NO_EFFECT}", "yellow")

    def obey(self, line: str) -> None:
        """Run a command; answer any other line, pasted paths too. A mistyped command raises BadInput."""
        word, rest = (part.strip() for part in re.fullmatch(r"(\S*)(.*)", line, re.DOTALL).groups())
        name = ALIASES.get(word, word)
        if name in COMMANDS:
            takes_file = "FILE" in HELP[name][0]
            if takes_file and not rest:
                raise BadInput(f"{name} {HELP[name][0]}: which file?")
            COMMANDS[name](self, finetune.expand(Path(rest.strip("\"'"))) if takes_file else rest)
            return
        if line.startswith("/") and "/" not in word[1:]:
            near = finetune.nearest(word, [*COMMANDS, *ALIASES], 0.75)  # "/home is full" is a question
            if near or not rest:
                hint = near or "; /help lists them"
                raise BadInput(f"No command {word}{hint} (a question that starts with / needs a space before it)")
        text = line.strip()
        if text.startswith('"""'):
            text = text.removeprefix('"""').removesuffix('"""').strip()
        if text and self.options.compare:
            cmd_compare(self, text)
        elif text:
            self.answer(self.new_turn(text), self.model_name)

    def new_turn(self, question: str) -> Turn:
        return Turn("\n\n".join([*self.files, question]))

    @property
    def room(self) -> int:
        """Tokens a prompt may have. The answer gets num_predict tokens, but at most a quarter of the context."""
        limit, wanted = self.engine.context, self.parameters.num_predict
        return limit - min(wanted if wanted >= 0 else limit, limit // 4)

    def fit_messages(self, question: str, names: list[str]) -> list[dict]:
        """What is sent to these models: the question after as many turns as fit. Says so when old turns do not."""

        def count(messages: list[dict]) -> int:
            return max(self.engine.count(messages, name) for name in names)

        messages, dropped = self.conversation.fit(question, count, self.room)
        if dropped:
            turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            self.note(f"The context of {self.engine.context} tokens is full: the {turns} no longer sent", "yellow")
        return messages

    def answer(self, turn: Turn, name: str) -> None:
        """Write an answer to the screen as it comes, say so if it did not come to its end, and keep it in the turn."""
        with self.conversation.asking(turn):
            messages = self.fit_messages(turn.question, [name])
            if len(self.engine.models) > 1:
                self.note(name)
            with interruptible() as stop:
                answer = write_answer(self.console, self.engine.stream(messages, name, self.parameters, stop))
            if answer.text:
                if not turn.replies:  # a new question: the files went with it
                    self.files = []
                turn.add([answer])
        self.last = answer
        for line in rows_read([answer]):
            self.note(line)
        if not answer.text:
            self.note("No answer came; the question is not kept")
        elif answer.stop == "interrupted":
            self.note("Stopped; what came is kept")
        elif answer.stop == "num_predict":
            self.note(f"Stopped at num_predict {answer.tokens}; /set parameter num_predict -1 lets it end")
        elif answer.stop == "context":
            self.note("Stopped: the context is full", "yellow")
        self.engine.models[name].capture_ahead()

    def last_turn(self) -> Turn:
        if not self.conversation.turns:
            raise BadInput("there is no question yet")
        return self.conversation.turns[-1]

    @property
    def context_used(self) -> int:
        """Tokens of the conversation. The toolbar asks at every key; it is tokenized when it has changed."""
        sent = self.conversation.turns[self.conversation.skipped :]  # none if the last question got no answer
        return self.engine.count(self.conversation.messages(), self.model_name) if sent else 0

    def toolbar(self) -> str:
        """As many of these facts as fit, the most wanted first."""
        facts = [self.model_name]
        if not self.loading.done():
            facts.append("loading ...")
        elif not self.failure():
            if last := self.last:
                facts += [f"{last.tokens_per_second:.0f} tok/s", f"first token {last.first_token or 0:.2f} s"]
            facts.append(f"context {self.context_used} of {self.engine.context}")
        if self.parameters.strength != 1 and self.model_name not in (BASE, RETRIEVED):
            facts.append(f"strength {self.parameters.strength:g}")
        if self.files:
            facts.append(f"{len(self.files)} file(s) with the next question")
        if self.adapter_name != BASE:
            facts.append(f"F2: {self.adapter_name if self.model_name != self.adapter_name else BASE}")
        while len(facts) > 1 and cell_len("  ".join(facts)) >= self.console.width:
            facts.pop()
        return "  ".join(facts)


# ----------------------------------------------------------------------------------------------------------------------
# Commands: each takes the chat and what was typed after its word, changes the chat, and says so
# The docstring of a cmd_ function is its line in /help: arguments, a colon, the meaning. What fails is a BadInput.


def cmd_help(chat: Chat, rest: str) -> None:
    """: this list; /? too"""
    rows = [
        *((f"{name} {arguments}".strip(), meaning) for name, (arguments, meaning) in HELP.items()),
        ('"""', "opens and closes a text of several lines; Alt-Enter is a newline too"),
        ("Ctrl-C", "stops an answer and keeps what came"),
        ("Ctrl-X Ctrl-E", "opens the line in your editor"),
    ]
    first = {"overflow": "fold", "max_width": 25 if chat.console.width >= 60 else 13}
    chat.console.print(make_table(((Text(keys, "bold"), Text(meaning)) for keys, meaning in rows), [first]))


def cmd_bye(chat: Chat, rest: str) -> None:
    """: leave; /exit, /quit and Ctrl-D too"""
    raise EOFError  # as Ctrl-D does


def cmd_clear(chat: Chat, rest: str) -> None:
    """: start over (the system prompt and the parameters stay)"""
    start_over(chat, Conversation(chat.conversation.system, parameters=chat.parameters))
    chat.note("Started over")


def start_over(chat: Chat, conversation: Conversation) -> None:
    chat.conversation = conversation
    chat.files, chat.last, chat.compared = [], None, None


def cmd_undo(chat: Chat, rest: str) -> None:
    """: drop the last question and its answer"""
    question = chat.last_turn().question
    chat.conversation.undo()
    chat.note(f"Dropped: {' '.join(question.split())[:60]}")


def cmd_system(chat: Chat, rest: str) -> None:
    """[TEXT]: show or set the system prompt; "" removes it"""
    if rest:
        chat.conversation.system = None if rest in ('""', "''") else rest
        chat.conversation.skipped = 0
    chat.note(f"System prompt: {chat.conversation.system or 'none'}")


def cmd_set(chat: Chat, rest: str) -> None:
    """parameter NAME VALUE: temperature, strength, ...; alone: show them"""
    words = rest.replace("=", " ").split()
    name, *values = (words[1:] if words[:1] == ["parameter"] else words) or [""]
    if name and name not in PARAMETERS:
        there = finetune.nearest(name, PARAMETERS) or f"; there are: {', '.join(PARAMETERS)}"
        raise BadInput(f"no parameter {name}{there}")
    if len(values) > 1:
        raise BadInput(f"{name} takes one value: /set parameter {name} VALUE")
    for value in values:
        changed = {name: parse_parameter(name, value, name)}
        chat.conversation.parameters = dataclasses.replace(chat.parameters, **changed)
    shown = {n: "random" if value is None else str(value) for n, value in dataclasses.asdict(chat.parameters).items()}
    if name:
        chat.note(f"{name} = {shown[name]}")
    else:
        rows = ((Text(n, "bold"), shown[n], Text(help_, "dim")) for n, (*_, help_) in PARAMETERS.items())
        chat.console.print(make_table(rows))


def cmd_show(chat: Chat, rest: str) -> None:
    """: models, parameters and system prompt"""
    cmd_adapter(chat, "")
    cmd_set(chat, "")
    cmd_system(chat, "")
    if chat.conversation.system and not finetune.takes_system(chat.engine.models[chat.model_name].tokenizer):
        chat.note("This model's template has no system turn: the prompt goes into the first question")


def cmd_adapter(chat: Chat, rest: str) -> None:
    """[NAME|base]: list the models, or let another one answer, NAME+rows with looked-up rows (F2: on and off)"""
    if not rest:
        list_models(chat)
        return
    chat.model_name = open_model(chat, rest)
    if chat.model_name != BASE:
        chat.adapter_name = chat.model_name
    chat.note(f"{chat.model_name} answers from now on")
    chat.warn_of_no_effect(chat.model_name)


def list_models(chat: Chat) -> None:
    rows = []
    for name, model in chat.engine.models.items():
        if model.rows:
            what = f"with the {finetune.LOOKED_UP} nearest of {len(model.rows)} rows that taught {model.adapter.name}"
        elif model.adapter:
            what = NO_EFFECT if model.no_effect else model.adapter.summary
        else:
            what = f"{chat.source.id}, without adapter"
        rows.append(("*" if name == chat.model_name else " ", Text(clean(name), "bold"), Text(what, "dim")))
    others = (clean(name) for name in finetune.adapters_on_disk() if name not in chat.engine.models)
    rows += [(" ", Text(name), Text(f"on disk; /adapter {name} loads it", "dim")) for name in others]
    chat.console.print(make_table(rows))


def open_model(chat: Chat, name: str) -> str:
    """Load an adapter from the disk, unless such a model is there already; returns its name here."""
    problems = chat.engine.find_rows()
    if name in chat.engine.models:
        return name
    lacking = "; ".join(problems) if name == RETRIEVED else chat.engine.missing.get(name.removesuffix(WITH_ROWS))
    if lacking:
        raise BadInput(lacking)
    hint = finetune.nearest(name, chat.known_models())
    if hint and name not in finetune.adapters_on_disk() and not finetune.expand(Path(name)).exists():
        raise BadInput(f"no adapter {name}{hint}")
    adapter = read_adapter(finetune.find_adapter(name, "adapter"))
    for model in chat.engine.models.values():
        if model.adapter and model.adapter.path == adapter.path:
            return model.name
    check_base(adapter, chat.source)
    with finetune.working(f"Loading {clean(adapter.name)}"):
        return chat.engine.load_adapter(adapter).name


def cmd_regen(chat: Chat, rest: str) -> None:
    """[NAME]: answer the last question again, as another model if you name one"""
    chat.answer(chat.last_turn(), open_model(chat, rest or chat.model_name))


def cmd_stats(chat: Chat, rest: str) -> None:
    """: tokens and times of the last answer, and what is cached"""
    rows, last = [("last answer", "none yet")], chat.last
    if last:
        read = last.prompt_tokens - last.cached_tokens
        rows = [
            ("last answer", f"{clean(last.model)}, seed {last.seed}, ended by {last.stop}"),
            ("prompt", f"{last.prompt_tokens} tokens: {last.cached_tokens} from the cache, {read} read"),
            ("answer", f"{last.tokens} tokens in {last.seconds:.2f} s, {last.tokens_per_second:.1f} tok/s"),
            ("first token", f"{last.first_token or 0:.2f} s"),
        ]
    rows += [("cache", f"{clean(name)}: {len(model.cached)} tokens") for name, model in chat.engine.models.items()]
    rows += [("context", f"{chat.context_used} of {chat.engine.context} tokens")]
    label = "memory, at most" if finetune.has_gpu() else "memory"
    chat.console.print(make_table([*rows, (label, f"{finetune.memory_now():.2f} GiB")]))


def cmd_score(chat: Chat, rest: str) -> None:
    """TEXT: how likely each model finds TEXT as the answer to the last question"""
    if not rest:
        raise BadInput("/score TEXT: what would be the answer?")
    turn = chat.last_turn()
    with chat.conversation.asking(turn):
        messages = chat.conversation.messages(turn.question)
    room = chat.engine.context - chat.engine.count([{"role": "user", "content": rest}], BASE)
    names, left_out = chat.engine.that_fit(messages, room)
    scores = {name: chat.engine.score(messages, rest, name, chat.parameters.strength) for name in names}
    for line in (*left_out, f"As the answer to: {' '.join(turn.question.split())[:100]}"):
        chat.note(line)
    rows = [(clean(n), f"{mean:.3f}", f"{math.exp(min(-mean, 700)):.2f}", str(k)) for n, (mean, k) in scores.items()]
    heads = [{"header": head, "justify": "right"} for head in ("mean log-probability", "perplexity", "tokens")]
    chat.console.print(make_table(rows, [{}, *heads], show_header=True))


def write_file(chat: Chat, path: Path, text: str, done: str) -> None:
    """Write a file; one that is there already only if the person says so."""
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; name a file in it")
    if not path.exists() or chat.ask(f"{path} is there already. Overwrite it? [y/N]").lower() in ("y", "yes"):
        finetune.write_whole(path, text)
        chat.note(f"{done} {path}")


def cmd_save(chat: Chat, path: Path) -> None:
    """FILE: save the conversation and the parameters as JSON"""
    text = finetune.json_text(chat.conversation.as_json(), indent=1) + "\n"
    write_file(chat, path, text, f"Saved {len(chat.conversation.turns)} turns to")


def cmd_export(chat: Chat, path: Path) -> None:
    """FILE.md: write the conversation as Markdown"""
    write_file(chat, path, chat.conversation.as_markdown(), "Wrote")


def cmd_load(chat: Chat, path: Path) -> None:
    """FILE: go on with a saved conversation"""
    start_over(chat, Conversation.from_json(finetune.read_json(path), str(path), chat.parameters))
    chat.note(f"Loaded {len(chat.conversation.turns)} turns from {path}")
    show_last_turn(chat)


def show_last_turn(chat: Chat) -> None:
    for turn in chat.conversation.turns[-1:]:
        chat.note(f">>> {turn.question}")
        write_answer(chat.console, [turn.reply])


def cmd_read(chat: Chat, path: Path) -> None:
    """FILE: put a text file before your next question"""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text:
        raise BadInput(f"{path}: is empty")
    chat.files.append(text)
    tokens = chat.engine.count([{"role": "user", "content": text}], chat.model_name)
    chat.note(f"{path}: {len(text)} characters, about {tokens} tokens, go with your next question")


def cmd_keep(chat: Chat, rest: str) -> None:
    """[TEXT]: the last question with its answer, or with TEXT, becomes a row of data/kept.jsonl, for --data"""
    turn = chat.last_turn()
    count = add_row(KEPT, {"question": turn.question, "answer": rest or turn.reply.text})
    chat.note(f"{KEPT} has {count} rows now; python finetune.py --data {KEPT} trains on them")


def cmd_copy(chat: Chat, rest: str) -> None:
    """: put the last answer on the clipboard, where the terminal allows it (OSC 52)"""
    text = chat.last_turn().reply.text
    if not can_repaint(chat.console):
        raise BadInput("this terminal has no clipboard")
    chat.console.file.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
    chat.note(f"Sent {len(text)} characters to the terminal's clipboard")


# ----------------------------------------------------------------------------------------------------------------------
# Comparing and voting: commands in which several models answer; and the table of all commands
# One seed for all. No answer enters the conversation before one was chosen.


def cmd_compare(chat: Chat, rest: str) -> None:
    """[QUESTION]: base and every adapter, with and without looked-up rows, answer at once; alone: the last question"""
    turn, problems = chat.new_turn(rest) if rest else chat.last_turn(), chat.engine.find_rows()
    answers = answer_with_all(chat, turn)
    show_comparison(chat, answers)
    show_divergence(chat, answers)
    for line in (*rows_read(answers.values()), *problems):
        chat.note(line)
    show_nearest(chat, turn.question)
    names = list(answers)
    shown = "  ".join(f"{number}: {name}" for number, name in enumerate(names, 1))
    picked = chat.ask(f"\nGo on with the answer of {shown}  Enter: none")
    if picked in map(str, range(1, len(names) + 1)):
        picked = names[int(picked) - 1]
    if picked in names:
        go_on_with(chat, turn, answers, picked)
    else:
        chat.typed = picked  # the next question, most likely


def answer_with_all(chat: Chat, turn: Turn, hidden: Sequence[str] = ()) -> dict[str, Answer]:
    """All answers, shown as they come; or of the models that are to stay hidden. BadInput: fewer than two have text."""
    question_alone = Conversation(chat.conversation.system).messages(turn.question)
    names, left_out = chat.engine.that_fit(question_alone, chat.room, hidden)
    for line in left_out:
        chat.note(line, "yellow")
    if len(names) < 2:
        raise BadInput("there is nothing to compare the base with: /adapter NAME loads an adapter")
    with chat.conversation.asking(turn):
        messages = chat.fit_messages(turn.question, names)
    answers = {name: Answer(name) for name in names}
    area, size = Area(chat.console), chat.console.size
    with interruptible() as stop:
        for answer in chat.engine.compare(messages, names, chat.parameters, stop):
            answers[answer.model] = answer
            if hidden:
                area.paint(Text(f"{len(names)} models answer: {sum(a.tokens for a in answers.values())} tokens", "dim"))
            else:
                area.paint(side_by_side([(a.model, speed_of(a), a.text) for a in answers.values()], chat.console.width))
    area.erase()
    if chat.console.size != size:  # a terminal that does not reflow its lines has lost the one of the question
        chat.note(f">>> {turn.question}")
    answers = {name: answer for name, answer in answers.items() if answer.text}
    if len(answers) < 2:
        raise BadInput("Stopped before there was anything to compare")
    if not turn.replies:
        chat.files = []
    chat.last = answers.get(chat.model_name, next(iter(answers.values())))
    chat.compared = turn, answers
    return answers


def show_comparison(chat: Chat, answers: dict[str, Answer]) -> None:
    """The answers beside each other. Words are marked that the first (in the first: the second) does not have."""
    first, second, *_ = answers.values()
    rows, plain = [], not can_repaint(chat.console)
    for name, answer in answers.items():
        other = second if answer is first else first
        rows.append((name, speed_of(answer), marked(answer.text, other.text, plain)))
    print_columns(chat.console, rows)
    chat.note(f"seed {first.seed} for all; words that differ are marked")


def show_divergence(chat: Chat, answers: dict[str, Answer]) -> None:
    """Where each answer leaves the first one, mostly the base's, and which tokens both found most likely there."""
    alike = [name for name, answer in answers.items() if not answer.rows]  # with rows before it, all of it differs
    for first, name in ((alike[0], name) for name in alike[1:]):
        position = first_difference(answers[first], answers[name])
        if position is None:
            chat.note(f"{first} and {name} gave the same answer")
            continue
        before = chat.engine.models[name].tokenizer.decode(answers[name].ids[max(0, position - 6) : position])
        where = f'after "{" ".join(before.split())}"' if position else "their first"
        chat.note(f"The answers diverge at token {position + 1}, {where}. Most likely tokens there:")
        wide = max(cell_len(clean(first)), cell_len(clean(name)))
        for who in (first, name):
            model, top = chat.engine.models[who], answers[who].top[position : position + 1]
            words = "  ".join(f"{token_text(model, token)} {share:.0%}" for token, share in itertools.chain(*top))
            chat.note(f"  {set_cell_size(clean(who), wide)}  {words or 'had been stopped'}")


def first_difference(one: Answer, other: Answer) -> int | None:
    """The position of the first token that differs, an answer's end being one too; None if they are the same."""
    pairs = enumerate(itertools.zip_longest(one.ids, other.ids))
    return next((position for position, (a, b) in pairs if a != b), None)


def token_text(model: ChatModel, token: int) -> str:
    text = clean(model.tokenizer.decode([token])).strip(" ")
    return "(end)" if token in model.stops else json.dumps(text, ensure_ascii=False)


def show_nearest(chat: Chat, question: str) -> None:
    models = chat.engine.models
    adapters = [model.adapter for model in (models[chat.model_name], *models.values()) if model.adapter]
    if near := adapters and nearest_question(adapters[0], question):
        row, score, ids = near
        side = {"train_ids": "trained on, ", "": ""}.get(ids, "held out, ")
        head = f"Nearest question ({side}{score:.0f}% alike)"
        if ids == "train_ids" and score >= SAME:
            head = f"Trained on this question{', in other words' * (score < 100)} ({score:.0f}% alike)"
        chat.note(f"{head}: {row.question}")
        chat.note(f"Its reference answer: {row.answer}")


def go_on_with(chat: Chat, turn: Turn, answers: dict[str, Answer], name: str) -> None:
    """The conversation goes on with this answer; the others stay beside it."""
    with chat.conversation.asking(turn):
        turn.add(answers.values(), list(answers).index(name))
    chat.note(f"Going on with the answer of {name}")


def cmd_vote(chat: Chat, rest: str) -> None:
    """[QUESTION]: blind A/B: names hidden, order shuffled; the tally is kept"""
    if rest:
        answer_with_all(chat, chat.new_turn(rest), hidden=(BASE, chat.adapter_name))
    if not chat.compared:
        raise BadInput("nothing was compared yet: /compare QUESTION, or /vote QUESTION")
    turn, answers = chat.compared
    first, *others = answers
    pair = [first, chat.adapter_name if chat.adapter_name in others else others[0]]
    random.SystemRandom().shuffle(pair)
    print_columns(chat.console, [(letter, "", answers[name].text) for letter, name in zip("AB", pair, strict=True)])
    vote = chat.ask("Which is better? a, b, = (alike), Enter: no vote").lower()
    if vote not in ("a", "b", "="):
        chat.note("No vote")
        return
    winner = None if vote == "=" else pair["ab".index(vote)]
    chat.note(f"A was {pair[0]}, B was {pair[1]}", "none")
    named = {name: chat.source.id if name == BASE else name for name in pair}
    path, votes = add_vote(turn.question, sorted(named.values()), named.get(winner or ""), answers[first].seed)
    counts = ", ".join(f"{name} {votes.count(model)}" for name, model in sorted(named.items()))
    chat.note(f"Votes so far: {counts}, alike {votes.count(None)} ({finetune.without_home(path)})", "none")
    if rest and winner:
        go_on_with(chat, turn, answers, winner)


# In the order of /help. What takes a FILE is given a Path.
COMMANDS: dict[str, Callable[[Chat, Any], None]] = {
    f"/{command.__name__.removeprefix('cmd_')}": command
    for command in (
        *(cmd_adapter, cmd_compare, cmd_regen, cmd_undo, cmd_clear, cmd_system, cmd_set, cmd_show, cmd_score, cmd_vote),
        *(cmd_keep, cmd_copy, cmd_save, cmd_load, cmd_export, cmd_read, cmd_stats, cmd_help, cmd_bye),
    )
}
HELP = {name: command.__doc__.split(": ", 1) for name, command in COMMANDS.items()}  # name -> arguments, meaning
ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}


# ----------------------------------------------------------------------------------------------------------------------
# Reviewing: takes a finished run, gives a person's verdict on its saved answers
# It needs no model, so it must not touch torch. Every vote is on disk before the next key is read.

LETTERS = "abcd"
STOPS = ("q", "\x03", "\x04")  # the last two are Ctrl-C and Ctrl-D


@dataclasses.dataclass
class Review:
    path: Path
    blind: dict[str, Any]  # of finetune.blind_questions, the questions in the order in which they are asked
    votes: list[dict] = dataclasses.field(default_factory=list)  # {"id", "vote": arms or "none", "shown": arms}

    def save(self) -> None:
        """Readable by its owner alone. "answers" tells this run's questions and answers from any other's."""
        saved = {"version": 1, "seed": self.blind["seed"], "answers": self.blind["answers"], "votes": self.votes}
        saved["result"] = finetune.human_result(self.blind, self.votes)
        finetune.write_whole(self.path, finetune.json_text(saved, indent=1) + "\n")


def run_review(options: Options, out: TextIO) -> None:
    """--review; with --votes, what was judged on the page is taken in instead of asking."""
    if not options.review or options.question is not None:
        raise BadInput("--review ADAPTER takes no question, and --votes FILE needs --review ADAPTER")
    review, console = open_review(options.review), make_console(out)
    try:
        if options.votes:
            say(console, take_votes(review, options.votes))
        else:
            with single_keys() as read_key:
                ask_votes(review, console, read_key)
    except KeyboardInterrupt:
        pass  # every vote is on disk
    finally:
        if review.path.exists():
            finetune.write_pages(review.path.parent)
    show_result(review, console)


def open_review(name: str) -> Review:
    """The run's answers, and the votes so far. Raises BadInput."""
    folder = finetune.find_adapter(name, "--review")
    try:
        blind = finetune.blind_questions(finetune.read_json(folder / "run.json"))
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{folder / 'run.json'}: damaged; python finetune.py makes another run") from None
    if not blind["questions"]:
        raise BadInput(f"--review {name}: its run.json has no answers of base and tuned model to the same questions")
    random.Random(str(blind["seed"])).shuffle(blind["questions"])
    review = Review(folder / "review.json", blind)
    if review.path.exists():
        review.votes = read_votes(review, review.path, "move it away, and the review begins anew")
    return review


def read_votes(review: Review, path: Path, fix: str) -> list[dict]:
    """The votes in review.json, or in a file that the page has saved. Raises BadInput if damaged, or of another run."""
    run = {"seed": review.blind["seed"], "answers": review.blind["answers"]}
    run["adapter"] = finetune.harmless(review.path.parent.name)  # each of the two files names some of these three
    answers = {question["id"]: question["answers"] for question in review.blind["questions"]}
    try:
        saved = finetune.read_json(path)
        votes = saved.get("votes") if isinstance(saved, dict) and saved.get("version") == 1 else None
        if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes):
            raise BadInput(f"{path}: holds no votes, or is damaged")
        votes = [{key: vote.get(key) for key in ("id", "vote", "shown")} for vote in votes]
        names = [vote["id"] for vote in votes]
        differs = [key for key, value in run.items() if saved.get(key, value) != value]
        if differs or not all(name in list(answers) for name in names):
            raise BadInput(f"{path}: is of another run ({(differs or ['questions'])[0]} not as here)")
        for name, vote, shown in map(dict.values, votes):
            whole = isinstance(shown, list) and sorted(map(str, shown)) == sorted(review.blind["arms"])
            known = vote in ["none", *(answer["arms"] for answer in answers[name])]
            if not whole or not known or names.count(name) > 1:
                raise BadInput(f"{path}: the vote on {name} is damaged, or given twice")
    except BadInput as problem:
        raise BadInput(f"{problem}; {fix}") from None
    return votes


def take_votes(review: Review, path: Path) -> str:
    """--votes: takes in what is new, and says how much that was. Raises BadInput."""
    fix = f"download the votes again from {review.path.parent / 'report.html'}"
    votes, judged = read_votes(review, finetune.expand(path), fix), {vote["id"] for vote in review.votes}
    new = [vote for vote in votes if vote["id"] not in judged]
    review.votes += new
    if new:
        review.save()
    known = len(votes) - len(new)
    return f"{len(new)} votes taken in; {known} of these questions had been judged here, which stays"


def ask_votes(review: Review, console: Console, read_key: Callable[[], str]) -> None:
    """Question by question. Each vote is saved at once; any number of them can be taken back."""
    questions, place = {question["id"]: question for question in review.blind["questions"]}, len(review.votes)
    names = list(dict.fromkeys([*(vote["id"] for vote in review.votes), *questions]))  # the judged ones first
    while place < len(names):
        name, key = names[place], ""
        answers = show_blind(review, questions[name], console, f"{place + 1} of {len(names)}")
        letters = (*LETTERS[: len(answers)], "n")
        while key not in (*letters, "s", "u", *STOPS):
            key = read_key()
        if key in (*letters, "s"):
            place += 1
        if key in letters:
            best = "none" if key == "n" else answers[LETTERS.index(key)]["arms"]
            shown = [arm for answer in answers for arm in answer["arms"]]
            review.votes.append({"id": name, "vote": best, "shown": shown})
            review.save()
            say(console, "")
            for letter, answer in zip(letters, answers, strict=False):
                whose = " and ".join(review.blind["names"][arm] for arm in answer["arms"])
                say(console, f"{letter} was {whose}" + ", your vote" * (letter == key), "bold" * (letter == key))
            say(console, f"\nThe reference answer:\n{questions[name]['reference']}\n")
            if console.is_terminal and sys.stdin.isatty():
                say(console, "any key: next   u: undo   q: stop", "dim")
                key = read_key()
        if key in STOPS:
            return
        if key == "u" and place:
            place -= 1
            review.votes = [vote for vote in review.votes if vote["id"] != names[place]]
            review.save()


def show_blind(review: Review, question: dict, console: Console, progress: str) -> list[dict]:
    """The question and its answers under letters; returns the answers in the order of these."""
    answers = list(question["answers"])
    random.Random(f"{review.blind['seed']} {question['id']}").shuffle(answers)
    rows = [(letter, "", answer["text"] or "(empty)") for letter, answer in zip(LETTERS, answers, strict=False)]
    say(console, "\n" + f"-- {progress} ".ljust(console.width - 1, "-"), "dim")
    say(console, question["question"] + "\n", "bold")
    print_columns(console, rows)
    say(console, f"Best? {' '.join(LETTERS[: len(rows)])}   n: none   s: skip   u: undo   q: stop", "dim")
    return answers


@contextlib.contextmanager
def single_keys() -> Iterator[Callable[[], str]]:
    """Gives a function that waits for a key, without Enter; in a pipe for a line, whose first letter it gives."""
    if not (sys.stdin and sys.stdin.isatty()):
        yield lambda: next(iter(sys.stdin or ()), "q").strip()[:1].lower()
        return
    keyboard, pending = prompt_toolkit.input.create_input(), []

    def read_key() -> str:
        while not pending:
            if not os.isatty(0):  # the terminal is gone
                return "q"
            time.sleep(0.02)
            pending.extend(keyboard.read_keys() or keyboard.flush_keys())
        return pending.pop(0).data.lower()

    with keyboard.raw_mode():  # Ctrl-C is a key as any other, so it cannot come while a file is written
        yield read_key


def show_result(review: Review, console: Console) -> None:
    result = finetune.human_result(review.blind, review.votes)
    if review.votes:
        say(console, f"\n{finetune.human_sentence(result)}", "bold")
        for arm, numbers in result["after_minus"].items():
            gain, low, high = (f"{number * 100:+.0f}" for number in numbers)
            say(console, f"tuned less {review.blind['names'][arm]}: {gain} points [{low}, {high}]")
    count = f"{len(review.votes)} of {len(review.blind['questions'])}"
    say(console, f"{count} judged; {finetune.without_home(review.path)}, and report.html beside it")


# ----------------------------------------------------------------------------------------------------------------------
# Conversation: takes texts, gives messages for a model, JSON and Markdown
# Pure data, and the files that hold it. Must not touch screen or torch.

SAVED = ("model", "text", "tokens", "seconds", "seed", "stop")  # of an Answer, in the file of a conversation
TURN_FORMAT = '{"question": TEXT, "replies": [{"model": TEXT, "text": TEXT}, ...], "chosen": which of them, from 0}'


@dataclasses.dataclass
class Answer:
    """One model's answer to a question, while it comes and afterwards."""

    model: str
    text: str = ""
    tokens: int = 0  # without the EOS
    seconds: float = 0.0  # this model's own, whoever else had turns in between
    seed: int | None = None
    stop: str = "interrupted"  # or "end", "num_predict", "context"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: found in the KV cache, so no prefill was needed for them
    first_token: float | None = None  # seconds until it came
    rows: list[str] = dataclasses.field(default_factory=list)  # questions of the looked-up rows in its prompt
    ids: list[int] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)  # most likely tokens at each step

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which waits for the prefill."""
        spent = self.seconds - (self.first_token or 0)
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else 0.0

    def grow(self, text: str, token: int | None, seconds: float) -> Answer:
        text = text if self.text else text.lstrip()  # Mistral's template leaves its space to the answer
        self.text += text
        self.seconds += seconds
        if token is not None:
            self.ids.append(token)
            self.tokens += 1
        return self


@dataclasses.dataclass
class Turn:
    """A question with the answers it got; the conversation goes on with the chosen one."""

    question: str
    replies: list[Answer] = dataclasses.field(default_factory=list)
    chosen: int = 0

    @property
    def reply(self) -> Answer:
        return self.replies[self.chosen]

    def add(self, answers: Iterable[Answer], chosen: int = 0) -> None:
        """More answers; the conversation goes on with the one at place `chosen` of these."""
        self.chosen = len(self.replies) + chosen
        self.replies += answers


@dataclasses.dataclass
class Conversation:
    """What was said so far, in whole turns: a question is added together with its first answer."""

    system: str | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    skipped: int = 0  # oldest turns that no longer fit into the context; kept here, not sent
    parameters: Parameters = dataclasses.field(default_factory=Parameters)

    @contextlib.contextmanager
    def asking(self, turn: Turn) -> Iterator[None]:
        """While a turn is asked, perhaps again, it is not among those before; it belongs here once it has an answer."""
        if turn in self.turns[-1:]:
            self.turns.pop()
        try:
            yield
        finally:
            if turn.replies:
                self.turns.append(turn)

    def messages(self, question: str | None = None) -> list[dict]:
        """What the model reads: the system prompt, the turns that fit, the question."""
        said = [("system", self.system)] if self.system else []
        for turn in self.turns[self.skipped :]:
            said += [("user", turn.question), ("assistant", turn.reply.text)]
        said += [("user", question)] if question is not None else []
        return [{"role": role, "content": text} for role, text in said]

    def fit(self, question: str, count: Callable, room: int) -> tuple[list[dict], int]:
        """The messages, and how many more of the oldest turns were left out to keep within `room` tokens."""
        before, messages = self.skipped, self.messages(question)
        used = count(messages)
        # After a cut every model reads the rest anew: to three quarters, so that the next question needs none.
        target = room if used <= room else room * 3 // 4
        while used > target and self.skipped < len(self.turns):
            self.skipped += 1
            messages = self.messages(question)
            used = count(messages)
        if used > room:
            self.skipped = before
            raise BadInput(f"too long: {used} tokens with all that goes with it, and there is room for {room}")
        return messages, self.skipped - before

    def undo(self) -> Turn:
        self.skipped = 0
        return self.turns.pop()

    def as_json(self) -> dict:
        turns = []
        for turn in self.turns:
            replies = [{name: getattr(reply, name) for name in SAVED} for reply in turn.replies]
            turns.append({"question": turn.question, "replies": replies, "chosen": turn.chosen})
        parameters = dataclasses.asdict(self.parameters)
        return {"format": "faq-finetune chat 1", "system": self.system, "parameters": parameters, "turns": turns}

    @classmethod
    def from_json(cls, loaded: Any, where: str, parameters: Parameters | None = None) -> Conversation:
        """Checked, as the file may have been written by hand. `parameters` stand for those that it does not name."""
        turns, wrong = [], 'is not a saved conversation: {"system": TEXT or null, "turns": [...]}'
        try:
            system, given = readable(loaded.get("system") or "") or None, dict(loaded.get("parameters") or {})
            for number, turn in enumerate(loaded["turns"], 1):
                wrong = f"turn {number} is not as /save writes it: {TURN_FORMAT}"
                replies = [Answer(**{name: r[name] for name in SAVED if name in r}) for r in turn["replies"]]
                for reply in replies:
                    reply.model, reply.text = readable(reply.model), readable(reply.text)
                chosen = range(len(replies))[turn.get("chosen", 0)]  # an error if it is none of them
                turns.append(Turn(readable(turn["question"]), replies, chosen))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise BadInput(f"{where}: {wrong}") from None
        known = {name: parse_parameter(name, given[name], f"{where}: {name}") for name in PARAMETERS if name in given}
        return cls(system, turns, parameters=dataclasses.replace(parameters or Parameters(), **known))

    def as_markdown(self) -> str:
        parts = ["# Conversation", f"System prompt: {self.system}" if self.system else ""]
        for number, turn in enumerate(self.turns, 1):
            parts += [f"## {number}. Question", turn.question]
            for n, reply in enumerate(turn.replies):
                parts += [f"### {reply.model}" + ("" if n == turn.chosen else " (not chosen)"), reply.text]
        return "\n\n".join(part for part in parts if part) + "\n"


def first_conversation(options: Options) -> Conversation:
    """With --continue the last one, but flags that were given win; else an empty one. Raises BadInput."""
    conversation = Conversation(parameters=options.parameters)
    if options.go_on:
        try:
            path = state_file("conversation.json")
            if not path.stat().st_size:
                raise BadInput("--continue: there is no conversation yet")
        except OSError as error:
            raise BadInput(f"--continue: {brief(error)}") from None
        conversation = Conversation.from_json(finetune.read_json(path), str(path))
        given = {name: getattr(options.parameters, name) for name in options.given}
        conversation.parameters = dataclasses.replace(conversation.parameters, **given)
    conversation.system = readable(options.system or "") or conversation.system
    return conversation


def add_row(path: Path, row: dict[str, str]) -> int:
    """Append a row that finetune.py reads, so without control characters; returns how many lines there are now."""
    row = {name: clean(text).replace("\N{REPLACEMENT CHARACTER}", "").strip() for name, text in row.items()}
    if not all(row.values()):
        raise BadInput("nothing readable is left of this question or its answer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        with path.open("a", encoding="utf-8") as file:  # whoever edited it may have left no newline at its end
            file.write("\n" * bool(lines[-1]) + finetune.json_text(row) + "\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None
    return sum(bool(line.strip()) for line in lines) + 1


def add_vote(question: str, between: list[str], winner: str | None, seed: int) -> tuple[Path, list[str | None]]:
    """Add a vote to the file; returns its path and all winners between these two so far, None where they were alike."""
    path = state_file("votes.jsonl")
    vote = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "between": between, "winner": winner}
    with path.open("a", encoding="utf-8") as file:
        file.write(finetune.json_text(vote | {"question": question, "seed": seed}) + "\n")
    winners = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):  # a damaged line is no vote
            loaded = json.loads(line)
            if isinstance(loaded, dict) and loaded.get("between") == between:
                winners.append(loaded.get("winner"))
    return path, winners


# ----------------------------------------------------------------------------------------------------------------------
# Adapters: takes names and folders, gives the adapters and the base to open, and what training knew
# Reads small files only; must not load a model.


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder that PEFT can load, and what its run.json tells."""

    path: Path
    base: str  # what find_model() understands; "" if the adapter does not say
    run: dict

    @property
    def name(self) -> str:
        return self.path.absolute().name  # of ".", too

    @property
    def summary(self) -> str:
        """One line on what training did to it, as far as run.json knows."""
        verdict, arms = self.part("evaluation", "verdict"), ("before", "after")
        told = f"{verdict.get('label') or ''}{', at a cost' if verdict.get('cost') else ''}"
        knows = [self.part("evaluation", arm, "reworded").get("recall") for arm in arms]
        losses = [self.part("evaluation", arm).get("nll") for arm in arms]  # all that 0.1.0 measured
        for form, pair in (("recall {:.0%} -> {:.0%}", knows), ("held-out loss {:.2f} -> {:.2f}", losses)):
            if all(isinstance(value, float) for value in pair):
                return clean(f"{told}: {form.format(*pair)}".removeprefix(": "))
        return clean(told)

    @property
    def files(self) -> list[str]:
        """The data files that run.json names."""
        files = self.part("data").get("files")
        named = [file.get("path") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        return [path for path in named if isinstance(path, str)]

    def rows_at_hand(self) -> list[finetune.Row]:
        """The rows of these files, held-out ones too; of a file that is gone or no longer readable, none."""
        rows, config = [], self.part("config")
        for name in self.files:
            with contextlib.suppress(BadInput, TypeError, AttributeError, OSError, RuntimeError, StopIteration):
                path = next(filter(Path.is_file, (Path(name).expanduser(), finetune.HERE / name)))
                rows += finetune.read_rows(path, config.get("question_field"), config.get("answer_field"))
        return rows

    def part(self, *names: str) -> dict:
        """An object within run.json; empty if it is not there."""
        found: Any = self.run
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def read_adapter(path: Path) -> Adapter:
    """The adapter in a folder that finetune.find_adapter() has checked. Raises BadInput."""
    config = finetune.read_json(path / "adapter_config.json")
    run = finetune.read_json(path / "run.json") if (path / "run.json").is_file() else {}
    named = str(config.get("base_model_name_or_path") or "")
    local = {public: name for name, public in finetune.PUBLIC_NAME.items()}
    trained_on = Adapter(path, "", run).part("model").get("id") or local.get(named, named)
    return Adapter(path, str(trained_on), run)


def newest_adapter(base: str | None = None) -> list[Adapter]:
    """The newest on the disk (on this base), or none. All that is broken is named and left out."""
    sound = []
    for name in finetune.adapters_on_disk():
        try:
            adapter = read_adapter(finetune.find_adapter(name, "adapter"))
            # Reads the header, and sees if the file is whole.
            with safetensors.safe_open(adapter.path / "adapter_model.safetensors", "np"):
                sound += [adapter] if base in (None, adapter.base) else []
        except (BadInput, safetensors.SafetensorError, OSError) as error:
            problem = str(error) if isinstance(error, BadInput) else f"adapter {name}: is damaged: {brief(error)}"
            finetune.console.print(Text(f"chat.py: left out: {clean(problem)}"), soft_wrap=True)
    return sound[:1]


def choose_models(options: Options) -> tuple[Source, list[Adapter]]:
    """What to open: the adapters asked for, or the newest, and the base that they stand on. Raises BadInput."""
    named = [read_adapter(finetune.find_adapter(name, "--adapter")) for name in options.adapter]
    if options.model:
        source = finetune.find_model(options.model, gpu=False)
        return source, named or newest_adapter(source.id)
    adapters = named or newest_adapter()
    if not adapters:
        finetune.guard_torchvision()
        return finetune.find_model(None, finetune.has_gpu()), []
    if not adapters[0].base:
        raise BadInput(f"adapter {adapters[0].path}: does not say which model it was trained on; name it with --model")
    commit = str(adapters[0].part("model").get("revision"))  # of a base from the hub
    source = finetune.find_model(adapters[0].base, False, commit if re.fullmatch("[0-9a-f]{40}", commit) else None)
    for adapter in adapters:
        check_base(adapter, source)
    return source, adapters


def check_base(adapter: Adapter, source: Source) -> None:
    """One base in a process. Raises BadInput with the command that opens an adapter on another one."""
    if adapter.base not in ("", source.id):
        command = f"python chat.py --adapter {shlex.quote(str(adapter.path))}"
        raise BadInput(f"adapter {adapter.name}: stands on {adapter.base}, not on {source.id}; open it with: {command}")


def nearest_question(adapter: Adapter, question: str) -> tuple[finetune.Row, float, str] | None:
    """(row, likeness in percent, which list of run.json has it) from the data that run.json names, if at hand."""
    data, rows = adapter.part("data"), adapter.rows_at_hand()
    row = finetune.nearest_rows(question, rows, 1)[0] if rows else None
    score = float(finetune.closeness([question], [row.question])[0, 0]) / 2 if row else 0
    if score < NEAR:
        return None
    # A row that was edited since, or dropped as a duplicate, is in none of these lists.
    known = (ids for ids in ("train_ids", "eval_ids", "test_ids") if row.id in (data.get(ids) or []))
    return row, score, next(known, "")


def trained_rows(adapter: Adapter) -> tuple[list[finetune.Row], str]:
    """The rows that an adapter was trained on, in training's order; if any is missing, how to have it here."""
    there, ids = {row.id: row for row in adapter.rows_at_hand()}, adapter.part("data").get("train_ids")
    ids = list(map(str, ids)) if isinstance(ids, list) else []
    rows = [there[name] for name in ids if name in there]
    if rows and len(rows) == len(ids):
        return rows, ""
    files = " and ".join(adapter.files)
    fix = f"put {files} back as it was" if files else "its run.json, as finetune.py writes it, would name them"
    gone = f"{len(ids) - len(rows)} of {len(ids)} rows" if rows else "No looked-up rows: those"
    return rows, f"{gone} that taught {adapter.name} are not at hand; {fix}"


# ----------------------------------------------------------------------------------------------------------------------
# Screen: takes text and tables, gives what a terminal of this size shows
# Nothing that a model or a file wrote may reach it uncleaned.


class AnswerMarkdown(Markdown):
    """With headings as bold paragraphs: rich centres them or puts boxes around them."""

    class Heading(Markdown.elements["paragraph_open"]):  # type: ignore[misc]
        style_name = "bold"

    elements = Markdown.elements | {"heading_open": Heading}


def make_console(file: TextIO) -> Console:
    """As wide as the terminal: rich takes a dumb one for 80 columns, and with piped stdin asks stdout, a log here."""
    console = Console(file=file, highlight=False)
    if file.isatty() and (console.is_dumb_terminal or not os.isatty(0)):
        console.size = os.get_terminal_size(file.fileno())
    return console


def say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(clean(text), overflow="fold"), style=style)


def can_repaint(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


class AnswerWriter:
    """Writes an answer as it comes, and once a block of Markdown is finished, its rendered form in its place.

    Only where the block stands whole on the screen, at the width it was written for: what has scrolled away is never
    touched. Lines are broken here, because the number of rows must be known.
    """

    MARKUP = re.compile(r"[*_`#|>~\[]|^\s*([-+]|\d{1,9}[.)])\s|^\s*[-=]{3,}\s*$|\\\S|&\w+;", re.MULTILINE)
    UNSURE = re.compile("[\u200d\ufe0f\U0001f000-\U0001faff]")  # terminals disagree on how wide these are

    def __init__(self, console: Console):
        self.console, self.file, self.width = console, console.file, console.width
        self.block = [""]  # the lines of the block that is open; the last one is still coming
        self.shown = ""  # what of it is on the screen

    def feed(self, text: str) -> None:
        if not can_repaint(self.console):
            self.file.write(clean(text))
            text = ""
        for part in re.findall(r"\n|[^\n]+", clean(text)):
            if part == "\n":
                self.show(self.block[-1])
                self.block = [*self.block, ""] if self.block[0].strip() else [""]
                continue
            self.block[-1] += part
            word = re.search(r"\S*$", self.block[-1])[0]  # it waits until it is whole, so that no margin breaks it
            self.show(self.block[-1] if may_break(word, self.width) else self.block[-1].removesuffix(word))
        self.file.flush()

    def close(self) -> None:
        if self.block[-1].strip() or not can_repaint(self.console):
            self.feed("\n")
        if len(self.block) > 1:
            self.finish_block()

    def show(self, line: str) -> None:
        """Write what is new of the line that is coming. With its first word it is known whether it opens a block."""
        if not line.strip():
            return
        above = "".join(break_rows(finished, self.width) + "\n" for finished in self.block[:-1])
        if above.startswith(self.shown) and opens_block(self.block):
            self.finish_block()
            above = ""
        rows = above + break_rows(line, self.width)
        self.file.write(rows[len(self.shown) :])
        self.shown = rows

    def finish_block(self) -> None:
        *lines, coming = self.block
        source, rows = "\n".join(lines).rstrip(), self.shown.count("\n")
        whole = rows < self.console.height - 1 and self.width == self.console.width
        if whole and self.MARKUP.search(source) and not (rows and self.UNSURE.search(source)):
            markdown = AnswerMarkdown(textwrap.dedent(source), "ansi_dark", hyperlinks=False)
            to_its_first_row = f"\x1b[{rows}A" if rows else ""
            self.file.write(f"{to_its_first_row}\r\x1b[J{render(self.console, markdown)}")
        self.file.write("\n" if lines[-1].strip() else "\n\n")
        self.block, self.shown, self.width = [coming], "", self.console.width


def write_answer(console: Console, growing: Iterable[Answer]) -> Answer:
    """Write an answer each time that it has grown; returns it."""
    writer, written = AnswerWriter(console), 0
    for answer in growing:
        writer.feed(answer.text[written:])
        written = len(answer.text)
    writer.close()
    return answer


def opens_block(lines: list[str]) -> bool:
    """Whether the last line, perhaps not yet whole, starts another paragraph, list item, ... than those before it."""
    text = "\n".join(lines) + "x" * lines[-1][-1:].isspace()
    tokens = MarkdownIt().enable("table").parse(textwrap.dedent(text))
    starts = [t for t in tokens if t.map and (t.level == 0 or (t.type == "list_item_open" and t.level == 1))]
    return len(lines) > 1 and any(token.map[0] == len(lines) - 1 for token in starts)


def may_break(word: str, width: int) -> bool:
    """Whether a word need not stay whole: it is too long to wait for its end, or of a script without spaces."""
    return cell_len(word) > min(24, width - 1) or cell_len(word) > len(word)


def break_rows(text: str, width: int) -> str:
    """A line broken into rows of the screen. More text at its end changes nothing of what stands before."""
    rows, column = "", 0
    for part in re.findall(r"\s+|\S+", text):
        for piece in part if may_break(part, width) else [part]:
            if column + cell_len(piece) < width:
                rows, column = rows + piece, column + cell_len(piece)
            elif not piece.isspace():
                rows, column = f"{rows}\n{piece}", cell_len(piece)
    return rows


def render(console: Console, what: RenderableType) -> str:
    """As it would be printed, without the spaces that rich fills lines with, and without the last newline."""
    with console.capture() as captured:
        console.print(what)
    lines = captured.get().split("\n")
    return "\n".join(re.sub(r"\s+((?:\x1b\[[\d;]*m)*)$", r"\1", line) for line in lines).strip("\n")


class Area:
    """Lines at the bottom of the screen that are painted anew until they are final; never more than fit."""

    def __init__(self, console: Console):
        self.console, self.painted = console, 0.0
        self.lengths: list[int] = []  # of the lines that were painted

    def paint(self, what: RenderableType) -> None:
        if not can_repaint(self.console) or time.monotonic() - self.painted < 0.1:
            return
        self.painted = time.monotonic()
        lines = render(self.console, what).split("\n")[-max(1, self.console.height - 2) :]
        # Line over line, and only then what is left below: a screen that is erased first would flicker.
        self.console.file.write(self.to_top() + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.console.file.flush()
        self.lengths = [Text.from_ansi(line).cell_len for line in lines]

    def erase(self) -> None:
        self.console.file.write(self.to_top() + "\x1b[J" if self.lengths else "")

    def to_top(self) -> str:
        """In a window that has become narrower, terminals break the lines that no longer fit."""
        rows = sum(max(1, math.ceil(length / self.console.width)) for length in self.lengths)
        return f"\x1b[{rows}A\r" if rows else ""


def make_table(rows: Iterable[Iterable], columns: Iterable[dict] = (), **more: Any) -> Table:
    """Aligned columns without lines; `columns` says what is special about the first ones."""
    table = Table(**{"box": None, "padding": (0, 2, 0, 0), "pad_edge": False, "show_header": False} | more)
    for column in columns:
        table.add_column(**column)
    for row in rows:  # rich would take brackets in a string for its markup
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def marked(text: str, other: str, plain: bool = False) -> Text:
    """The text; words that the other one has nowhere are coloured, or between asterisks."""
    mark = "*" if plain else ""
    pieces = finetune.word_diff(clean(text), clean(other))
    return Text.assemble(*((f"{mark}{part}{mark}", "bold yellow") if differs else part for part, differs in pieces))


def side_by_side(answers: list[tuple[str, str, str | Text]], width: int) -> RenderableType:
    """(head, speed, text) of each model: in as many columns as are not narrow, the others below."""
    heads = [Text.assemble((clean(head), "bold"), "  ", (speed, "dim")) for head, speed, _ in answers]
    texts = [text if isinstance(text, Text) else Text(clean(text)) for *_, text in answers]
    columns, rows = min(len(answers), max(1, width // NARROW)), []
    for start in range(0, len(answers), columns):
        rows += [heads[start : start + columns], texts[start : start + columns], [""]]
    return make_table(rows, [{"ratio": 1, "overflow": "fold"}] * columns, expand=True)


def print_columns(console: Console, answers: list[tuple[str, str, str | Text]]) -> None:
    console.file.write(render(console, side_by_side(answers, console.width)) + "\n\n")


def rows_read(answers: Iterable[Answer]) -> Iterator[str]:
    """Lines that name the looked-up rows in the prompts of these answers."""
    for rows, readers in itertools.groupby(answers, lambda answer: answer.rows):
        if rows:
            yield f"Rows in the prompt of {' and '.join(answer.model for answer in readers)}:"
            yield from (f"  {' '.join(row.split())[:100]}" for row in rows)


def speed_of(answer: Answer) -> str:
    cut = " (cut)" if answer.stop in ("num_predict", "context") else ""
    return f"{answer.tokens} tokens{cut}, {answer.tokens_per_second:.0f} tok/s" if answer.tokens > 1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Keys and signals: takes the chat and the terminal, gives the prompt with its keys, completion and history
# While an answer comes, Ctrl-C is an event. The terminal must be left as it was found.


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises KeyboardInterrupt. Keys are not echoed into the answer meanwhile."""
    event = threading.Event()

    def handle(*_: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    terminal = None
    with contextlib.suppress(ImportError):  # Windows
        import termios

        terminal = termios.tcgetattr(0) if os.isatty(0) else None
    before = signal.signal(signal.SIGINT, handle)
    try:
        if terminal:
            termios.tcsetattr(0, termios.TCSANOW, [*terminal[:3], terminal[3] & ~termios.ECHO, *terminal[4:]])
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
        if terminal:
            with contextlib.suppress(termios.error):  # the terminal was closed
                termios.tcsetattr(0, termios.TCSANOW, terminal)


def make_session(chat: Chat) -> Any:
    repaints = can_repaint(chat.console)
    is_command = prompt_toolkit.filters.Condition(lambda: chat.session.default_buffer.text.startswith("/"))
    return prompt_toolkit.PromptSession(
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: "" if wrapped else "... ",
        key_bindings=make_keys(chat),
        history=make_history(chat),
        auto_suggest=prompt_toolkit.auto_suggest.AutoSuggestFromHistory(),
        completer=make_completer(chat),
        complete_while_typing=is_command,
        reserve_space_for_menu=6 if repaints else 0,
        output=prompt_output(chat.console.file),
        bottom_toolbar=chat.toolbar if repaints else None,
        refresh_interval=0.5,
        style=prompt_toolkit.styles.Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )


def make_history(chat: Chat) -> Any:
    class PrivateHistory(prompt_toolkit.history.FileHistory):
        def store_string(self, string: str) -> None:
            try:
                Path(self.filename).stat()  # raises if it was deleted: a new one could be read by others
                super().store_string(readable(string))
            except OSError as error:
                chat.trouble = chat.trouble or brief(error)

    return PrivateHistory(str(state_file_or_null("chat_history")))


def make_keys(chat: Chat) -> Any:
    keys = prompt_toolkit.key_binding.KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        text = event.current_buffer.text
        if text.lstrip().startswith('"""') and (text.count('"""') < 2 or not text.rstrip().endswith('"""')):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    keys.add("escape", "enter")(lambda event: event.current_buffer.newline(copy_margin=False))

    @keys.add("f2")
    def _(event: Any) -> None:
        chat.model_name = chat.adapter_name if chat.model_name != chat.adapter_name else BASE
        event.app.invalidate()

    @keys.add("c-x", "c-e")
    def _(event: Any) -> None:
        point_output(chat.console.file)
        event.current_buffer.open_in_editor().add_done_callback(lambda _: point_output(sys.stderr))

    return keys


def point_output(file: TextIO) -> None:
    """An editor needs the terminal on file descriptors 1 and 2, where the log, our sys.stderr, is otherwise."""
    for number in (1, 2):
        os.dup2(file.fileno(), number)


def prompt_output(file: TextIO) -> Any:
    """Where prompt_toolkit draws; without escape sequences on a dumb terminal."""
    output = prompt_toolkit.output
    dumb = prompt_toolkit.utils.is_dumb_terminal()
    return output.plain_text.PlainTextOutput(file) if dumb else output.create_output(file)


def make_completer(chat: Chat) -> Any:
    """Whole lines of commands; after one that takes a FILE, paths."""
    completion = prompt_toolkit.completion

    def completer() -> Any:
        command, space, _ = chat.session.default_buffer.document.text_before_cursor.partition(" ")
        arguments = HELP[command][0] if command in HELP else ""
        lines = {name: meaning for name, (_, meaning) in HELP.items()}
        if command == "/set":
            lines = {f"/set parameter {name}": meaning for name, (*_, meaning) in PARAMETERS.items()}
        elif "NAME" in arguments:
            lines = {f"{command} {name}": "" for name in chat.known_models()}
        elif space and "FILE" in arguments:
            return completion.NestedCompleter({command: completion.PathCompleter(expanduser=True)})
        return completion.WordCompleter(list(lines), meta_dict=lines, sentence=True)

    return completion.DynamicCompleter(completer)


# ----------------------------------------------------------------------------------------------------------------------
# Engine: takes messages, gives answers token by token
# One 4-bit base in memory, adapters switched in place. Must not touch the screen.


class Engine:
    """The base and its adapters by name, and answers from them.

    adapter = read_adapter(Path("adapters/faq_sample-smollm2"))
    engine = Engine(finetune.find_model(None, gpu=False), adapters=[adapter])
    for answer in engine.stream([{"role": "user", "content": "Hello"}], "base", Parameters()):
        print(answer.tokens, answer.text)
    """

    def __init__(self, source: Source, num_ctx: int = 4096, adapters: Iterable[Adapter] = ()):
        finetune.guard_torchvision()
        finetune.fetch_weights(source)
        self.source = source
        self.network: Any = finetune.load_4bit(source, finetune.compute_dtype())
        self.fast = FastDecoder(self.network) if FastDecoder.fits(self.network) else None
        self.context = min(num_ctx, getattr(self.network.config, "max_position_embeddings", None) or num_ctx)
        self.runs_ahead = self.network.device.type == "cuda"
        self.active: tuple[str | None, float] = (None, 1.0)  # the adapter that PEFT has switched on, and its strength
        self.models: dict[str, ChatModel] = {}
        self.missing: dict[str, str] = {}  # adapter's name -> which of its training rows are not at hand
        self.add_model(ChatModel(self, BASE, None, finetune.load_tokenizer(source.folder, source.id)))
        for adapter in adapters:
            self.load_adapter(adapter)

    def add_model(self, model: ChatModel) -> ChatModel:
        """Run one forward, so that the first question finds everything warm, and see if the adapter does anything."""
        ids = chat_ids(model.tokenizer, [{"role": "user", "content": PROBE}], add_generation_prompt=True)
        logits = model.prefill(model.rewind(ids, 1.0)).clone()
        if model.fast:
            model.forward(logits.argmax()[None])
        if model.key:
            # On the same path as the adapter: the fast and the plain one round differently.
            base = ChatModel(self, BASE, None, model.tokenizer, plain=not model.fast)
            model.no_effect = torch.allclose(logits, base.prefill(base.rewind(ids, 1.0)), rtol=0, atol=1e-6)
        self.models[model.name] = model
        return model

    def load_adapter(self, adapter: Adapter) -> ChatModel:
        """Put an adapter beside those that are there. Raises BadInput, and then everything is as before."""
        key = f"lora{len(self.models) - 1}"  # a folder's name may hold a dot, which PEFT cannot take
        tokenizer = self.models[BASE].tokenizer
        try:
            if (adapter.path / "tokenizer_config.json").is_file():
                tokenizer = finetune.load_tokenizer(adapter.path, adapter.name)
            if len(tokenizer) > self.network.get_input_embeddings().weight.shape[0]:
                raise ValueError("its tokenizer has more tokens than the model")
            if not isinstance(self.network, peft.PeftModel):
                lora = peft.LoraConfig.from_pretrained(str(adapter.path))
                lora.inference_mode = True
                self.network = peft.PeftModel(self.network, lora, key)
            loaded = self.network.load_adapter(str(adapter.path), key)
            if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
                raise ValueError(f"{len(wrong)} tensors are missing or left over, like {wrong[0]}")
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            known = getattr(self.network, "peft_config", {})
            if list(known) == [key]:
                self.network = self.network.unload()
            elif key in known:
                self.network.delete_adapter(key)
            what = f"does not fit {self.source.id} or is damaged: {brief(error)}"
            raise BadInput(f"adapter {adapter.path}: {what}") from None
        finally:
            if isinstance(self.network, peft.PeftModel):  # which may have switched it on
                self.network.base_model.disable_adapter_layers()
            self.active = (None, 1.0)
        self.network.eval()
        if self.fast:
            self.fast.load_lora(key, self.network)
        names = itertools.chain([adapter.name], (f"{adapter.name}-{number}" for number in itertools.count(2)))
        return self.add_model(ChatModel(self, next(n for n in names if n not in self.models), key, tokenizer, adapter))

    def find_rows(self) -> list[str]:
        """Put `retrieved` and NAME+rows beside the others where rows are at hand; returns which are not."""
        adapters = [model for model in self.models.values() if model.adapter and not model.rows]
        for model in (model for model in adapters if model.name + WITH_ROWS not in self.models):
            rows, self.missing[model.name] = trained_rows(model.adapter)
            for name, like in ((RETRIEVED, self.models[BASE]), (model.name + WITH_ROWS, model)) if rows else ():
                new = ChatModel(self, name, like.key, like.tokenizer, model.adapter, rows=rows)
                self.models.setdefault(name, new)
        return [problem for problem in self.missing.values() if problem]

    def that_fit(self, messages: list[dict], room: int, wanted: Container[str] = ()) -> tuple[list[str], list[str]]:
        """Of the wanted models, else all, those whose looked-up rows have room in the prompt; a line on the others."""
        names = [name for name in self.models if name in (wanted or self.models)]
        fit = [name for name in names if not self.models[name].rows or self.count(messages, name) <= room]
        left_out = " and ".join(name for name in names if name not in fit)
        return fit, [f"Without {left_out}: the looked-up rows do not fit into the context"] if left_out else []

    def activate(self, key: str | None, strength: float = 1.0) -> None:
        """Switch an adapter on in transformers' network, or all off, without touching a weight."""
        if (key, strength) == self.active or not hasattr(self.network, "peft_config"):
            return
        if key is None:
            self.network.base_model.disable_adapter_layers()
        else:
            if self.active[0] is None:
                self.network.base_model.enable_adapter_layers()
            self.network.set_adapter(key, inference_mode=True)
            for module in self.network.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale(key, strength)
        self.active = (key, strength)

    def count(self, messages: list[dict], name: str) -> int:
        return len(self.models[name].tokenize(messages))

    def stream(
        self, messages: list[dict], name: str, parameters: Parameters, stop: threading.Event | None = None, top: int = 0
    ) -> Iterator[Answer]:
        """The answer, each time it has grown, and the `top` likeliest tokens at each step. `stop` ends it early."""
        began = time.perf_counter()
        model = self.models[name]
        _, rows, ids = model.prompt(messages)
        room = self.context - len(ids)
        if room < 1:
            raise BadInput(f"the question has {len(ids)} tokens; the context holds {self.context}")
        limit = min(room, parameters.num_predict) if parameters.num_predict >= 0 else room
        parameters = with_seed(parameters)
        answer = Answer(name, seed=parameters.seed, rows=[row.question for row in rows])
        sampler, words = Sampler(parameters, ids, self.network.device), Detokenizer(model.tokenizer)
        unread = model.rewind(ids, parameters.strength if model.key else 1.0)
        answer.prompt_tokens, answer.cached_tokens = len(ids), len(ids) - len(unread)
        logits = model.prefill(unread, stop) if limit else None
        while logits is not None:
            chosen = sampler.pick(logits)
            likely = logits.softmax(-1).topk(top) if top else None
            token_arrives = copy_to_host(chosen)
            # A GPU starts the next step before this token is known here, even if it turns out to be the last.
            ahead = model.forward(chosen) if self.runs_ahead and answer.tokens + 1 < limit else None
            token = token_arrives()
            if ahead is not None:
                model.cached.append(token)
            if likely:
                answer.top.append(list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)))
            if answer.first_token is None:
                answer.first_token = answer.seconds + time.perf_counter() - began
            if token in model.stops:
                answer.stop = "end"
                break
            text = words.push(token)
            yield answer.grow(text, token, time.perf_counter() - began)
            began = time.perf_counter()
            if answer.tokens == limit or (stop is not None and stop.is_set()):
                break
            logits = ahead
            if ahead is None:
                logits = model.forward(chosen)
                model.cached.append(token)
        if answer.tokens == limit:
            answer.stop = "context" if limit == room else "num_predict"
        rest = words.pending().rstrip("\N{REPLACEMENT CHARACTER}")
        yield answer.grow(rest, None, time.perf_counter() - began)

    def answer(self, *question: Any) -> Answer:
        """What stream() gives in the end."""
        return list(self.stream(*question))[-1]

    def compare(
        self, messages: list[dict], names: Iterable[str], parameters: Parameters, stop: threading.Event | None = None
    ) -> Iterator[Answer]:
        """All the models' answers, some tokens each in turn. A batch of them would round differently from one alone."""
        parameters = with_seed(parameters)
        streams = [self.stream(messages, name, parameters, stop, TOP) for name in names]
        while streams:
            for stream in list(streams):
                for _ in range(TURN_LENGTH):
                    if (answer := next(stream, None)) is None:
                        streams.remove(stream)
                        break
                    yield answer

    def score(self, messages: list[dict], text: str, name: str, strength: float = 1.0) -> tuple[float, int]:
        """Mean log-probability of `text` (and the EOS after it) as the answer, and how many tokens that are."""
        model = self.models[name]
        example = finetune.to_example(model.tokenizer, finetune.Row(model.prompt(messages)[0], text, ""))
        if len(example.input_ids) > self.context:
            raise BadInput(f"question and text have {len(example.input_ids)} tokens; the context holds {self.context}")
        self.activate(model.key, strength)
        (nll,) = finetune.answer_nll(self.network, model.tokenizer, [example])
        return -nll, len(example.input_ids) - example.prompt_length


# ----------------------------------------------------------------------------------------------------------------------
# Models: KV cache, sampling, tokens to text
# Takes tokens, gives logits, tokens and text. Only ChatModel knows what its KV cache holds, and for which strength.


class ChatModel:
    """A name that can answer, the base or an adapter, and its KV cache: a LoRA at one strength has its own values."""

    def __init__(self, engine: Engine, name: str, key: str | None, tokenizer: Any, adapter=None, plain=False, rows=()):
        self.engine, self.name, self.tokenizer, self.adapter = engine, name, tokenizer, adapter
        self.rows: Sequence[finetune.Row] = rows  # in which it looks up what goes into its prompt
        self.key = key  # PEFT's name of the adapter; None: the base itself
        self.fast = engine.fast if engine.fast and not plain and key in (None, *engine.fast.loras) else None
        self.stops, self.no_effect = stop_ids(tokenizer, engine.network), False
        self.cache: Any = None  # a StaticKV with the fast decoder, else transformers' DynamicCache
        self.cached: list[int] = []  # the tokens at its start that are known to be there
        self.length = 0  # how many it holds in fact; -1: not known, after an error
        self.strength = 1.0  # the adapter's when it read them
        self.asked: list[dict] = []  # the messages of the last prompt, and that prompt: the chat counts before it asks
        self.prompted: tuple[tuple[dict, ...], list[finetune.Row], list[int]] = ((), [], [])

    def prompt(self, messages: list[dict]) -> tuple[tuple[dict, ...], list[finetune.Row], list[int]]:
        """What it reads: the turns, the last question after the rows most like it; these rows; and all in tokens."""
        if self.asked != messages:
            asks = self.rows and messages[-1]["role"] == "user"
            rows = finetune.nearest_rows(messages[-1]["content"], self.rows) if asks else []
            turns = finetune.with_rows(messages, rows)
            self.prompted = turns, rows, chat_ids(self.tokenizer, turns, add_generation_prompt=True)
            self.asked = messages
        return self.prompted

    def tokenize(self, messages: list[dict]) -> list[int]:
        return self.prompt(messages)[2]

    def rewind(self, ids: list[int], strength: float) -> list[int]:
        """Forget all but the longest start that it shares with `ids`; returns the tokens that need a prefill."""
        known = self.cached if self.cache is not None and strength == self.strength else []
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, ids[:-1], strict=False))
        keep = sum(1 for _ in same)
        if not self.fast and keep != self.length:  # a StaticKV is overwritten from there on, a DynamicCache only grows
            self.cache, keep = None, 0
        self.cached, self.strength = known[:keep], strength
        return ids[keep:]

    def prefill(self, ids: list[int], stop: threading.Event | None = None) -> torch.Tensor | None:
        """The logits after `ids`, which follow what is cached; None if `stop` was set between two chunks of them."""
        logits = None
        captured = self.fast and self.cache and self.cache.graphs.get((self.key, WINDOW))
        size = WINDOW if captured and len(ids) <= 3 * WINDOW else PREFILL
        for start in range(0, len(ids), size):
            if stop is not None and stop.is_set():
                return None
            chunk = ids[start : start + size]
            logits = self.forward(chunk)
            self.cached = self.cached + chunk
        return logits

    def forward(self, tokens: list[int] | torch.Tensor) -> torch.Tensor:
        """The logits after some tokens, or after one that a GPU has yet to pick; the caller adds them to `cached`."""
        position, self.length = len(self.cached), -1  # after an error some layers hold them and others do not
        end = position + len(tokens)
        with torch.inference_mode():
            if self.fast:
                run = self.fast.prefill if isinstance(tokens, list) else self.fast.step
                logits = run(tokens, position, self.static_cache(end), self.key)
            else:
                network = self.engine.network
                self.engine.activate(self.key, self.strength)
                if self.cache is None:
                    self.cache = transformers.DynamicCache(config=network.config)
                ids = torch.as_tensor(tokens, device=network.device)[None]
                out = network(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                logits = out.logits[0, -1].float()
        self.length = end
        return logits

    def static_cache(self, size: int) -> StaticKV:
        """With room for so many tokens: when the cache is full, one twice as large."""
        doubled = self.cache.size if self.cache else CACHE_SIZE
        while doubled < size:
            doubled *= 2
        if not self.cache or doubled > self.cache.size:
            self.cache = StaticKV(self.fast, doubled, self.cache)
        if self.key:
            self.fast.set_strength(self.key, self.strength)
        return self.cache

    def capture_ahead(self) -> None:
        """Record the CUDA graph of the next question's prefill; reads nothing. 0.3 s, once for each cache size."""
        end = len(self.cached) + WINDOW
        # With looked-up rows a question is longer than the window.
        if self.fast and self.fast.graphs and end <= self.engine.context and not self.rows:
            with torch.inference_mode():
                self.fast.capture(self.static_cache(end), self.key, WINDOW, len(self.cached))


class Sampler:
    """Picks tokens on the model's device: repeat_penalty, then temperature, top_k and top_p.

    transformers' processors give the same, but sort the whole vocabulary at every token: ten times slower on a CPU.
    """

    def __init__(self, parameters: Parameters, ids: list[int], device: Any):
        self.parameters, self.recent = parameters, torch.tensor(ids[-REPEAT_LAST:], device=device)
        self.generator = torch.Generator(device).manual_seed(parameters.seed)

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """One token, as a tensor: on a GPU whoever reads it waits for it."""
        parameters, penalty = self.parameters, self.parameters.repeat_penalty
        if penalty != 1:
            values = logits[self.recent]
            values = torch.where(values > 0, values / penalty, values * penalty)
            logits = logits.scatter(0, self.recent, values)
        if parameters.temperature == 0:
            token = logits.argmax()[None]
        else:
            count = min(parameters.top_k or len(logits), len(logits))
            values, candidates = (logits / parameters.temperature).topk(count)
            shares = values.softmax(-1)
            before = shares.cumsum(-1) - shares
            shares = shares.masked_fill((before >= parameters.top_p) & (before > 0), 0)  # the most likely one stays
            token = candidates[torch.multinomial(shares, 1, generator=self.generator)]
        if penalty != 1:
            self.recent = torch.cat([self.recent, token])[-REPEAT_LAST:]
        return token


def copy_to_host(token: torch.Tensor) -> Callable[[], int]:
    """Starts to copy a token that a GPU is still to pick. The result waits for that, not for what is queued since."""
    if not token.is_cuda:
        return token.item
    host, event = torch.empty(1, dtype=torch.long, pin_memory=True), torch.cuda.Event()
    host.copy_(token, non_blocking=True)
    event.record()

    def wait() -> int:
        event.synchronize()
        return int(host)

    return wait


class Detokenizer:
    """Token ids -> text, piece by piece, never half a character.

    (tokenizers' DecodeStream raises on bytes that are no UTF-8, which a model with Mistral's vocabulary may write.)
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.ids, self.start, self.done = tokenizer, [], 0, 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self.pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character's other bytes are yet to come
            return ""
        self.start, self.done = self.done, len(self.ids)
        return text

    def pending(self) -> str:
        """Decoded together with the piece before: some tokenizers drop the space of what comes first."""
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, now = (self.tokenizer.decode(self.ids[self.start : end], **how) for end in (self.done, len(self.ids)))
        return now[len(before) :]


def stop_ids(tokenizer: Any, network: Any) -> frozenset[int]:
    """Tokens that end an answer: EOS, generation_config's, and what the saved template puts after an answer."""
    configured = getattr(network.generation_config, "eos_token_id", None)
    question = [{"role": "user", "content": "1"}]
    before = chat_ids(tokenizer, question, add_generation_prompt=True)
    whole = chat_ids(tokenizer, [*question, {"role": "assistant", "content": "2"}], add_generation_prompt=False)
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
    wanted = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return frozenset((wanted | (set(whole[len(before) :]) & special)) - {None})


def with_seed(parameters: Parameters) -> Parameters:
    """With a random seed if they have none."""
    seed = random.SystemRandom().randrange(2**31) if parameters.seed is None else parameters.seed
    return dataclasses.replace(parameters, seed=seed)


# ----------------------------------------------------------------------------------------------------------------------
# Fast decoder: takes tokens and a static KV cache, gives logits; a reader may stop before it
# It makes the chat quick and must change nothing else: the tokens are those that transformers and PEFT would give.


class FastDecoder:
    """Batch-1 decoder for Llama-like models: fused 4-bit projections, CUDA graphs.

    transformers and PEFT launch 45 kernels a layer and 8 more a LoRA, which no processor feeds fast enough. Here
    projections of one input are one product, and LoRA adds two small ones. On a GPU a decode step is a CUDA graph.
    """

    GROUPS = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    def __init__(self, network: Any):
        config, inner = network.config, network.model
        self.layers, self.rotate, self.norm = inner.layers, inner.rotary_emb, inner.norm
        self.embeddings, self.head = inner.embed_tokens, network.lm_head
        self.device, self.dtype = network.device, inner.embed_tokens.weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = self.layers[0].self_attn.head_dim
        # Where a CPU has AVX512-BF16, bitsandbytes multiplies in bf16: half as fast again, but it rounds, so an answer
        # with its cache reused would differ from one without. So the weights become fp32, if memory allows.
        layers = self.projections(self.layers)
        weights = sum(part.in_features * part.out_features for part in flat(layers))
        dense = 4 * weights < psutil.virtual_memory().available / 2
        self.fused = [[fuse(parts, dense) for parts in groups] for groups in layers]
        self.loras: dict[str, list] = {}  # adapter -> layer -> group -> (A, B, B at strength 1), or None
        self.strength: dict[str, float] = {}
        self.graphs = self.device.type == "cuda"
        torch.backends.cuda.enable_cudnn_sdp(False)  # it re-plans for each new length of a prompt
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    @classmethod
    def fits(cls, network: Any) -> bool:
        """Whether the network is of the kind that forward() computes."""
        config = network.config
        kind = config.model_type in ("llama", "mistral", "qwen2") and config.hidden_act == "silu"
        rope = (config.rope_parameters or {}).get("rope_type", "default") in ("default", "linear", "llama3")
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if not kind or not rope or slides or (config.model_type == "mistral" and config.sliding_window):
            return False
        return all(
            isinstance(part, bnb_nn.Linear4bit)
            and part.weight.element_size() == 1
            and part.in_features % part.weight.quant_state.blocksize == 0
            and part.out_features % 32 == 0
            for part in flat(cls.projections(network.model.layers))
        )

    @classmethod
    def projections(cls, layers: Iterable[Any]) -> list[list[list[Any]]]:
        """Layer -> group of projections with the same input -> the modules, PEFT's once an adapter is loaded."""
        return [[[layer.get_submodule(name) for name in names] for names in cls.GROUPS] for layer in layers]

    def load_lora(self, key: str, network: Any) -> None:
        """Take over PEFT's adapter, unless it has more than plain LoRA on the fused layers."""
        layers, config = self.projections(self.layers), network.peft_config[key]
        fused = {id(part) for part in flat(layers)}
        loras = (module for module in network.modules() if isinstance(module, lora_layers.LoraLayer))
        adapted = {id(module) for module in loras if key in module.r}
        more = config.use_dora or config.lora_bias or config.modules_to_save or config.trainable_token_indices
        if adapted and adapted <= fused and not more:
            self.loras[key] = [[self.stack_lora(key, parts) for parts in groups] for groups in layers]
            self.strength[key] = 1.0

    def stack_lora(self, key: str, parts: list[Any]) -> tuple[torch.Tensor, ...] | None:
        """The LoRAs of projections that are fused as one: all A on top of each other, all B along a diagonal."""
        adapted = [part for part in parts if key in getattr(part, "r", ())]
        if not adapted:
            return None
        down = torch.cat([part.lora_A[key].weight for part in adapted])

        def scaled(part: Any) -> torch.Tensor:
            none = down.new_zeros(part.out_features, 0)
            return part.lora_B[key].weight * part.scaling[key] if part in adapted else none

        up = torch.block_diag(*map(scaled, parts)).to(self.dtype).T
        return down.to(self.dtype).T, up, up.to("cpu", copy=True)

    def set_strength(self, key: str, strength: float) -> None:
        """Scale all B. In place, because CUDA graphs hold their addresses."""
        if self.strength[key] != strength:
            for _, up, trained in filter(None, itertools.chain(*self.loras[key])):
                up.copy_(trained * strength)
            self.strength[key] = strength

    def forward(
        self, tokens: torch.Tensor, position: torch.Tensor, cache: StaticKV, key: str | None, last: Any = None
    ) -> torch.Tensor:
        """The logits after `tokens`, the first of which is at `position`; their keys and values go into `cache`.

        With `last`, the logits after that one of the tokens: those behind it are padding, which it does not attend to.
        """
        count, group, kv = len(tokens), self.heads // self.kv_heads, self.kv_heads
        end = cache.size if self.graphs else int(position) + count  # a graph cannot have a length that grows
        positions = position + torch.arange(count, device=self.device)
        cos, sin = cache.cos[positions, None], cache.sin[positions, None]
        seen = torch.arange(end, device=self.device) <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        mask = mask.repeat(group, 1)
        hidden = functional.embedding(tokens, self.embeddings.weight)
        loras = self.loras[key] if key else [(None,) * len(self.GROUPS)] * len(self.layers)

        def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
            return functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

        def project(x: torch.Tensor, layer: Callable, lora: tuple | None) -> torch.Tensor:
            return layer(x) if lora is None else layer(x).addmm_(x @ lora[0], lora[1])

        for number, (layer, fused, lora) in enumerate(zip(self.layers, self.fused, loras, strict=True)):
            keys, values = cache.keys[number], cache.values[number]
            x = project(norm(hidden, layer.input_layernorm), fused[0], lora[0]).view(count, -1, self.head_size)
            rotated, value = x[:, :-kv], x[:, -kv:]
            rotated = rotated * cos + rotated.roll(self.head_size // 2, -1) * sin
            keys.index_copy_(1, positions, rotated[:, -kv:].transpose(0, 1))
            values.index_copy_(1, positions, value.transpose(0, 1))
            # Heads that share keys are stacked as if they were further positions, so the keys need no copies.
            query = rotated[:, :-kv].unflatten(1, (kv, group)).permute(1, 2, 0, 3).reshape(kv, group * count, -1)
            x = attend(query, keys[:, :end], values[:, :end], mask)
            x = x.view(kv, group, count, -1).permute(2, 0, 1, 3).reshape(count, -1)
            hidden = hidden + project(x, fused[1], lora[1])
            gate, up = project(norm(hidden, layer.post_attention_layernorm), fused[2], lora[2]).chunk(2, dim=-1)
            hidden = hidden + project(functional.silu(gate) * up, fused[3], lora[3])
        hidden = hidden[-1:] if last is None else hidden.index_select(0, last)
        return self.head(norm(hidden, self.norm))[0].float()

    def prefill(self, ids: list[int], position: int, cache: StaticKV, key: str | None) -> torch.Tensor:
        """forward() for a chunk of a prompt; if it is short and its graph was captured, that is replayed."""
        tokens = torch.tensor(ids, device=self.device)
        cache.position.fill_(position)
        graph = cache.graphs.get((key, WINDOW))
        if graph is None or len(ids) > WINDOW or position + WINDOW > cache.size:
            return self.forward(tokens, cache.position, cache, key)
        cache.window[: len(ids)] = tokens
        cache.last.fill_(len(ids) - 1)
        graph.replay()
        return cache.logits

    def step(self, token: torch.Tensor, position: int, cache: StaticKV, key: str | None) -> torch.Tensor:
        """forward() for one token; on a GPU its graph is replayed. The result is valid until the next step."""
        cache.token.copy_(token)
        cache.position.fill_(position)
        if self.graphs:
            self.capture(cache, key, 1, position)
        graph = cache.graphs.get((key, 1))
        if graph is None:
            return self.forward(cache.token, cache.position, cache, key)
        graph.replay()
        return cache.logits

    def capture(self, cache: StaticKV, key: str | None, width: int, position: int) -> None:
        """Store the graph of forward() over one token or the window, once; stores None where driver or card cannot."""
        if (key, width) in cache.graphs:
            return
        cache.position.fill_(position)
        tokens, last = (cache.token, None) if width == 1 else (cache.window, cache.last)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate workspaces at the first run, which no capture may do
                self.forward(tokens, cache.position, cache, key, last)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                cache.logits.copy_(self.forward(tokens, cache.position, cache, key, last))
        except RuntimeError:  # slower without; where the window's does not fit the memory, that of one token still may
            self.graphs = self.graphs and width > 1
            graph = None
            torch.cuda.synchronize()
        cache.graphs[key, width] = graph


class StaticKV:
    """Keys and values at addresses that stay, because a CUDA graph needs that; and the graphs' inputs and outputs."""

    def __init__(self, decoder: FastDecoder, size: int, old: StaticKV | None = None):
        shape = (2, len(decoder.layers), decoder.kv_heads, size, decoder.head_size)
        self.keys, self.values = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        if old is not None:
            self.keys[:, :, : old.size] = old.keys
            self.values[:, :, : old.size] = old.values
        self.size, self.graphs = size, {}
        positions = torch.arange(size, device=decoder.device)
        self.cos, self.sin = (table[0].to(decoder.dtype) for table in decoder.rotate(self.keys, positions[None]))
        half = decoder.head_size // 2
        self.sin = torch.cat([-self.sin[:, :half], self.sin[:, half:]], dim=1)
        self.token, self.position, self.last = torch.zeros((3, 1), dtype=torch.long, device=decoder.device)
        self.window = torch.zeros(WINDOW, dtype=torch.long, device=decoder.device)
        self.logits = torch.zeros(decoder.head.weight.shape[0], device=decoder.device)


def flat(layers: list[list[list[Any]]]) -> list[Any]:
    """The projections of all groups of all layers, in one list."""
    return list(itertools.chain.from_iterable(itertools.chain.from_iterable(layers)))


def fuse(parts: list[Any], dense: bool) -> Any:
    """4-bit layers with the same input -> one layer with all their rows, so that one kernel does the work of three.

    On a GPU the parts become views of it, so the weights are in memory once. On a CPU, `dense` dequantizes them once.
    """

    def scales(state: Any) -> torch.Tensor:
        return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

    first, width = parts[0], parts[0].in_features
    state = first.weight.quant_state
    rows = [part.out_features for part in parts]
    weight = torch.cat([part.weight.data.view(part.out_features, -1) for part in parts])
    absmax = torch.cat([scales(part.weight.quant_state).float().view(part.out_features, -1) for part in parts])
    bias = torch.cat([part.bias for part in parts]) if first.bias is not None else None

    def layer(weight: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None) -> Any:
        size = torch.Size((len(weight), width))
        kind = {"code": state.code, "blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype}
        one = bnb_nn.Linear4bit(width, len(weight), bias=False, compute_dtype=first.compute_dtype, device="meta")
        data, shape = weight.reshape(-1, 1), bnb.QuantState(absmax.reshape(-1), size, **kind)
        one.weight = bnb_nn.Params4bit(data, quant_state=shape, blocksize=state.blocksize, quant_type=state.quant_type)
        one.weight.bnb_quantized, one.bias = True, bias
        return one.eval()

    whole = layer(weight, absmax, bias)
    if weight.device.type == "cuda":
        for part, own, scale in zip(parts, weight.split(rows), absmax.split(rows), strict=True):
            part.weight = layer(own, scale, None).weight
    elif dense or not bnb.has_avx512bf16():  # bitsandbytes would dequantize at every token
        numbers = bnb.dequantize_4bit(whole.weight, whole.weight.quant_state)
        return lambda x: functional.linear(x, numbers, bias)
    return whole


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of a few positions to many; on a GPU as two products, which split the keys among its processors.

    PyTorch's own goes through the keys one after the other: 150 us instead of 18 at 4096 keys, in each layer.
    """
    if not query.is_cuda or query.shape[1] > 16:
        scaled = functional.scaled_dot_product_attention
        return scaled(query[None], keys[None], values[None], attn_mask=mask)[0]
    whole = {"out_dtype": torch.float32} if query.dtype != torch.float32 else {}
    scores = torch.bmm(query, keys.transpose(1, 2), **whole)
    shares = torch.add(mask, scores, alpha=query.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(shares.to(query.dtype), values)


if __name__ == "__main__":
    sys.exit(main())


# What `uv run chat.py` installs: requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.8,<2.14", "unsloth>=2026.10.7", "transformers>=5.5,<6", "bitsandbytes>=0.50,<1", "peft>=0.19,<1",
#     "trl>=1.13,<1.14", "datasets>=4,<5", "accelerate>=1.10,<2", "prompt_toolkit>=3.0.50,<4", "gguf>=0.17,<1",
#     "openpyxl>=3.1,<4", "pyarrow>=17", "ftfy>=6.2,<7", "rapidfuzz>=3.10,<4", "sacrebleu>=2.5,<3", "jinja2>=3.1,<4",
#     "annotated-types>=0.7,<1", "tyro>=1,<2", "rich>=14,<16", "matplotlib>=3.9,<4", "pyyaml>=6,<7", "psutil>=6",
#     "filelock>=4.3,<5",
# ]
# ///
