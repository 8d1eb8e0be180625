"""chat.py without a terminal: answers, caches, conversations, what the screen gets, scripting."""

import dataclasses
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import Future

import pyte
import pytest
from conftest import LEARNT, RECITED, ROOT
from rich.console import Console

import chat
import finetune
from chat import BASE, Answer, BadInput, Conversation, Engine, Parameters, Turn

GREEDY = Parameters(temperature=0, num_predict=12)


def ask(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# ----------------------------------------------------------------------------------------------------------------------
# Engine, with the embedded model: the text matters


@pytest.fixture(scope="module")
def engine(embedded, embedded_adapter) -> Engine:
    engine = Engine(embedded)
    engine.load_adapter(chat.read_adapter(embedded_adapter))
    return engine


QUESTIONS = ("What is a deductible?", "Who pays if a tree falls on my car?")


@pytest.fixture(scope="module")
def reference(embedded, embedded_adapter) -> dict[str, list[list[int]]]:
    """The answers of transformers' own generate: the base loaded alone, and plain PEFT."""
    import torch
    from peft import PeftModel

    tokenizer = finetune.load_tokenizer(embedded.folder, embedded.id)

    def answers(model):
        found = []
        for question in QUESTIONS:
            ids = torch.tensor([chat.chat_ids(tokenizer, ask(question), add_generation_prompt=True)])
            out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
            found.append([token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id])
        return found

    plain, tuned = (finetune.load_4bit(embedded, torch.float32) for _ in range(2))
    return {
        BASE: answers(plain),
        "faq-smollm2": answers(PeftModel.from_pretrained(tuned, embedded_adapter).eval()),
    }


def test_base_and_adapter_answer_as_plain_generate_and_peft_do(engine, reference):
    assert reference[BASE] != reference["faq-smollm2"]
    for switches in range(10):
        name = ("faq-smollm2", BASE)[switches % 2]
        question = switches // 2 % 2
        assert engine.answer(ask(QUESTIONS[question]), name, GREEDY).ids == reference[name][question]


def test_compare_gives_what_each_would_say_alone(engine):
    for parameters in (GREEDY, Parameters(seed=11, num_predict=12)):
        alone = {name: engine.answer(ask(QUESTIONS[0]), name, parameters) for name in engine.models}
        growing = list(engine.compare(ask(QUESTIONS[0]), engine.models, parameters))
        together = {answer.model: answer for answer in growing}
        assert {name: answer.ids for name, answer in together.items()} == {n: a.ids for n, a in alone.items()}
        assert together[BASE].seed == together["faq-smollm2"].seed
        seen = [answer.model for answer in growing]
        assert BASE in seen[seen.index("faq-smollm2") :], "they should take turns, not wait for each other"
    place = chat.first_difference(together[BASE], together["faq-smollm2"])
    assert len(together[BASE].top[place]) == chat.TOP


def test_second_turn_reads_only_what_is_new(engine):
    first = engine.answer(ask(QUESTIONS[0]), BASE, GREEDY)
    turns = talk(QUESTIONS[0], first.text, "Why?")
    second = engine.answer(turns, BASE, GREEDY)
    assert second.cached_tokens >= first.prompt_tokens + first.tokens - 1
    assert second.prompt_tokens - second.cached_tokens < 15
    engine.answer(ask("Something else"), "faq-smollm2", GREEDY)
    again = engine.answer(turns, BASE, GREEDY)
    assert again.cached_tokens == again.prompt_tokens - 1, "back from another adapter, the cache is still there"
    engine.models[BASE].cache = None
    without = engine.answer(turns, BASE, GREEDY)
    assert without.cached_tokens == 0
    assert second.ids == again.ids == without.ids


def test_an_interrupted_answer_leaves_a_valid_cache(engine):
    stop = threading.Event()
    for cut in engine.stream(ask(QUESTIONS[0]), "faq-smollm2", GREEDY, stop):
        if cut.tokens == 6:
            stop.set()
    assert cut.stop == "interrupted" and cut.tokens == 6
    whole = engine.answer(ask(QUESTIONS[0]), "faq-smollm2", GREEDY)
    assert whole.ids[:6] == cut.ids and whole.cached_tokens > 0
    engine.models["faq-smollm2"].cache = None
    assert engine.answer(ask(QUESTIONS[0]), "faq-smollm2", GREEDY).ids == whole.ids


def test_stopped_while_it_reads_the_question_nothing_comes(engine):
    stop = threading.Event()
    stop.set()
    answer = engine.answer(ask("word " * 700), BASE, GREEDY, stop)
    assert (answer.text, answer.stop, answer.first_token) == ("", "interrupted", None)


def test_strength(engine, reference):
    def ids(strength):
        parameters = dataclasses.replace(GREEDY, strength=strength)
        return engine.answer(ask(QUESTIONS[0]), "faq-smollm2", parameters).ids

    assert ids(0) == reference[BASE][0]
    assert ids(1) == reference["faq-smollm2"][0]
    assert ids(2) != ids(1)


@pytest.fixture(scope="module")
def looking_up(embedded, embedded_adapter) -> Engine:
    """With an adapter whose training rows are at hand: twelve, in another order than in their file."""
    engine = Engine(embedded)
    adapter = trained_on(chat.read_adapter(embedded_adapter))
    engine.load_adapter(adapter)
    assert engine.find_rows() == [] and list(engine.models) == [BASE, "faq-smollm2", "retrieved", "faq-smollm2+rows"]
    return engine


def trained_on(adapter: chat.Adapter) -> chat.Adapter:
    """As if its held-out rows were those that it was trained on."""
    data = adapter.run["data"]
    data = data | {"train_ids": data["eval_ids"][::-1], "eval_ids": []}
    return dataclasses.replace(adapter, run=adapter.run | {"data": data})


def test_looked_up_rows_stand_in_the_prompt_as_in_evaluation(looking_up):
    adapter = looking_up.models["faq-smollm2"].adapter
    rows = finetune.read_rows(adapter.path.parent / "faq-smollm2.json")[::-1]
    assert looking_up.models["retrieved"].rows == rows, "in training's order"
    turns = talk("What is a premium?", "A price.", "charged for car twice, why pls")
    near = finetune.nearest_rows(turns[-1]["content"], rows)
    assert len(near) == finetune.LOOKED_UP
    for name, plain in (("retrieved", BASE), ("faq-smollm2+rows", "faq-smollm2")):
        model, tokenizer = looking_up.models[name], looking_up.models[plain].tokenizer
        for messages in (turns, turns[-1:], [{"role": "system", "content": "Be brief."}, *turns]):
            wanted = chat.chat_ids(tokenizer, list(finetune.with_rows(messages, near)), add_generation_prompt=True)
            assert model.tokenize(messages) == wanted
        text = tokenizer.decode(model.tokenize(turns))
        assert text.count(finetune.ROWS_HEAD) == 1 and text.index("A price.") < text.index(finetune.ROWS_HEAD)
        assert looking_up.count(turns[:2], name) == looking_up.count(turns[:2], plain), "no question, no rows"
        answer = looking_up.answer(turns, name, GREEDY)
        same = looking_up.answer(list(finetune.with_rows(turns, near)), plain, GREEDY)
        assert answer.ids == same.ids and answer.rows == [row.question for row in near] and not same.rows
        score = looking_up.score(turns, "You pay twice.", name)
        assert score == looking_up.score(list(finetune.with_rows(turns, near)), "You pay twice.", plain)
    growing = looking_up.compare(turns, looking_up.models, GREEDY)
    together = {answer.model: answer.ids for answer in growing}
    assert together == {name: looking_up.answer(turns, name, GREEDY).ids for name in looking_up.models}
    assert len({tuple(ids) for ids in together.values()}) > 2


def test_score_is_the_loss_that_transformers_computes(engine):
    import torch

    model = engine.models["faq-smollm2"]
    turns = talk(QUESTIONS[0], "What you pay first.")
    prompt = chat.chat_ids(model.tokenizer, turns[:1], add_generation_prompt=True)
    ids = chat.chat_ids(model.tokenizer, turns, add_generation_prompt=False)
    ids = ids[: len(ids) - ids[::-1].index(model.tokenizer.eos_token_id)]
    mean, tokens = engine.score(turns[:1], "What you pay first.", "faq-smollm2")
    labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
    with torch.inference_mode():
        loss = engine.network(input_ids=torch.tensor([ids]), labels=labels).loss
    assert tokens == len(ids) - len(prompt)
    assert mean == pytest.approx(-loss.item(), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Engine, with the tiny model: mechanics


@pytest.fixture
def tiny_engine(tiny, tiny_adapter) -> Engine:
    engine = Engine(tiny, num_ctx=200)
    engine.load_adapter(chat.read_adapter(tiny_adapter))
    return engine


def test_recites_to_the_end(tiny_engine):
    for question in LEARNT:
        answer = tiny_engine.answer(ask(question), "recites", Parameters(temperature=0))
        assert (answer.text, answer.stop) == (RECITED, "end")
    assert not tiny_engine.models["recites"].no_effect


def test_sampling(tiny_engine):
    def ids(**parameters):
        return tiny_engine.answer(ask("Anything?"), BASE, Parameters(**{"num_predict": 20, "seed": 1} | parameters)).ids

    assert ids() == ids() != ids(seed=2)
    assert ids(top_k=1) == ids(temperature=0) == ids(top_p=0.0)
    assert ids(temperature=0, repeat_penalty=2.0) != ids(temperature=0)
    assert len(ids(num_predict=3)) == 3 and ids(num_predict=0) == []
    one, other = (tiny_engine.answer(ask("Anything?"), BASE, Parameters(num_predict=1)).seed for _ in range(2))
    assert one != other


def test_context(tiny_engine):
    answer = tiny_engine.answer(ask("Anything?"), BASE, Parameters(num_predict=-1, seed=1))
    assert answer.stop == "context" and answer.prompt_tokens + answer.tokens == 200
    with pytest.raises(BadInput, match=r"tokens; the context holds 200"):
        tiny_engine.answer(ask("word " * 300), BASE, GREEDY)


@pytest.fixture
def plain_engine(tiny, tiny_adapter, monkeypatch) -> Engine:
    """On the plain path, with the next step begun before a token is known, as on a GPU."""
    monkeypatch.setattr(chat.FastDecoder, "fits", lambda network: False)
    engine = Engine(tiny, num_ctx=200)
    engine.load_adapter(chat.read_adapter(tiny_adapter))
    engine.runs_ahead = True
    return engine


def test_a_step_ahead_is_known_to_be_in_the_plain_cache(plain_engine):
    model, recite = plain_engine.models["recites"], Parameters(temperature=0)
    first = plain_engine.answer(ask("Hello"), "recites", recite)
    assert first.stop == "end" and len(model.cached) == model.cache.get_seq_length() == model.length
    assert model.cached[-1] in model.stops
    turns = talk("Hello", first.text, LEARNT[0])
    second = plain_engine.answer(turns, "recites", dataclasses.replace(recite, num_predict=8))
    model.cache = None
    assert second.ids == plain_engine.answer(turns, "recites", dataclasses.replace(recite, num_predict=8)).ids


@pytest.mark.parametrize("where", ["forward", "copy_to_host"])
def test_an_error_in_a_step_does_not_stay_in_the_plain_cache(plain_engine, monkeypatch, where):
    """While some layers have the token and others do not; or behind a step ahead, before its token is known."""
    model, recite = plain_engine.models["recites"], Parameters(temperature=0)
    calls, layer = [], plain_engine.network.get_base_model().model.layers[1]
    owner, name = (layer, "forward") if where == "forward" else (chat, "copy_to_host")
    original = getattr(owner, name)

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            return original(*args, **kwargs)
        if where == "forward":
            raise RuntimeError("out of memory")

        def interrupted():
            raise KeyboardInterrupt

        return interrupted

    monkeypatch.setattr(owner, name, fails_once)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        plain_engine.answer(ask("Hello"), "recites", recite)
    assert model.cache.get_seq_length() > len(model.cached)
    turns = talk("Hello", RECITED, LEARNT[0])  # starts with all that counts as cached
    again = plain_engine.answer(turns, "recites", GREEDY)
    model.cache = None
    assert again.ids == plain_engine.answer(turns, "recites", GREEDY).ids and again.cached_tokens == 0


def test_an_adapter_without_effect_is_found(tiny, tiny_engine, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_engine.models["recites"].adapter.path, tmp_path / "idle.v1")
    weights = load_file(folder / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(zero, folder / "adapter_model.safetensors")
    assert tiny_engine.load_adapter(chat.read_adapter(folder)).no_effect
    assert tiny_engine.answer(ask("Hello"), "recites", Parameters(temperature=0)).text == RECITED
    assert tiny_engine.answer(ask("Hello"), "idle.v1", GREEDY).ids == tiny_engine.answer(ask("Hello"), BASE, GREEDY).ids


def test_an_adapter_on_another_base_is_refused(tiny_adapter, tiny_model, home):
    shutil.copytree(tiny_model, home / "other model")
    other = shutil.copytree(tiny_adapter, home / "adapters/other")
    run = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(run | {"model": {"id": str(home / "other model")}}))
    options = chat.parse_options(["--adapter", "recites", "--adapter", "other"])
    with pytest.raises(BadInput, match=r"other: stands on .*other model, .*: python chat.py --adapter adapters"):
        chat.choose_models(options)
    source, (adapter,) = chat.choose_models(chat.parse_options(["--adapter", "other"]))
    assert (source.folder, adapter.name) == (home / "other model", "other")


def test_a_damaged_adapter_leaves_the_others_as_they_were(tiny, tiny_engine, tmp_path):
    good = tiny_engine.models["recites"].adapter.path
    short = shutil.copytree(good, tmp_path / "short")
    whole = (short / "adapter_model.safetensors").read_bytes()
    (short / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    wide = shutil.copytree(good, tmp_path / "wide")
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    for folder in (short, wide):
        for engine in (tiny_engine, Engine(tiny)):
            with pytest.raises(BadInput, match=rf"adapter .*{folder.name}: does not fit .* or is damaged"):
                engine.load_adapter(chat.read_adapter(folder))
            assert len(engine.models) == (2 if engine is tiny_engine else 1)
            assert engine.answer(ask("Hello"), BASE, GREEDY).tokens
    assert tiny_engine.answer(ask("Hello"), "recites", Parameters(temperature=0)).text == RECITED


def test_adapters_that_cannot_be_read(tiny_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_adapter, tmp_path / "adapters/recites")
    (tmp_path / "empty").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/config.json").write_text("{}")
    pickled = shutil.copytree(tiny_adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    (other / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    broken = shutil.copytree(tiny_adapter, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{,}")
    for name, message in (
        ("recits", "did you mean recites"),
        ("zzz", "there are: recites"),
        ("empty", "no adapter_config.json"),
        ("whole", "name it with --model"),
        ("pickled", "pickled .bin files are never loaded"),
        ("other", "only LoRA"),
        ("broken", "adapter_config.json: broken JSON at line 1"),
    ):
        with pytest.raises(BadInput, match=message):
            chat.read_adapter(finetune.find_adapter(name, "adapter"))
    assert chat.read_adapter(finetune.find_adapter("recites", "adapter")).base


def test_what_run_json_tells(tiny_adapter):
    def summary(**evaluation):
        return chat.Adapter(tiny_adapter, "", {"evaluation": evaluation}).summary

    measured = {"before": {"nll": 3.2}, "after": {"nll": 2.1}}
    assert summary(**measured, verdict={"label": "helped"}) == "helped: held-out loss 3.20 -> 2.10"
    assert summary(**measured) == "held-out loss 3.20 -> 2.10"
    assert summary(before=[], verdict="?") == chat.Adapter(tiny_adapter, "", {"evaluation": 7}).summary == ""


def test_detokenizer_never_cuts_a_character(tiny_engine):
    tokenizer = tiny_engine.models[BASE].tokenizer
    text = "Grüße, 日本語 and 👩‍🚀!"
    detokenizer = chat.Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


# ----------------------------------------------------------------------------------------------------------------------
# Conversation


def conversation(*texts: str) -> Conversation:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(turns=[Turn(question, [Answer(BASE, answer)]) for question, answer in pairs])


def test_messages_alternate_and_end_with_the_question():
    messages = conversation("q1", "a1", "q2", "a2").messages("q3")
    assert messages == talk("q1", "a1", "q2", "a2", "q3")
    talked = conversation("q1", "a1", "q2", "a2")
    with talked.asking(talked.turns[-1]):
        assert talked.messages("q2") == talk("q1", "a1", "q2")
    assert talked.messages() == talk("q1", "a1", "q2", "a2")


def test_the_system_prompt_is_folded_where_the_template_has_none(tiny_engine):
    talked = conversation("q1", "a1")
    talked.system = "Be brief."
    tokenizer = tiny_engine.models[BASE].tokenizer
    text = tokenizer.decode(chat.chat_ids(tokenizer, talked.messages("q2"), add_generation_prompt=True))
    assert text == "<s>[INST] Be brief.\n\nq1 [/INST] a1</s>[INST] q2 [/INST]"


def test_full_context_drops_whole_oldest_turns():
    talked = conversation(*(f"{kind}{n}" for n in range(8) for kind in "qa"))
    messages, dropped = talked.fit("q8", len, room=10)
    assert dropped == 5 and messages == talk("q5", "a5", "q6", "a6", "q7", "a7", "q8")
    assert talked.fit("q8", len, room=10)[1] == 0, "said once"
    assert len(talked.turns) == 8, "still there to be saved"
    with pytest.raises(BadInput, match="too long: 7 tokens"):
        talked.fit("q8", lambda messages: 7, room=6)
    assert talked.skipped == 5


def test_branches(tmp_path):
    talked = conversation("q1", "a1", "q2", "a2")
    talked.turns[1].replies.append(Answer("recites", "other"))
    talked.turns[1].chosen = 1
    assert talked.messages()[-1]["content"] == "other"
    loaded = Conversation.from_json(json.loads(json.dumps(talked.as_json())), "file")
    assert loaded == talked
    markdown = talked.as_markdown()
    assert "### base (not chosen)\n\na2" in markdown and "### recites\n\nother" in markdown
    assert talked.undo().question == "q2" and talked.messages() == talk("q1", "a1")


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([], "talk.json: is not a saved conversation"),
        ({"turns": [7]}, "talk.json: turn 1 is not as /save writes it"),
        ({"turns": [{"question": "q", "replies": []}]}, "turn 1 is not as"),
        ({"turns": [{"replies": [{"model": "m", "text": "t"}]}]}, 'turn 1 is not as .*"question": TEXT'),
        ({"turns": [{"question": "q", "replies": [{"text": "t"}]}]}, 'turn 1 is not as .*"model": TEXT'),
        ({"turns": [{"question": "q", "replies": [{"model": "m", "text": "t"}], "chosen": 3}]}, '"chosen"'),
        ({"turns": [], "system": 5}, '"system"'),
    ],
)
def test_conversations_that_cannot_be_loaded(loaded, message):
    with pytest.raises(BadInput, match=message):
        Conversation.from_json(loaded, "talk.json")


# ----------------------------------------------------------------------------------------------------------------------
# What the screen gets


def on_screen(chunks: list[str], width: int = 40, height: int = 12) -> tuple[list[str], str]:
    """An answer written to a terminal of this size -> (all its lines, those scrolled away too; the raw bytes)."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system="standard")
    writer = chat.AnswerWriter(console)
    for chunk in chunks:
        writer.feed(chunk)
    writer.close()
    screen = pyte.HistoryScreen(width, height, history=1000, ratio=0.5)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(file.getvalue())
    gone = ["".join(line[column].data for column in range(width)).rstrip() for line in screen.history.top]
    return [*gone, *(line.rstrip() for line in screen.display)], file.getvalue()


def pieces(text: str, seed: int) -> list[str]:
    rng, found = random.Random(seed), []
    while text:
        size = rng.randint(1, 6)
        found.append(text[:size])
        text = text[size:]
    return found


def test_markdown_is_rendered_and_harmless():
    lines, raw = on_screen([RECITED])
    shown = [line for line in lines if line]
    assert shown[0] == "What is covered" and shown[1] == "Your policy pays for two things:"
    assert shown[2].startswith(" • fire \N{REPLACEMENT CHARACTER}[31mand") and shown[3] == " • hail"
    assert shown[4].strip() == "sum = 1 + 2" and shown[5] == "That is all."
    assert "\x1b[31m" not in raw and "\x1b]" not in raw and "\x07" not in raw and "\r\x1b[J" in raw


LONG = "\n\n".join(
    [
        "# A title",
        "One *long* paragraph that does not fit on a line, with `code` in it, and some more words after that.",
        "1. first\n2. second, which is longer than the screen is wide\n3. third",
        "```python\nfor n in range(3):\n\n    print(n)\n```",
        "> quoted\n\n| a | b |\n| - | - |\n| 1 | 2 |",
        "日本語のとても長い文章がここにあります、そして続きます。",
        "x" * 95,
        "The end",
    ]
)


@pytest.mark.parametrize("width", [40, 24, 80])
def test_however_the_text_is_cut_the_screen_is_the_same(width):
    whole, _ = on_screen([LONG], width, 40)
    for seed in range(5):
        assert on_screen(pieces(LONG, seed), width, 40)[0] == whole
    assert "The end" in whole and all(len(line) <= width for line in whole)


def test_what_has_scrolled_away_is_not_painted_again():
    text = "**Word** " + "and another one " * 60
    lines, raw = on_screen(pieces(text, 0), 30, 8)
    assert "\x1b[" not in raw, "this block is taller than the screen: it stays as it was written"
    assert " ".join(lines).split() == text.split()


def test_not_a_terminal_gets_the_text_and_nothing_else():
    file = io.StringIO()
    writer = chat.AnswerWriter(Console(file=file, width=20))
    for piece in pieces(RECITED, 1):
        writer.feed(piece)
    writer.close()
    assert file.getvalue() == finetune.clean(RECITED) + "\n"


def test_words_that_differ_are_marked():
    marked = chat.marked("the deductible is paid first", "the premium is paid", plain=True)
    assert str(marked) == "the *deductible* is paid *first*"
    styled = chat.marked("a b", "a c")
    assert [(styled.plain[span.start : span.end]) for span in styled.spans] == ["b"]


@pytest.mark.parametrize(("width", "columns"), [(120, True), (60, False), (40, False)])
def test_comparison_at_each_width(width, columns):
    console = Console(file=io.StringIO(), width=width)
    answers = [("base", "9 tokens", chat.Text("alpha " * 30)), ("x" * 50, "", chat.Text("beta " * 20 + "y" * 90))]
    lines = chat.render(console, chat.side_by_side(answers, width)).split("\n")
    assert all(chat.cell_len(line) <= width for line in lines)
    assert any("alpha" in line and "beta" in line for line in lines) == columns
    assert "".join(lines).count("y") == 90, "nothing is cut off"


def test_painting_over_after_the_window_became_narrower():
    """Terminals break the lines that no longer fit; all of them have to go."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=20)
    area = chat.Area(console)
    area.paint(chat.Text("x" * 35 + "\nshort"))
    console.width = 20
    assert area.to_top() == "\x1b[3A\r"


def test_clean():
    assert finetune.clean("a\x1b[2Jb\r\nc\rd\x9b1m\u202ee") == "a\ufffd[2Jb\nc\nd\ufffd1m\ufffde"


def test_nearest_question(tiny_adapter):
    row, score, ids = chat.nearest_question(chat.read_adapter(tiny_adapter), "what is covered")
    assert row.question == "What is covered?" and score > 90 and ids == "eval_ids"
    assert chat.nearest_question(chat.read_adapter(tiny_adapter), "zebra quantum") is None


def test_rows_at_hand(tiny_adapter, tmp_path):
    adapter = chat.read_adapter(tiny_adapter)
    assert [row.question for row in chat.trained_rows(trained_on(adapter))[0]] == list(LEARNT)[::-1]
    files = adapter.run["data"]["files"]
    odd = [7, {}, {"path": 5}, {"path": "x" * 5000}, {"path": "~nobody"}, {"path": "\0"}]
    damaged = ({}, [], None, "x", {"files": 3}, {"files": odd})
    damaged += ({"files": files}, {"files": files, "train_ids": 5}, {"files": files, "train_ids": [[], {}, "0" * 10]})
    for data in damaged:
        rows, problem = chat.trained_rows(dataclasses.replace(adapter, run={"data": data}))
        assert not rows and re.search(r"those that taught recites are not at hand; .*(put .* back|run\.json)", problem)


def test_answers_in_as_many_columns_as_fit():
    console = Console(file=io.StringIO(), width=100)
    answers = [(name, "", f"text-{name}") for name in ("one", "two", "three", "four", "five")]
    lines = [line.split() for line in chat.render(console, chat.side_by_side(answers, 100)).split("\n")]
    assert lines == [["one", "two"], ["text-one", "text-two"], [], ["three", "four"], ["text-three", "text-four"], [],
                     ["five"], ["text-five"]]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The chat without a terminal: lines in, what it shows out


@pytest.fixture
def typed(tiny, tiny_engine, home):
    """typed(line, ...) -> what the chat shows; it lives on from call to call. Answers to its questions are lines."""
    loading: Future = Future()
    loading.set_result(tiny_engine)
    options = chat.parse_options(["--temperature", "0", "--num-predict", "8"])
    adapter = chat.read_adapter(home / "adapters/recites")
    talk = chat.Chat(options, tiny, [adapter], loading, io.StringIO())
    lines: list[str] = []

    def prompt(*_, **__) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    talk.session = types.SimpleNamespace(prompt=prompt, refresh_interval=0)
    talk.ask = lambda question: talk.note(question) or prompt()

    def call(*some: str) -> str:
        lines[:] = some
        talk.console.file.seek(0)
        talk.console.file.truncate()
        talk.run()
        return talk.console.file.getvalue()

    call.chat = talk
    return call


def saved(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_is_a_command_and_what_a_question(typed):
    for line in ("/usr/lib/libc.so: cannot open", "/home is full", " /help", "//", "/var/log"):
        typed("/clear", line)
        assert [turn.question for turn in typed.chat.conversation.turns] == [line.strip()], line
    typed("/clear")
    for line, shown in (
        ("/hlep", "did you mean /help?"),
        ("/helpme", "No command /helpme"),
        ("/foo", "No command /foo"),
    ):
        assert shown in typed(line) and not typed.chat.conversation.turns
    assert "The answers diverge" in " ".join(typed("/compare\nHello", "").split())
    assert "temperature = 0.5" in typed("/set\tparameter temperature 0.5")


def test_an_unforeseen_error_is_one_line_and_the_chat_goes_on(typed, monkeypatch, home):
    monkeypatch.setitem(chat.COMMANDS, "/stats", lambda chat, rest: 1 / 0)
    shown = typed("Hello", "/stats", "Hello")
    (line,) = [line for line in shown.split("\n") if "ZeroDivisionError" in line]
    assert line.startswith("failed: ZeroDivisionError: division by zero; see ") and "Traceback" not in shown
    monkeypatch.setattr(Engine, "stream", lambda *_, **__: 1 / 0)
    assert typed("Hello").count("ZeroDivisionError") == 1
    assert len(typed.chat.conversation.turns) == 2


def test_the_conversation_is_on_disk_after_every_turn(typed, home):
    path = home / "state/faq-finetune/conversation.json"
    typed("Hello")
    assert len(saved(path)["turns"]) == 1 and stat.S_IMODE(path.stat().st_mode) == 0o600
    typed("/system Be brief.", "/set top_k 7", "Tell me more")
    options = chat.parse_options(["--continue"])
    again = chat.first_conversation(options)
    assert [turn.question for turn in again.turns] == ["Hello", "Tell me more"]
    assert (again.system, again.parameters.top_k, again.parameters.temperature) == ("Be brief.", 7, 0)
    again = chat.first_conversation(chat.parse_options(["--continue", "--top-k", "9", "--system", "No."]))
    assert (again.system, again.parameters.top_k) == ("No.", 9), "flags win"
    for flags in (["--temperature", "0.8"], ["--temperature=0.8"], ["--top_k=40"]):
        again = chat.first_conversation(chat.parse_options(["--continue", *flags]))
        expected = (0.8, 7) if "temp" in flags[0] else (0, 40)
        assert (again.parameters.temperature, again.parameters.top_k) == expected, "even with the value of the default"
    before = path.read_text()
    assert chat.first_conversation(chat.parse_options([])) == Conversation()
    typed("/clear")
    assert path.read_text() == before, "an empty conversation does not replace the last one"
    shutil.rmtree(home / "state")
    (home / "state").write_text("no folder")
    shown = typed("Hello", "Tell me more")
    assert shown.count("may not be on disk from now on") == 1
    with pytest.raises(BadInput, match="--continue: "):
        chat.first_conversation(options)


def test_continue_without_a_conversation(home):
    with pytest.raises(BadInput, match="--continue: there is no conversation yet"):
        chat.first_conversation(chat.parse_options(["--continue"]))


def test_save_and_load_keep_the_parameters(typed, home):
    typed("Hello", "/set strength 0.5", "/set num_predict 3", "/save talk.json", "/set strength 1", "/load talk.json")
    assert (typed.chat.parameters.strength, typed.chat.parameters.num_predict) == (0.5, 3)
    loaded = saved(home / "talk.json")
    (home / "talk.json").write_text(json.dumps(loaded | {"parameters": {"top_k": 5}}))
    typed("/load talk.json")
    assert (typed.chat.parameters.strength, typed.chat.parameters.top_k) == (0.5, 5), "what is not named stays"
    (home / "talk.json").write_text(json.dumps(loaded | {"parameters": {"top_k": "many"}}))
    assert "talk.json: top_k must be a whole number" in typed("/load talk.json")


def test_set_takes_one_value(typed):
    for line in ("/set parameter temperature 0.5", "/set temperature=0.5", "/set parameter temperature = 0.5"):
        assert "temperature = 0.5" in typed("/set temperature 1", line).split("\n\n")[1], line
    shown = typed("/set parameter temperature 0.7 or so", "/set temperature")
    assert "temperature takes one value: /set parameter temperature VALUE" in shown and "temperature = 0.5" in shown
    assert "no parameter parameters" in typed("/set parameters")


def test_the_context_shown_is_the_answering_models(typed):
    chat_, used = typed.chat, []
    typed("Hello")
    used.append(chat_.context_used)
    typed("/system Be brief, and be kind.")
    used.append(chat_.context_used)
    assert 0 < used[0] < used[1] and f"context {used[1]} of 200" in chat_.toolbar()
    typed("/clear")
    assert chat_.context_used == 0


def test_nearest_question_is_of_the_adapter_that_answers(typed, home, monkeypatch):
    other = shutil.copytree(home / "adapters/recites", home / "adapters/other")
    asked = []
    monkeypatch.setattr(chat, "nearest_question", lambda adapter, question: asked.append(adapter.name))
    for line in (f"/adapter {other.name}", "/adapter recites", "/adapter base"):
        typed(line)
        chat.show_nearest(typed.chat, "Hello")
    assert asked == ["other", "recites", "recites"]


@pytest.fixture
def data(home):
    """The current folder, with the rows on which the adapter was trained in faq.json."""
    questions = [{"question": question, "answer": "Fire."} for question in LEARNT]
    (home / "faq.json").write_text(json.dumps(questions))
    ids = [row.id for row in finetune.read_rows(home / "faq.json")]
    path = home / "adapters/recites/run.json"
    path.write_text(json.dumps(saved(path) | {"data": {"files": [{"path": "faq.json"}], "train_ids": ids}}))
    return home


def test_looked_up_rows_in_the_chat(data, typed):
    chat_ = typed.chat
    chat_.engine.models["recites"].adapter = chat.read_adapter(data / "adapters/recites")
    (data / "faq.json").rename(data / "away.json")
    for line in ("/adapter retrieved", "/adapter recites+rows"):
        shown = " ".join(typed(line).split())
        assert "not at hand; put faq.json back as it was" in shown and chat_.model_name == "recites"
    shown = typed("/compare Hello", "")
    assert "not at hand" in shown and "Rows in the prompt" not in shown
    (data / "away.json").rename(data / "faq.json")

    chat_.engine.context = 400
    shown = typed("/compare Hello", "4")
    assert "Rows in the prompt of retrieved and recites+rows:\n  Hello\n" in shown and "not at hand" not in shown
    assert "Trained on this question (100% alike): Hello" in shown and shown.count("diverge at") == 1
    assert "Going on with the answer of recites+rows" in shown
    assert "Trained on this question, in other words (" in typed("/compare is it covered, what is", "")
    shown = typed("/adapter retrieved", "Tell me more", "/regen recites+rows", "/adapter")
    assert shown.count("Rows in the prompt of") == 2 and "with the 3 nearest of 3 rows that taught recites" in shown
    assert chat_.adapter_name == "retrieved" and "F2: base" in chat_.toolbar()
    first, second = chat_.conversation.turns
    assert (first.question, second.question) == ("Hello", "Tell me more"), "what is kept is the plain question"
    assert [reply.model for reply in second.replies] == ["retrieved", "recites+rows"]
    assert finetune.ROWS_HEAD not in json.dumps(chat_.conversation.as_json())
    assert "retrieved" in typed("/score Fire.") and "failed" not in typed("/vote Hello", "a", "/stats", "/undo")

    hostile = finetune.Row(tuple(ask("Hello \x1b[2J\n\u202e" + "long " * 99)), "Fire.", "")
    chat_.engine.models["retrieved"].rows = [hostile]
    shown = typed("/clear", "Hello")
    assert "  Hello \ufffd[2J \ufffdlong long" in shown and "\x1b" not in shown and len(shown) < 1000
    chat_.engine.context = 100
    chat_.conversation.turns.clear()
    shown = typed("/compare Hello", "")
    assert "Without retrieved and recites+rows: the looked-up rows do not fit" in shown and "diverge" in shown


def test_saving_into_a_folder_is_refused_at_once(typed, home):
    shown = typed("Hello", "/save adapters", "/export adapters")
    assert shown.count("adapters: is a folder; name a file in it") == 2
    typed("/save no/such/folder.json")
    assert not list(home.rglob("tmp*")) and not list(home.parent.glob("tmp*"))


def test_lone_surrogates(typed, home):
    shown = typed("caf\udce9?", "/system \ud800", "/save talk.json", "/load talk.json", "And?")
    assert "failed" not in shown and typed.chat.conversation.turns[0].question == "caf\ufffd?"
    reply = '{"model": "\\ud83d", "text": "\\udc00"}'
    text = f'{{"turns": [{{"question": "\\ud83d", "replies": [{reply}]}}], "system": "\\ud800"}}'
    (home / "talk.json").write_text(text)
    shown = typed(
        "/load talk.json", "Hello", "/score \udce9", "/compare \udce9", "", "/keep \udce9 text", "/export x.md"
    )
    assert "failed" not in shown and len(typed.chat.conversation.turns) == 2
    assert typed.chat.conversation.turns[0].reply.text == "\ufffd"


def test_score_uses_the_strength_that_is_set(typed):
    def scores(strength: str) -> list[str]:
        shown = typed(f"/set strength {strength}", "/score You pay first.")
        return [line.split()[1] for line in shown.split("\n") if line.startswith(("base ", "recites "))]

    typed("Hello")
    base, tuned = scores("1")
    assert base != tuned
    assert scores("0") == [base, base] and scores("1") == [base, tuned]


def test_a_file_that_was_read_is_kept_until_it_was_answered(typed, home, monkeypatch):
    (home / "long.txt").write_text("word " * 300)
    (home / "short.txt").write_text("The deductible is 700 dollars.")
    assert "too long" in typed("/read long.txt", "/compare Hello") and len(typed.chat.files) == 1
    assert "too long" in typed("Hello") and len(typed.chat.files) == 1
    typed("/clear", "/read short.txt")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "compare", lambda *_: iter(()))
        assert "Stopped before there was anything" in typed("/compare Hello") and len(typed.chat.files) == 1
    typed("/compare Hello", "1")
    assert not typed.chat.files and "700 dollars.\n\nHello" in typed.chat.conversation.turns[0].question


def test_damaged_votes(typed, home):
    votes = home / "state/faq-finetune/votes.jsonl"
    votes.write_bytes(b'\xff\xfe\n[1]\nnull\n{"between": 7}\n{,}\n' + b"[" * 100_000 + b"\n")
    shown = typed("/vote Hello\u2028there", "=")
    assert "Votes so far: base 0, recites 0, alike 1" in shown
    assert "alike 2" in typed("/vote Hello\u2028there", "=")
    assert stat.S_IMODE(votes.stat().st_mode) == 0o600


def test_keep_collects_rows_that_finetune_reads(typed, home):
    assert "there is no question yet" in typed("/keep")
    typed("/set num_predict 512", "What is covered?", "/keep")
    (home / "data/kept.jsonl").write_text((home / "data/kept.jsonl").read_text().rstrip("\n"))  # as an editor may
    assert "data/kept.jsonl has 2 rows now" in typed("/keep Fire, and\nhail.")
    first, second = finetune.read_rows(home / "data/kept.jsonl")
    assert first.question == second.question == "What is covered?" and second.answer == "Fire, and\nhail."
    assert first.answer == RECITED.replace("\x1b", "").replace("\x07", "")


def test_nearest_question_says_only_what_is_known(tiny_adapter):
    adapter = chat.read_adapter(tiny_adapter)
    row, *_ = chat.nearest_question(adapter, "What is covered?")
    for lists, ids in (({"train_ids": [row.id]}, "train_ids"), ({"test_ids": [row.id]}, "test_ids"), ({}, "")):
        data = {"files": adapter.run["data"]["files"]} | lists
        known = dataclasses.replace(adapter, run=adapter.run | {"data": data})
        assert chat.nearest_question(known, "What is covered?")[2] == ids


def test_what_is_broken_is_named_and_the_newest_sound_adapter_opens(home, capsys, monkeypatch):
    for name, age in (("old", 900), ("cut", 100), ("newest", 50)):
        folder = shutil.copytree(home / "adapters/recites", home / "adapters" / name)
        past = time.time() - age
        os.utime(folder / "adapter_config.json", (past, past))
    (home / "adapters/old/adapter_config.json").write_text("{,}")
    whole = (home / "adapters/cut/adapter_model.safetensors").read_bytes()
    (home / "adapters/cut/adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    past = time.time() - 500
    os.utime(home / "adapters/recites/adapter_config.json", (past, past))
    os.utime(home / "adapters/newest/adapter_config.json")
    monkeypatch.setattr(finetune, "console", Console(highlight=False))
    _, (adapter,) = chat.choose_models(chat.parse_options([]))
    named = capsys.readouterr().out
    assert adapter.name == "newest"
    assert "left out: " in named and "old" in named and "cut/adapter_model.safetensors is damaged" in named


# ----------------------------------------------------------------------------------------------------------------------
# Scripting: the real command line


@pytest.fixture
def home(tiny_adapter, tmp_path, monkeypatch):
    """The current folder; its adapters/ holds the tiny one."""
    shutil.copytree(tiny_adapter, tmp_path / "adapters/recites")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def script(home, monkeypatch, capfd):
    """script("--json", stdin="q") -> (exit code, stdout, stderr) of main(): torch is imported once for all of these."""

    def call(*args, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        try:
            code = chat.main(list(args))
        except SystemExit as leaving:
            code = leaving.code
        return code, *capfd.readouterr()

    return call


def process(*args, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, args)], capture_output=True, text=True, timeout=120, **options)


def test_two_questions_two_json_lines(home):
    done = process(sys.executable, ROOT / "chat.py", "--json", "--num-predict", "5", input="q1\nq2\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == ""
    assert [line["question"] for line in lines] == ["q1", "q2"]
    for line in lines:
        assert set(line) == {"model", "question", "answer", "tokens", "seconds", "seed"}
        assert line["model"] == "recites" and line["tokens"] <= 5


def test_json_escapes_what_a_terminal_would_obey(script):
    _, out, _ = script("--json", "--temperature", "0", "Hello")
    assert "\x1b" not in out and "\x07" not in out
    assert json.loads(out)["answer"] == RECITED


def test_one_question_one_answer(script):
    assert script("--temperature", "0", "Hello")[:2] == (0, finetune.clean(RECITED) + "\n")


def test_comparison_in_a_pipe(script):
    _, out, _ = script("--compare", "--temperature", "0", "--num-predict", "30", stdin="Hello\n")
    base, recited = out.split("[recites]\n")
    assert base.startswith("[base]\n") and recited.startswith("# What is covered\n")
    assert "\x1b" not in out


def test_looked_up_rows_in_a_pipe(script, data):
    code, out, errors = script("--compare", "--num-predict", "3", stdin="Hello\n")
    names = ["base", "recites", "retrieved", "recites+rows"]
    assert code == 0 and re.findall(r"^\[(.*)\]$", out, re.MULTILINE) == names
    for name in names[2:]:
        assert f"Rows in the prompt of {name}:\n  Hello\n" in errors
    code, out, errors = script("--compare", "--json", "--num-predict", "3", stdin="Hello\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, errors) == (0, "") and "\x1b" not in out
    assert [len(line.get("rows", ())) for line in lines] == [0, 0, 3, 3] and lines[2]["rows"][0] == "Hello"
    code, out, errors = script("--compare", "--num-ctx", "64", "--num-predict", "3", stdin="Hello\n")
    assert code == 0 and re.findall(r"^\[(.*)\]$", out, re.MULTILINE) == names[:2], "where the rows do not fit"
    (data / "faq.json").unlink()
    code, out, errors = script("--compare", "--num-predict", "3", stdin="Hello\n")
    assert code == 0 and errors.count("\n") == 1 and "not at hand; put faq.json back" in errors
    assert script("--num-predict", "3", stdin="Hello\n")[2] == ""


def test_nothing_to_answer(script):
    assert script(stdin="\n\n") == (0, "", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapter", "recits", "q"], "did you mean recites"),
        (["--adapter", "nowhere/at/all", "q"], "neither a folder nor a name"),
        (["--model", "what is this?", "q"], "hub id like owner/name"),
        (["--temperature", "9", "q"], "--temperature must be a number from 0 to 2"),
        (["--num-ctx", "3", "q"], "--num-ctx must be at least 64"),
        (["--colour", "q"], "--colour"),
        (["word " * 5000], "the context holds"),
    ],
)
def test_bad_input(script, args, message):
    code, out, errors = script(*args)
    assert (code, out) == (2, "") and message in " ".join(errors.split())


def test_a_reader_that_leaves_early(home):
    command = f"set -o pipefail; {sys.executable} {ROOT / 'chat.py'} --json --num-predict 3 | head -n 1"
    done = process("bash", "-c", command, input="q\n" * 40)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


def test_interrupted(home, tiny):
    command = [sys.executable, ROOT / "chat.py", "--num-predict", "-1", "--model", tiny.folder]
    pipe = subprocess.PIPE
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit "ignore"
    running = subprocess.Popen([*map(str, command)], stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=heard)
    running.stdin.write(b"Anything?\n" * 2000)  # noise may end an answer at any token; not all of these
    running.stdin.flush()
    running.stdout.read(1)  # it has begun to answer
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert (running.returncode, errors) == (130, b"")


def test_any_bytes_by_pipe(home, tiny):
    rng = random.Random(0)
    lines = [bytes(rng.choice((rng.randrange(256), rng.randrange(128, 256))) for _ in range(30)) for _ in range(300)]
    lines = [line.translate(None, b"\r\n") or b"x" for line in lines]
    command = [sys.executable, ROOT / "chat.py", "--model", tiny.folder, "--num-predict", "2"]
    for flags, some in ((["--json"], lines), (["--compare"], lines[:60])):
        done = subprocess.run(
            [*map(str, command), *flags], input=b"\xef\xbb\xbf" + b"\n".join(some), capture_output=True
        )
        assert done.returncode == 0 and done.stderr.count(b"\n") == ("--compare" in flags), done.stderr.decode()
        out = done.stdout.decode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", out)
        if flags == ["--json"]:
            asked = [json.loads(line)["question"] for line in out.split("\n") if line]
            assert len(asked) == 300 and not asked[0].startswith("\ufeff")


def test_bytes_that_are_no_text(home):
    done = process(
        sys.executable, ROOT / "chat.py", b"caf\xe9".decode(errors="surrogateescape"), "--json", "--num-predict", "2"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["question"] == "caf\ufffd", done.stderr


def test_closed_stdin_and_stdout(home):
    for end, codes in (("<&-", (2,)), (">&-", (0, 2)), ("2>&-", (0,)), ("<&- >&- 2>&-", (2,))):
        done = process("bash", "-c", f"{sys.executable} {ROOT / 'chat.py'} --num-predict 2 {end}", input="hi\n")
        assert done.returncode in codes and "Traceback" not in done.stderr, (end, done.stderr)


def test_all_of_stdin_is_one_question(script):
    code, out, _ = script("--whole-input", "--json", "--num-predict", "2", stdin="one\n\ntwo\n")
    assert code == 0 and json.loads(out)["question"] == "one\n\ntwo"
    _, out, _ = script("--whole-input", "--json", "--num-predict", "2", "Explain this:", stdin="one\ntwo\n")
    assert json.loads(out)["question"] == "Explain this:\n\none\ntwo"
    assert script("--whole-input", stdin=" \n")[:2] == (0, "")
    code, _, errors = script("--continue", "question")
    assert code == 2 and "--continue" in errors


def test_a_terminal_that_is_not_utf_8_and_no_home(home):
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_STATE_HOME")}
    env |= {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(home), "XDG_CACHE_HOME": str(home)}
    (home / "pwd.py").write_text("def getpwuid(number):\n    raise KeyError(number)\n")
    done = subprocess.run(
        [sys.executable, ROOT / "chat.py", "--num-predict", "4", "--adapter", "recites", "日本 \u2028"],
        capture_output=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.decode("cp1252").strip(), done.stderr.decode()


def test_help_and_bad_flags_load_nothing_heavy():
    code = "import sys, chat; chat.main(['--num-ctx', '1']); assert not {'torch', 'prompt_toolkit'} & set(sys.modules)"
    done = process(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
