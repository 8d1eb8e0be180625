"""chat.py as a person has it: typed into through a pseudo-terminal, and read from the screen that comes of it."""

import base64
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
import termios
import time
from pathlib import Path

import pexpect
import pyte
import pytest
from conftest import LEARNT, RECITED, ROOT

F2, ALT_ENTER, TAB, UP, RIGHT = "\x1bOQ", "\x1b\r", "\t", "\x1b[A", "\x1b[C"
CTRL_A, CTRL_C, CTRL_D, CTRL_K, CTRL_X, CTRL_E = "\x01", "\x03", "\x04", "\x0b", "\x18", "\x05"


class Terminal:
    """A program in a pseudo-terminal, and its screen as a person would see it."""

    def __init__(self, folder, *args, width=100, height=40, **env):
        self.screen = pyte.HistoryScreen(width, height, history=3000, ratio=0.5)
        self.screen.write_process_input = lambda text: self.child.send(text)  # prompt_toolkit asks where the cursor is
        self.stream = pyte.Stream(self.screen)
        self.raw, self.dumb = "", env.get("TERM") == "dumb"
        environment = {"TERM": "xterm-256color", "XDG_STATE_HOME": str(folder / "state"), "HF_HUB_OFFLINE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "chat.py"), *args],
            cwd=str(folder),
            env=inherited | environment | env,
            dimensions=(height, width),
            encoding="utf-8",
            codec_errors="replace",
        )

    def read(self, seconds: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                text = self.child.read_nonblocking(65536, 0.05)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                return
            self.raw += text
            self.stream.feed(text)

    @property
    def lines(self) -> list[str]:
        """Everything from the start on, what has scrolled away too."""
        width = self.screen.columns
        gone = ["".join(line[column].data for column in range(width)) for line in self.screen.history.top]
        return [line.rstrip() for line in (*gone, *self.screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, condition, seconds: float = 25) -> None:
        """Until a text is on the screen, or a function says so."""
        holds = condition if callable(condition) else lambda: condition in self.text
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"waited for {condition!r}; the screen:\n{self.text}"
            assert self.child.isalive() or self.drained() or holds(), f"it has ended; the screen:\n{self.text}"
            self.read()

    def drained(self) -> bool:
        before = len(self.raw)
        self.read(0.3)
        return len(self.raw) > before

    def prompts(self) -> bool:
        """An empty prompt with the toolbar under it (a dumb terminal has none), and the model is there."""
        self.read(0.1)
        shown = [line.rstrip() for line in self.screen.display if line.strip()]
        last = shown[-1:] if self.dumb else shown[-2:]
        return last[:1] == [">>>"] and len(last) == (1 if self.dumb else 2) and "loading" not in last[-1]

    def asks(self) -> bool:
        """The chat waits for the answer to a question of its own."""
        self.read(0.1)
        return self.screen.display[self.screen.cursor.y].rstrip() == "?"

    def since(self, text: str) -> str:
        """What has come on the screen since this was typed."""
        return self.text[self.text.rindex(text) :]

    def type(self, text: str) -> None:
        self.child.send(text)
        self.read(0.15)

    def line(self, text: str, seconds: float = 25) -> list[str]:
        """Type a line; what came on the screen until the next prompt."""
        before = len([line for line in self.lines if line.startswith(">>>")])
        self.type(text + "\r")
        self.wait(lambda: len([line for line in self.lines if line.startswith(">>>")]) > before, seconds)
        self.wait(self.prompts, seconds)
        lines = self.lines
        starts = [n for n, line in enumerate(lines) if line.startswith(">>>")]
        return [line for line in lines[starts[before - 1] : starts[before]] if line]

    def leave(self) -> int:
        self.type(CTRL_D)
        self.child.expect(pexpect.EOF, timeout=30)
        self.child.close()
        return self.child.exitstatus


def home(folder, adapter):
    shutil.copytree(adapter, folder / "adapters" / adapter.name)
    return folder


@pytest.fixture(scope="module")
def shared(embedded_adapter, tmp_path_factory) -> Terminal:
    """One chat with the embedded model for all tests of commands: it starts once."""
    folder = home(tmp_path_factory.mktemp("chat"), embedded_adapter)
    (folder / "notes.txt").write_text("The deductible of the Blue plan is 700 dollars.", encoding="utf-8")
    terminal = Terminal(folder, "--temperature", "0", "--num-predict", "10")
    terminal.folder = folder
    terminal.wait(terminal.prompts)
    yield terminal
    terminal.child.close(force=True)


@pytest.fixture
def chat(shared) -> Terminal:
    """The shared chat, started over, with the adapter answering."""
    assert shared.child.isalive(), shared.text
    shared.type(CTRL_C)  # whatever a failed test left there
    shared.wait(shared.prompts)
    for left in ("talk.json", "talk.md"):
        (shared.folder / left).unlink(missing_ok=True)
    for line in ("/clear", "/adapter faq-smollm2"):
        shared.line(line)
    return shared


@pytest.fixture
def tiny_chat(tiny_adapter, tmp_path):
    """tiny_chat("--flag") -> a chat with the tiny model, whose adapter recites a text with escape sequences in it."""
    folder, opened = home(tmp_path, tiny_adapter), []

    def start(*args, ready=True, **options):
        terminal = Terminal(folder, "--temperature", "0", *args, **options)
        opened.append(terminal)
        if ready:
            terminal.wait(terminal.prompts)
        return terminal

    yield start
    for terminal in opened:
        terminal.child.close(force=True)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_question_and_answer(chat):
    shown = chat.line("What is a deductible?")
    assert shown[:2] == [">>> What is a deductible?", "faq-smollm2"] and shown[2].split()
    assert "Stopped at num_predict 10" in shown[-1]
    toolbar = chat.screen.display[-1]
    assert re.search(r"faq-smollm2  \d+ tok/s  first token \d\.\d\d s  context \d+ of 4096  F2: base", toolbar), toolbar


def test_adapter_and_f2_switch_and_keep_the_conversation(chat):
    chat.line("What is a deductible?")
    chat.type(F2)
    chat.wait(lambda: chat.screen.display[-1].startswith("base "))
    assert "F2: faq-smollm2" in chat.screen.display[-1]
    assert chat.line("And a premium?")[1] == "base"
    chat.type(F2)
    chat.wait(lambda: chat.screen.display[-1].startswith("faq-smollm2 "))
    shown = chat.line("/adapter")
    assert re.match(r"   +base +SmolLM2-135M-Instruct, without adapter", shown[1])
    assert re.match(r"\* +faq-smollm2 +held-out loss 3.20 -> 2.10", shown[2])
    assert "base answers from now on" in chat.line("/adapter base")[1]
    chat.line("/save talk.json")
    saved = json.loads((chat.folder / "talk.json").read_text())
    assert [turn["replies"][0]["model"] for turn in saved["turns"]] == ["faq-smollm2", "base"]
    assert "did you mean faq-smollm2?" in chat.line("/adapter faq-smol")[1]


def test_compare_then_go_on_with_one(chat):
    chat.type("/compare What is a deductible?\r")
    chat.wait("Go on with the answer of 1: base  2: faq-smollm2  Enter: none")
    chat.wait(chat.asks)
    text = chat.since("/compare")
    assert re.search(r"base  10 tokens \(cut\), \d+ tok/s.* faq-smollm2  10 tokens \(cut\)", text)
    assert "words that differ are marked" in text and re.search(r"The answers diverge at token \d+", text)
    assert re.search(r'  base         "[^"]+" \d+%  "', text)
    chat.type("2\r")
    chat.wait("Going on with the answer of faq-smollm2")
    chat.wait(chat.prompts)
    assert len(re.findall(r"faq-smollm2  \d+ tokens", text)) == 1, "nothing of the painting before is left over"
    shown = chat.line("/undo")
    assert shown[1] == "Dropped: What is a deductible?"


def test_what_is_typed_after_a_comparison_is_the_next_question(chat):
    chat.type("/compare What is a deductible?\r")
    chat.wait(chat.asks)
    chat.type("And who pays it?\r")
    chat.wait(lambda: chat.screen.display[chat.screen.cursor.y].startswith(">>> And who pays it?"))
    chat.type(CTRL_A + CTRL_K)


def test_nearest_training_question(chat):
    pairs = json.loads((chat.folder / "adapters/faq-smollm2/run.json").read_text())["data"]["files"][0]["path"]
    first = json.loads(Path(pairs).read_text())[0]
    chat.type(f"/compare {first['question']}\r")
    chat.wait(chat.asks)
    text = " ".join(chat.since("/compare").split())
    assert f"Nearest question (held out, 100% alike): {first['question']}" in text
    assert f"Its reference answer: {first['answer']}" in text
    chat.type(CTRL_C)
    chat.wait(chat.prompts)


def test_looked_up_rows(tiny_chat, tmp_path):
    path = tmp_path / "adapters/recites/run.json"
    run = json.loads(path.read_text())
    run["data"] |= {"train_ids": run["data"]["eval_ids"], "eval_ids": []}
    path.write_text(json.dumps(run))
    terminal = tiny_chat("--num-predict", "10")
    terminal.type("/compare the policy, what is covered\r")
    terminal.wait("Go on with the answer of 1: base  2: recites  3: retrieved  4: recites+rows  Enter: none")
    terminal.wait(terminal.asks)
    text = terminal.since("/compare the")
    for heads in ("base  .* recites  ", r"retrieved  .* recites\+rows  "):
        assert re.search(f"^{heads}", text, re.MULTILINE), text
    rows = text[text.index("Rows in the prompt of retrieved and recites+rows:") :].split("\n")
    assert sorted(rows[1:4]) == sorted(f"  {question}" for question in LEARNT) and rows[1] == "  What is covered?"
    assert "Trained on this question, in other words (" in text and "alike): What is covered?" in text
    terminal.type("3\r")
    terminal.wait(terminal.prompts)
    terminal.type("/adapter recites+")
    terminal.wait(lambda: "recites+rows" in terminal.since(">>> /adapter").split("\n", 1)[1])
    terminal.type(TAB + "\r")
    terminal.wait("recites+rows answers from now on")
    terminal.wait(terminal.prompts)
    shown = terminal.line("Hello")
    assert shown[1] == "recites+rows" and "Rows in the prompt of recites+rows:" in shown and "  Hello" in shown
    terminal.line("/save talk.json")
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["question"] for turn in talk["turns"]] == ["the policy, what is covered", "Hello"]
    assert [turn["replies"][turn["chosen"]]["model"] for turn in talk["turns"]] == ["retrieved", "recites+rows"]
    assert terminal.leave() == 0


def test_regen_undo_and_clear(chat):
    first = chat.line("What is a deductible?")
    again = chat.line("/regen base")
    assert again[1] == "base" and again[2] != first[2]
    chat.line("/export talk.md")
    text = (chat.folder / "talk.md").read_text()
    assert text.count("What is a deductible?") == 1 and "### faq-smollm2 (not chosen)" in text and "### base\n" in text
    assert "did you mean base?" in chat.line("/regen bas")[1]
    chat.line("/undo")
    assert "there is no question yet" in chat.line("/undo")[1]
    assert "there is no question yet" in chat.line("/regen")[1]


def test_system_set_and_show(chat):
    chat.line("/system Answer like a pirate.")
    assert "temperature = 0.5" in chat.line("/set parameter temperature 0.5")[1]
    assert "seed = 7" in chat.line("/set seed 7")[1]
    assert "strength = 0.5" in chat.line("/set parameter strength 0.5")[1]
    chat.wait(lambda: "strength 0.5" in chat.screen.display[-1])
    shown = "\n".join(chat.line("/show"))
    assert re.search(r"temperature +0.5 ", shown) and re.search(r"seed +7 ", shown) and "like a pirate" in shown
    for wrong, message in (
        ("temperature 7", "temperature must be a number from 0 to 2, not '7'"),
        ("temprature 1", "did you mean temperature?"),
        ("top_k 1.5", "top_k must be a whole number"),
    ):
        assert message in " ".join(chat.line(f"/set parameter {wrong}"))
    for back in ('/system ""', "/set temperature 0", "/set seed random", "/set strength 1"):
        chat.line(back)
    assert "System prompt: none" in "\n".join(chat.line("/show"))


def test_score(chat):
    chat.line("What is a deductible?")
    shown = chat.line("/score The part of a loss that you pay yourself.")
    assert shown[1] == "As the answer to: What is a deductible?"
    scores = {line.split()[0]: line.split()[1:] for line in shown[3:]}
    assert set(scores) == {"base", "faq-smollm2"} and all(float(mean) < 0 for mean, *_ in scores.values())
    assert scores["base"] != scores["faq-smollm2"]


def test_vote_is_blind_and_tallied(chat):
    votes = chat.folder / "state/faq-finetune/votes.jsonl"
    for count, answer in enumerate(("a", "="), 1):
        chat.type("/vote What is a deductible?\r")
        chat.wait(chat.asks)
        hidden = chat.since(">>> /vote")
        assert re.search(r"^A +B$", hidden, re.MULTILINE) and "Which is better?" in hidden
        assert not re.search(r"tok/s|base|faq-smollm2", hidden)
        chat.type(answer + "\r")
        chat.wait(chat.prompts)
        assert len(votes.read_text().splitlines()) == count
    assert re.search(r"Votes so far: base \d, faq-smollm2 \d, alike 1", chat.since(">>> /vote"))
    assert stat.S_IMODE(votes.stat().st_mode) == 0o600
    winner = json.loads(votes.read_text().splitlines()[0])["winner"]
    assert winner in ("SmolLM2-135M-Instruct", "faq-smollm2")


def test_save_load_and_overwrite(chat):
    chat.line("What is a deductible?")
    assert "Saved 1 turns to talk.json" in chat.line("/save talk.json")[1]
    before = (chat.folder / "talk.json").read_text()
    chat.line("/clear")
    chat.type("/save talk.json\r")
    chat.wait(chat.asks)
    assert "talk.json is there already. Overwrite it? [y/N]" in chat.since("/save")
    chat.type("\r")
    chat.wait(chat.prompts)
    assert (chat.folder / "talk.json").read_text() == before
    chat.line("/load talk.json")
    assert "Loaded 1 turns" in chat.since("/load") and ">>> What is a deductible?" in chat.since("/load")
    assert re.search(r"prompt +\d+ tokens: \d\d+ from the cache", "\n".join([*chat.line("Why?"), *chat.line("/stats")]))
    for line, message in (
        ("/load nowhere.json", "nowhere.json"),
        ("/load notes.txt", "notes.txt: broken JSON"),
        ("/save", "which file?"),
        ("/save no/such/folder.json", "cannot be written"),
        ("/read adapters", "adapters"),
    ):
        assert message in " ".join(chat.line(line)), line


def test_read_goes_with_the_next_question(chat):
    assert "notes.txt: 47 characters, about" in chat.line("/read notes.txt")[1]
    chat.wait(lambda: "1 file(s)" in chat.screen.display[-1])
    chat.line("What is the deductible?")
    chat.line("/save talk.json")
    turn = json.loads((chat.folder / "talk.json").read_text())["turns"][0]
    assert turn["question"] == "The deductible of the Blue plan is 700 dollars.\n\nWhat is the deductible?"
    assert "file(s)" not in chat.screen.display[-1]


def test_stats_show_what_the_second_turn_read(chat):
    chat.line("What is a deductible?")
    chat.line("Why?")
    stats = "\n".join(chat.line("/stats"))
    total, cached, read = map(int, re.search(r"prompt +(\d+) tokens: (\d+) from the cache, (\d+) read", stats).groups())
    assert total == cached + read and cached > 40 and read < 20
    assert re.search(r"cache +base: \d+ tokens", stats) and re.search(r"first token +\d", stats)


def test_help_and_unknown_commands(chat):
    import chat as module

    for command in ("/help", "/?"):
        text = "\n".join(chat.line(command))
        assert all(re.search(rf"^{re.escape(name)}\b", text, re.MULTILINE) for name in module.COMMANDS)
        assert all(len(line) <= 100 for line in text.split("\n"))
    assert "No command /hlep; did you mean /help?" in chat.line("/hlep")[1]
    assert "No command /helpme" in chat.line("/helpme")[1], "whole words only"
    assert chat.line(" /compare is a word here")[1] == "faq-smollm2"


# ----------------------------------------------------------------------------------------------------------------------
# Typing


def test_completion(chat):
    for typed, completed in (
        ("/comp", "/compare"),
        ("/adapter faq", "/adapter faq-smollm2"),
        ("/set parameter temp", "/set parameter temperature"),
        ("/read no", "/read notes.txt"),
    ):
        chat.type(typed)
        word = completed.split(" ")[-1]
        chat.wait(lambda word=word: f" {word}" in chat.since(">>>").split("\n", 1)[1])  # the menu is there
        chat.type(TAB)
        chat.wait(lambda line=completed: chat.screen.display[chat.screen.cursor.y].startswith(f">>> {line}"))
        chat.type(CTRL_A + CTRL_K)


def test_several_lines(chat):
    chat.type('"""first\rsecond')
    assert chat.screen.display[chat.screen.cursor.y].startswith("... second")
    chat.line('"""')
    chat.type("third" + ALT_ENTER)
    chat.line("fourth")
    chat.line("/save talk.json")
    turns = json.loads((chat.folder / "talk.json").read_text())["turns"]
    assert [turn["question"] for turn in turns] == ["first\nsecond", "third\nfourth"]


def test_paste_of_200_lines(chat):
    pasted = "\n".join(f"line {n}" for n in range(200))
    chat.type("\x1b[200~" + pasted.replace("\n", "\r") + "\x1b[201~")
    chat.read(0.5)
    assert "... line 199" in chat.text and "faq-smollm2\n" not in chat.since("line 199"), "nothing is sent before Enter"
    chat.type("\r")
    chat.wait(lambda: chat.prompts() and "num_predict" in chat.since("line 199"))
    chat.line("/save talk.json")
    turns = json.loads((chat.folder / "talk.json").read_text())["turns"]
    assert [turn["question"] for turn in turns] == [pasted]


def test_ctrl_c_while_it_answers_keeps_what_came(chat):
    chat.line("/set num_predict 400")
    chat.type("Tell me a long story about a house.\r")
    chat.wait(lambda: len(chat.since("long story").split()) > 15)
    chat.type(CTRL_C)
    chat.wait("Stopped; what came is kept")
    chat.wait(chat.prompts)
    chat.line("/set num_predict 10")
    chat.line("/save talk.json")
    reply = json.loads((chat.folder / "talk.json").read_text())["turns"][0]["replies"][0]
    assert reply["stop"] == "interrupted" and 0 < reply["tokens"] < 400


def test_ctrl_c_and_an_empty_line_at_the_prompt(chat):
    chat.type("half a question")
    chat.type(CTRL_C)
    chat.wait(chat.prompts)
    assert "Ctrl-D on an empty line or /bye leaves" in chat.since("half a question")
    chat.type("\r\r")
    chat.wait(chat.prompts)
    chat.type("text" + CTRL_D)
    chat.type(CTRL_A + CTRL_K)
    assert chat.child.isalive()


# ----------------------------------------------------------------------------------------------------------------------
# A process of its own each, with the tiny model


def test_escape_sequences_of_a_model_are_shown_harmless(tiny_chat):
    chat = tiny_chat()
    shown = chat.line("Hello")
    assert shown[1:4] == ["recites", "What is covered", "Your policy pays for two things:"]
    assert (
        shown[4]
        == " • fire \N{REPLACEMENT CHARACTER}[31mand\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER} theft"
    )
    assert shown[5] == " • hail" and shown[-1] == "That is all."
    assert "\x1b]0;owned" not in chat.raw and "\x1b[31mand" not in chat.raw and chat.screen.title != "owned"
    assert "clipboard" in chat.line("/copy")[1]
    assert base64.b64decode(re.search(r"\x1b\]52;c;([\w+/=]+)\x07", chat.raw)[1]).decode() == RECITED
    assert chat.leave() == 0


def test_history_over_two_starts(tiny_chat, tmp_path):
    chat = tiny_chat()
    chat.line(LEARNT[0])
    assert chat.leave() == 0
    history = tmp_path / "state/faq-finetune/chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.chmod(0o644)
    chat = tiny_chat()
    chat.type(UP)
    chat.wait(lambda: f">>> {LEARNT[0]}" in chat.screen.display[chat.screen.cursor.y])
    chat.type(CTRL_A + CTRL_K + LEARNT[0][:6] + RIGHT)  # suggested from the history
    chat.wait(lambda: f">>> {LEARNT[0]}" in chat.screen.display[chat.screen.cursor.y])
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "What is covered" in chat.line("")[2]
    chat.type("/bye\r")
    chat.child.expect(pexpect.EOF, timeout=30)
    chat.child.close()
    assert chat.child.exitstatus == 0


def test_resize_while_streaming(tiny_chat):
    chat = tiny_chat("--num-predict", "300", "--adapter", "recites", "--seed", "1", "--temperature", "1")
    chat.line("/adapter base")
    chat.type("Go on and on\r")
    chat.wait("Go on and on")
    chat.wait(lambda: len(chat.since("Go on").split()) > 10)
    for width in (60, 44, 100):
        chat.child.setwinsize(40, width)
        chat.screen.resize(40, width)
        chat.read(0.3)
    chat.wait("Stopped at num_predict 300")
    chat.wait(chat.prompts)
    assert chat.line("/undo")[1] == "Dropped: Go on and on"
    chat.type("/compare Go on and on\r")
    chat.wait("tok/s")
    chat.child.setwinsize(40, 50)
    chat.screen.resize(40, 50)
    chat.wait("Go on with the answer")
    text = chat.since("/compare")
    assert all(len(line) <= 50 for line in text.split("\n"))
    assert ">>> Go on and on" in text, (
        "where a terminal does not reflow, the painting may have taken the question's line"
    )


@pytest.mark.parametrize(("width", "env"), [(40, {}), (100, {"NO_COLOR": "1"}), (40, {"TERM": "dumb"})])
def test_other_terminals(tiny_chat, width, env):
    chat = tiny_chat(width=width, height=15 if env.get("TERM") == "dumb" else 40, **env)
    chat.type("Hello\r")
    chat.wait("That is all.")
    chat.wait(lambda: chat.text.rstrip().split("\n")[-1].startswith((">>>", "recites")))
    chat.type("/compare Hello\r")
    chat.wait("The answers diverge at token")
    chat.wait(lambda: chat.text.rstrip().split("\n")[-1] == "?")
    chat.type("\r")
    colours = re.findall(r"\x1b\[[\d;]*m", chat.raw)
    if "NO_COLOR" in env:
        assert not [code for code in colours if re.search(r"\b(3[0-7]|9[0-7]|4[0-7]|38|48)\b", code)]
    if "TERM" in env:
        assert "\x1b" not in chat.raw
        assert "*" in chat.since("/compare"), "marked without colour"
    assert all(len(line) <= width for line in chat.lines)


def test_adapter_without_effect_and_second_base(tiny_chat, tiny_model, tiny_adapter, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    idle = shutil.copytree(tiny_adapter, tmp_path / "adapters/idle")
    weights = load_file(idle / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(zero, idle / "adapter_model.safetensors")
    shutil.copytree(tiny_model, tmp_path / "second")
    other = shutil.copytree(tiny_adapter, tmp_path / "adapters/other")
    run = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(run | {"model": {"id": str(tmp_path / "second")}}))
    chat = tiny_chat("--adapter", "recites")
    assert "idle has no effect: its logits are the base's" in "\n".join(chat.line("/adapter idle"))
    said = " ".join(chat.line("/adapter other"))
    assert "adapter other: stands on" in said and "open it with: python chat.py --adapter adapters/other" in said
    assert "other answers" not in chat.text
    assert "That is all." in chat.line("/adapter recites")[-1] or "That is all." in chat.line("Hello")[-1]


def test_a_full_context_is_said(tiny_chat):
    chat = tiny_chat("--num-ctx", "300")
    for _ in range(6):
        chat.line("Hello")
    said = " ".join(chat.text.split())
    assert re.search(r"context of 300 tokens is full: the .*oldest turns? (is|are) no longer sent", said)
    assert "too long:" in " ".join(chat.line("word " * 300))


def test_the_editor(tiny_chat, tmp_path):
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\n[ -t 1 ] && [ -t 2 ] && printf "Tell me more" > "$1"\n')
    editor.chmod(0o700)
    chat = tiny_chat(VISUAL=str(editor), EDITOR=str(editor))
    chat.type("x" + CTRL_X + CTRL_E)
    chat.wait(lambda: ">>> Tell me more" in chat.text)
    chat.type("\r")
    chat.wait("That is all.")


def test_leaving_while_the_model_loads(tiny_chat):
    chat = tiny_chat(ready=False)
    chat.wait(">>>")
    assert chat.leave() == 0


def test_a_bad_flag_ends_it_before_the_prompt(tiny_chat):
    chat = tiny_chat("--model", "placeholder", ready=False)
    chat.wait("chat.py: --model placeholder")
    chat.child.expect(pexpect.EOF, timeout=30)
    chat.child.close()
    assert chat.child.exitstatus == 2 and ">>>" not in chat.text and "Traceback" not in chat.text


SIGNALS = [(signal.SIGTERM, "answer"), (signal.SIGTERM, "question"), (signal.SIGHUP, "prompt")]


@pytest.mark.parametrize(("number", "when"), SIGNALS)
def test_a_signal_leaves_the_terminal_as_it_was(tiny_chat, number, when):
    chat = tiny_chat("--num-predict", "-1", "--temperature", "1", "--num-ctx", "1000", ready=False)
    before = termios.tcgetattr(chat.child.child_fd)
    chat.wait(chat.prompts)
    chat.line("/adapter base")
    if when == "answer":
        chat.type("Go on and on\r")
        chat.wait("Go on and on")
        chat.wait(lambda: len(chat.since("Go on").split()) > 10)
    if when == "question":
        chat.type("/compare Hello\r")
        chat.wait(chat.asks)
    chat.child.kill(number)
    chat.child.expect(pexpect.EOF, timeout=30)
    chat.raw += chat.child.before
    assert termios.tcgetattr(chat.child.child_fd)[:4] == before[:4]
    chat.child.close()
    assert chat.child.exitstatus == 128 + number
    assert chat.raw.rindex("\x1b[?2004l") > chat.raw.rindex("\x1b[?2004h") and "Traceback" not in chat.raw


def test_the_terminal_is_closed(tiny_chat, tmp_path):
    chat = tiny_chat()
    chat.line("Hello")
    process = chat.child.pid
    chat.child.close(force=False)  # SIGHUP, and every write fails from now on
    wait_for_end(process)
    assert json.loads((tmp_path / "state/faq-finetune/conversation.json").read_text())["turns"]


def wait_for_end(process: int) -> None:
    end = time.monotonic() + 20
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "it is still running"
        time.sleep(0.1)


def test_killed_and_continued(tiny_chat, tmp_path):
    chat = tiny_chat("--num-predict", "5")
    chat.line("Hello")
    chat.line("/set strength 0.5")
    chat.child.kill(signal.SIGKILL)
    chat.child.close(force=True)
    chat = tiny_chat("--continue")
    assert ">>> Hello" in chat.text and "What is" in chat.since(">>> Hello")
    chat.line("/stats")
    assert re.search(r"context +[1-9]\d* of", chat.since("/stats")) and "strength 0.5" in chat.screen.display[-1]
    chat.line("/adapter base")
    chat.line("Why?")
    saved = json.loads((tmp_path / "state/faq-finetune/conversation.json").read_text())
    assert [turn["question"] for turn in saved["turns"]] == ["Hello", "Why?"]


def test_the_state_folder_is_deleted_while_it_runs(tiny_chat, tmp_path):
    chat = tiny_chat()
    chat.line("Hello")
    shutil.rmtree(tmp_path / "state")
    assert "may not be on disk from now on" in "\n".join(chat.line("Tell me more"))
    assert "may not be on disk" not in "\n".join(chat.line("What is covered?"))
    chat.type(UP)
    chat.wait(lambda: ">>> What is covered?" in chat.screen.display[chat.screen.cursor.y])
    assert "Traceback" not in chat.raw and "ENTER" not in chat.text


def test_an_adapter_that_does_not_fit_is_said_without_a_traceback(tiny_chat, tmp_path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapters/recites/adapter_model.safetensors"
    weights = load_file(file)  # a file that is cut off is told before the prompt; this is found while it stands
    save_file({name: tensor[:, :1].contiguous() for name, tensor in weights.items()}, file)
    chat = tiny_chat("--adapter", "recites", ready=False)
    chat.child.expect(pexpect.EOF, timeout=60)
    chat.child.close()
    said = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\s", " ", chat.raw + chat.child.before)
    assert said.count("adapter adapters/recites: does not fit") == 1 and chat.child.exitstatus == 2
    assert "Traceback" not in said and "ENTER" not in said


def test_any_bytes_by_paste(tiny_chat, request):
    chat = tiny_chat("--num-predict", "2")
    rng = random.Random(1)
    for _ in range(300 if request.config.getoption("--slow") else 12):
        pasted = bytes(rng.randrange(256) for _ in range(40)).replace(b"\x1b", b"")
        os.write(chat.child.child_fd, b"\x1b[200~" + pasted + b"\x1b[201~")
        chat.read(0.2)
        chat.type("\r")
        chat.wait(chat.prompts)
    assert "Traceback" not in chat.raw and "ENTER" not in chat.text and "failed" not in chat.text
    assert not re.search("[\x00-\x06\x0b\x0e-\x1a\x1c-\x1f\x7f-\x9f]", chat.raw)
    assert chat.leave() == 0


def test_the_first_run_shows_only_lines_of_ours(tmp_path):
    chat = Terminal(tmp_path, "--temperature", "0", "--num-predict", "5", XDG_CACHE_HOME=str(tmp_path / "cache"))
    try:
        chat.wait(chat.prompts, 300)
        chat.line("What is a deductible?", 60)
        shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", chat.raw.split(">>>")[0]))
        ours = r"(\S )?(Fetching|Converting|Loading) .*|SmolLM2-135M-Instruct in 4 bits|No adapter yet: .*|"
        assert not [line for line in shown if not re.fullmatch(ours, line.strip())]
        assert any("Fetching" in line for line in shown) and any("Converting" in line for line in shown)
        assert chat.leave() == 0
    finally:
        chat.child.close(force=True)
