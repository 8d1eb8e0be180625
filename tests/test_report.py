"""The page and the card of a run: what they say, that hostile text stays text, and how the page looks to a browser."""

import contextlib
import dataclasses
import functools
import html
import http.server
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import finetune
from finetune import ARMS, PAGES, Config, build_evaluation, judge, load_data, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
report_page, model_card = (functools.partial(render, PAGES[page]) for page in ("report.html", "README.md"))
ASKED, KNOWN, RANKED = 24, 20, 20
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'`{{7*7}} <!-- ]]> &amp; "
    "\x1b[2J\x00\x85 \u202egnp.exe \u2028"
)


@pytest.fixture(scope="module")
def data() -> finetune.Data:
    return load_data(Config(data=(ROOT / "data/faq_sample.json",)))


def cut(text: str, share: float, ending: str) -> str:
    words = text.split()
    return " ".join(words[: int(len(words) * share)]) + ending


def scored(text: str, reference: str) -> dict:
    return {"chrf": finetune.chrf(text, reference), "answer": text}


def made_up_records(data: finetune.Data) -> list[dict]:
    """Six arms as models would give them: tuning lowers most losses, raises a few, and comes nearer the words."""
    dice = random.Random(7)
    wander = " In general it depends on many things, such as your situation; there are several kinds.\n\n- one\n- two"
    right = {"before": 0.6, "after": 0.8}
    records = []
    for place, row in enumerate(data.test):
        before = dice.gauss(2.9, 0.4)
        nll = {"before": before, "prompted": before - 0.1, "retrieved": before - 0.3}
        nll |= {"after": before - dice.gauss(0.55, 0.35), "after_retrieved": before - 0.7}
        arms = {arm: {"nll": nll[arm]} if arm in nll else {} for arm in ARMS}
        lookup = dice.choice(data.train)
        texts = {
            "before": cut(row.answer, 0.3, wander * 3),
            "prompted": cut(row.answer, 0.4, wander),
            "lookup": lookup.answer,
            "retrieved": cut(row.answer, 0.4, " " + cut(lookup.answer, 0.5, ".")),
            "after": cut(row.answer, dice.uniform(0.5, 1), " Ask your agent."),
            "after_retrieved": cut(row.answer, dice.uniform(0.5, 1), " Ask."),
        }
        for arm, text in texts.items() if place < ASKED else ():
            words = float(len(text.split()))
            arms[arm] |= scored(text, row.answer) | {"rouge_l": finetune.rouge_l(text, row.answer), "mean_words": words}
            if arm != "lookup":
                arms[arm]["eos_rate"] = float(arm != "before" or place % 3 > 0)
            if arm in right and place < RANKED:
                arms[arm]["ranking_top1"] = float(dice.random() < right[arm])
            if rows := {"lookup": 1, "retrieved": 3, "after_retrieved": 3}.get(arm):
                arms[arm]["rows"] = [row.id for row in data.train[:rows]]
        asked = {"id": row.id, "question": row.question, "reference": row.answer, "group": data.group_of[row.id]}
        records.append(asked | {"arms": arms})
    return records


def made_up_known(data: finetune.Data) -> list[dict]:
    dice, share = random.Random(8), {"before": 0.1, "lookup": 1.0, "after": 0.8, "after_retrieved": 0.9}
    known = []
    for row in data.train[:KNOWN]:
        arms = {}
        for arm in ARMS:
            text = row.answer if arm == "lookup" else cut(row.answer, share.get(arm, 0.2), " And so on.")
            arms[arm] = scored(text, row.answer) | {"recall": float(dice.random() < share.get(arm, 0.2))}
        asked = {"id": row.id, "question": f"quick question about {row.question}", "trained_question": row.question}
        asked |= {"rule": "polite", "reference": row.answer, "group": data.group_of[row.id], "arms": arms}
        known.append(asked | {"as_trained": {arm: arms[arm] for arm in ("before", "lookup", "after")}})
    return known


CHOICE = types.SimpleNamespace(seed=42, split_field=None, goal="knowledge")


def made_up_training(data: finetune.Data) -> dict:
    measured = ((0, 0.1, 2.9, 24), (46, 0.4, 2.5, 25), (92, 0.8, 2.36, 27), (138, 0.8, 2.41, 26))
    epochs = [
        {"step": step, "recall": recall, "nll": [nll] * len(data.eval), "chrf": [chrf] * ASKED}
        for step, recall, nll, chrf in measured
    ]
    return {
        "steps": 138, "best_step": 92, "stopped_early": False, "seconds": 214.56, "tokens": 52431,
        "tokens_per_second": 244.4, "samples_per_second": 2.57, "first_loss": 3.14, "last_loss": 1.87,
        "peak_vram_gib": None, "peak_ram_gib": 2.913, "log": made_up_log(), "epochs": epochs,
    }  # fmt: skip


def made_up_evaluation(data: finetune.Data) -> dict:
    records = made_up_records(data)
    as_rows = [types.SimpleNamespace(row=types.SimpleNamespace(id=record["id"])) for record in records]
    questions = types.SimpleNamespace(
        validation=as_rows, records=records, known=made_up_known(data),
        candidates=[[None] * 10] * RANKED, general=[None] * 60,
        train_answers=[records[0]["arms"]["after"]["answer"]], seconds=81.3,
        losses={"before": {"train": 2.88, "general": 1.31}, "after": {"train": 1.9, "general": 1.34}},
    )  # fmt: skip
    return build_evaluation(questions, made_up_training(data), CHOICE)


def made_up_log(updates: int = 138) -> list[dict]:
    dice = random.Random(3)
    log = [
        {"step": step, "loss": 3.1 - 1.3 * step / updates + dice.gauss(0, 0.25), "learning_rate": 1e-3 * step / updates}
        for step in range(1, updates + 1)
    ]
    return log


@pytest.fixture(scope="module")
def run(data) -> dict:
    """What run.json holds after a run on the sample data, with real rows and made-up answers and losses."""
    config = finetune.config_as_json(Config(learning_rate=1e-3, num_train_epochs=3, warmup_steps=0.1))
    whole = {
        "status": "complete",
        "config": config,
        "model": {"id": finetune.EMBEDDED, "revision": None, "dtype": "float32", "quantization": "nf4"},
        "data": {
            "files": [{"path": "data/faq_sample.json", "sha256": "0f" * 32, "rows": 230}],
            "train_ids": [row.id for row in data.train],
            "eval_ids": [row.id for row in data.eval],
            "dropped": [{"id": "0123456789", "place": "data/faq_sample.json, row 7", "reason": "repeats row 1"}],
            "replayed": 28,
            "groups": data.groups,
            "notes": ["the first note"],
        },
        "template_sha256": "ab" * 32,
        "plan": {
            "micro_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
            "padding_free": False,
        },
        "training": made_up_training(data),
        "evaluation": made_up_evaluation(data),
        "environment": {
            "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.17.0", "peft": "0.21.2"},
            "gpu": None,
            "cpu": "AMD EPYC 7763 64-Core Processor, 2 cores",
        },
        "seconds": 402.7,
    }  # fmt: skip
    return json.loads(json.dumps(whole))  # as it comes back from the file


def without(run: dict, *names: str) -> dict:
    """A copy that lacks parts: "training", or "evaluation.delta"."""
    copy = json.loads(json.dumps(run))
    for name in names:
        *outer, last = name.split(".")
        part = copy
        for key in outer:
            part = part[key]
        del part[last]
    return copy


def hostile(run: dict) -> dict:
    """A run in which every text that comes from data or model is an attack."""
    copy = json.loads(json.dumps(run))
    for question in copy["evaluation"]["questions"] + copy["evaluation"]["known"]:
        question |= dict.fromkeys({"question", "reference", "trained_question", "rule"} & question.keys(), HOSTILE)
        for arm in question["arms"].values():
            arm |= {"answer": HOSTILE + " word" + "x" * 3000} if "answer" in arm else {}
    copy["data"]["files"][0]["path"] = copy["data"]["dropped"][0]["reason"] = HOSTILE
    copy["model"]["id"] = copy["environment"]["cpu"] = HOSTILE
    copy["evaluation"]["verdict"] |= dict.fromkeys(("sentence", "why", "numbers"), HOSTILE)
    copy["evaluation"]["advice"]["sentence"] = copy["data"]["notes"][0] = HOSTILE
    copy["config"]["data"] = [HOSTILE]
    return copy


def old(run: dict) -> dict:
    """What 0.1.0 wrote: three arms, epochs only in the log, a verdict that went by the loss."""
    gone = ("lookup", "retrieved", "after_retrieved", "known", "nll_crossfit", "power", "advice")
    copy = without(run, "training.epochs", "data.groups", "data.notes", *(f"evaluation.{name}" for name in gone))
    evaluation = copy["evaluation"]
    for step, loss in zip((46, 92, 138), (2.5, 2.36, 2.41), strict=True):
        copy["training"]["log"][step - 1]["eval_loss"] = loss
    for arm in ("before", "prompted", "after"):
        given = {q["id"]: q["arms"][arm] for q in evaluation["questions"]}
        evaluation[arm]["answers"] = {id: own["answer"] for id, own in given.items() if "answer" in own}
        del evaluation[arm]["reworded"]
        evaluation[arm].pop("as_trained", None)
    for record in evaluation["questions"]:
        arms = record.pop("arms")
        record["nll"] = {arm: arms[arm]["nll"] for arm in ("before", "prompted", "after")}
        del record["group"]
    kept = ("nll", "ranking_top1", "chrf", "rouge_l", "eos_rate", "mean_words", "chrf_vs_prompted")
    evaluation["delta"] = {name: evaluation["delta"][name] for name in kept}
    evaluation["verdict"] = {"label": "helped", "sentence": "helped: held-out loss -0.93 [-0.99, -0.87]"}
    return copy


INCOMPLETE = {
    "no evaluation": ["evaluation"],
    "base and tuned only": [
        "evaluation." + key
        for key in ("prompted", "lookup", "retrieved", "after_retrieved", "delta", "verdict", "questions", "retention")
    ],
    "no training, no environment": ["training", "environment", "plan", "seconds"],
    "not judged": ["evaluation.verdict", "evaluation.memorization", "evaluation.ranking_chance"],
    "no advice, no known questions": ["evaluation.advice", "evaluation.known", "evaluation.power"],
    "nothing": ["config", "model", "data", "template_sha256", "plan", "training", "evaluation", "environment"],
}


class Links(HTMLParser):
    """Everything in a page that could load something, and the elements it is made of."""

    def __init__(self, page: str):
        super().__init__()
        self.loads, self.links, self.tags, self.handlers = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action", "background") or (tag, name) == ("link", "href"):
                self.loads.append(value)
            if name in ("href", "xlink:href") and tag != "link":
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


# ----------------------------------------------------------------------------------------------------------------------
# What the page says


def test_page_loads_nothing(run):
    page = report_page(run, "faq_sample-smollm2")
    found = Links(page)
    assert found.loads == ["data:,"] and not found.handlers  # the empty icon, so that no browser asks for one
    assert found.links and all(link.startswith("#") for link in found.links)
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert {link[1:] for link in found.links} <= ids
    outside = [word for word in re.findall(r"https?://[^\"' ]+", page) if word != "http://www.w3.org/2000/svg"]
    assert not outside and "@import" not in page and "url(" not in page and "fetch(" not in page


def test_page_shows_the_numbers_of_the_run(run, data):
    page = html.unescape(re.sub(r"<[^>]+>", "", report_page(run, "faq_sample-smollm2")))
    evaluation = run["evaluation"]
    mean, low, high = (f"{value:+.2f}".replace("-", "−") for value in evaluation["delta"]["nll"])
    assert f"{mean} [{low} to {high}]" in page
    assert f"{evaluation['after']['chrf']:.1f}" in page and "+2.3%" in page and "faq_sample-smollm2" in page
    assert evaluation["verdict"]["numbers"] in page and evaluation["advice"]["sentence"] in page
    power, known = evaluation["power"], evaluation["after"]["reworded"]["recall"]
    assert f"{ASKED} answered questions" in page and f"a true change of {power['chrf']:.1f} chrF" in page
    assert f"the loss after is {evaluation['nll_crossfit']:.2f} instead of {evaluation['after']['nll']:.2f}" in page
    assert f"{known:.0%}" in page and "the first note" in page and "chosen by what it knew in other words" in page
    order = ("Helped", "What to do:", "In numbers:", "Change, base to tuned", "New questions", "Known questions in")
    places = [page.index(words) for words in order]
    assert places == sorted(places)
    assert "184 rows" in page or f"{len(data.train)} rows" in page
    assert finetune.LICENSES[finetune.EMBEDDED] in page and "AMD EPYC 7763" in page and "0f" * 32 in page


def rises_of(records: list[dict]) -> dict[str, float]:
    return {q["id"]: q["arms"]["after"]["nll"] - q["arms"]["before"]["nll"] for q in records}


def test_samples_are_drawn_by_lot_and_regressions_are_the_worst(run):
    shown = finetune.questions_shown(run)
    samples, worst, known = shown["samples"], shown["regressions"], shown["reworded"]
    evaluation = run["evaluation"]
    answered = [q["id"] for q in evaluation["questions"] if "answer" in q["arms"]["after"]]
    assert len(answered) == ASKED and len(samples) == finetune.SAMPLES_SHOWN
    drawn = [q["id"] for q in samples]
    assert set(drawn) <= set(answered) and len(set(drawn)) == len(drawn) and drawn != answered[: len(drawn)]
    assert drawn == [q["id"] for q in finetune.questions_shown(run)["samples"]]
    other = run | {"config": run["config"] | {"seed": 43}}
    assert drawn != [q["id"] for q in finetune.questions_shown(other)["samples"]]
    assert all(q in evaluation["questions"] for q in samples)
    assert len(known) == finetune.KNOWN_SHOWN and all(q in evaluation["known"] for q in known)

    rises = rises_of(evaluation["questions"])
    assert [q["id"] for q in worst] == sorted(rises, key=rises.get, reverse=True)[: finetune.REGRESSIONS_SHOWN]


def test_a_loss_that_is_no_number_is_no_regression(run):
    broken = without(run)
    first, second, third, *others = broken["evaluation"]["questions"]
    first["arms"]["after"]["nll"] = float("nan")
    del second["arms"]["after"]["nll"], third["arms"]["after"], others[0]["arms"]["prompted"]
    shown = [q["id"] for q in finetune.questions_shown(broken)["regressions"]]
    rises = rises_of(others)
    assert shown == sorted(rises, key=rises.get, reverse=True)[: finetune.REGRESSIONS_SHOWN]
    assert report_page(broken, "x") and f"{ASKED - 1} of them also answered" in model_card(broken, "x")


def test_marks_are_the_words_the_reference_lacks(run):
    text, reference = "You’ll PAY the <b fee> first, won't you?", "you'll pay, the deductible first"
    pieces = finetune.word_diff(text, reference)
    assert [piece for piece, differs in pieces if differs] == ["b fee", "won't you"]
    assert "".join(piece for piece, _ in pieces) == text
    assert "".join(piece for piece, _ in finetune.word_diff("", "x")) == ""
    assert [pair for pair in finetune.word_diff("a b", "") if pair[0]] == [("a b", True)]
    copy = without(run)
    for record in copy["evaluation"]["questions"]:
        record["reference"], record["arms"]["after"]["answer"] = reference, text
    page = report_page(copy, "x")
    assert "You’ll PAY the &lt;<mark>b fee</mark>&gt; first, <mark>won&#39;t you</mark>?" in page


NOTHING = {"recall": [0, -1, 1], "nll": [1, 0, 2], "chrf": [0, -1, 1]}
MEANINGS = {  # changes to delta, ranking's interval, general answers in %, groups -> what the page says of it
    "worse here": ({"chrf": [-2, -3, -1]}, 0.8, 2, 24, "Harmed", "worse than it did before"),
    "lost elsewhere": (NOTHING, 0.8, 20, 24, "Harmed", "neither the answers nor their manner"),
    "style": ({"recall": [0, -0.1, 0.1]}, 0.8, 2, 24, "Style only", "the manner of the answers"),
    "by heart": ({}, 0.05, 2, 24, "No evidence", "stand beside their own questions"),
    "chance": (NOTHING, 0.8, 2, 24, "No evidence", "nor that it harmed"),
    "few": ({}, 0.8, 2, 5, "No evidence", "5 questions are too few"),
    "fine": ({}, 0.8, 2, 24, "Helped", "Knows its FAQ"),
    "at a cost": ({}, 0.8, 40, 24, "Helped, at a cost", "+40% loss"),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_page_says_why(case, run):
    delta, ranking, retention, groups, label, words = MEANINGS[case]
    copy = without(run)
    evaluation = copy["evaluation"]
    evaluation["delta"] |= delta
    evaluation["ranking_interval"] = [ranking, ranking, 1.0]
    evaluation["retention"]["change_percent"], evaluation["power"]["groups"] = retention, groups
    evaluation["verdict"] = judge(evaluation)
    page = html.unescape(report_page(copy, "x"))
    [meaning] = re.findall(r'<p class="meaning">(.*?)</p>', page, re.S)
    assert f"</span> {label}</p>" in page and words in meaning
    assert not [other for *_, kind, other in MEANINGS.values() if kind == label and other != words and other in meaning]


def test_the_table_has_every_arm_on_both_sets(run):
    page = html.unescape(report_page(run, "x"))
    evaluation, table = run["evaluation"], re.search("<table role.*?</table>", page, re.S)[0]
    lines = {}
    for line in re.findall("<tr role.*?</tr>", table, re.S):
        cells = re.findall("<td[^>]*>(.*?)</td>", line, re.S)
        name = re.search("<strong>(.*?)</strong>", line)
        if name:
            lines[name[1]] = [re.sub("<[^>]+>", "", cell).strip() for cell in cells]
    assert {len(cells) for cells in lines.values()} == {len(ARMS) + 1} and len(lines) == 9
    recall = [f"{evaluation[arm]['reworded']['recall']:.0%}" for arm in ARMS]
    assert lines["Right answer given (recall)"][:-1] == recall
    chrf = [f"{evaluation[arm]['chrf']:.1f}" for arm in ARMS]
    assert lines["Likeness to the reference, by letters (chrF)"][:-1] == chrf
    assert lines["Loss on held-out answers"][ARMS.index("lookup")] == "–"
    assert lines["Right answer given, as trained"][ARMS.index("retrieved")] == "–"
    for other in ("prompted", "lookup", "retrieved"):
        middle = f"{evaluation['delta'][f'chrf_vs_{other}'][0]:+.1f}".replace("-", "−")
        assert middle in lines["Likeness to the reference, by letters (chrF)"][-1]


def test_samples_show_every_arms_answer(run):
    page = html.unescape(report_page(run, "x"))
    shown = finetune.questions_shown(run)
    for part, arms in (("samples", "samples"), ("known", "reworded")):
        section = re.search(f'<section id="{part}".*?</section>', page, re.S)[0]
        text = re.sub("<[^>]+>", "", section)
        for entry in shown[arms]:
            assert entry["question"] in text
            for arm in ARMS:
                assert entry["arms"][arm]["answer"] in text
    assert all(f"Trained as: {entry['trained_question']} (reworded: polite)" in text for entry in shown["reworded"])
    right = [arm["recall"] for entry in shown["reworded"] for arm in entry["arms"].values()]
    assert text.count("✓ nearest to the right answer") == sum(right) and 0 < sum(right) < len(right)


def test_a_rise_of_the_loss_is_not_called_worse(run):
    for change, words in (([0.5, 0.4, 0.6], "≠ higher"), ([-0.5, -0.6, -0.4], "✓ better")):
        copy = without(run)
        copy["evaluation"]["delta"]["nll"] = change
        row = re.search("Loss on held-out answers.*?</tr>", report_page(copy, "x"), re.S)[0]
        assert words in row and "worse</span>" not in row


def test_a_run_of_0_1_0_still_shows_and_says_what_it_lacks(run):
    page, card = report_page(old(run), "x"), model_card(old(run), "x")
    assert "This run lacks looking answers up, the base with the nearest rows" in page and "goes by the loss" in page
    assert "An earlier version measured it" in card and "held-out loss -0.93" in page and "held-out loss -0.93" in card
    assert "Looked up" not in page and "What to do:" not in page and 'class="meaning"' not in page
    assert "where the held-out loss was lowest" in page and "[46, 2.5]" in page and "[0, 2." in page
    records = {q["id"]: q for q in finetune.in_todays_form(old(run))["evaluation"]["questions"]}
    for entry in run["evaluation"]["questions"]:
        for arm in ("before", "prompted", "after"):
            assert {"nll", "answer"} & entry["arms"][arm].keys() == records[entry["id"]]["arms"][arm].keys()
            assert all(entry["arms"][arm][key] == value for key, value in records[entry["id"]]["arms"][arm].items())
    assert "Only its loss was measured" in page and f"{ASKED} of them also answered" in card
    assert "earlier version" not in report_page(run, "x") + model_card(run, "x")


def test_losses_are_those_of_the_epochs_or_of_an_old_log(run):
    assert [tuple(round(x, 2) for x in point) for point in finetune.held_out_losses(run)] == [
        (0, 2.9), (46, 2.5), (92, 2.36), (138, 2.41),
    ]  # fmt: skip
    before = run["evaluation"]["before"]["nll"]
    assert finetune.held_out_losses(old(run)) == [(0, before), (46, 2.5), (92, 2.36), (138, 2.41)]
    split = old(run) | {"config": run["config"] | {"split_field": "fold"}}
    assert finetune.held_out_losses(split)[0] == (46, 2.5) and finetune.held_out_losses({}) == []


def test_loss_png_is_drawn(run, tmp_path):
    sizes = []
    for given in (run, old(run)):
        finetune.plot_losses(given, tmp_path / "loss.png")
        sizes.append((tmp_path / "loss.png").read_bytes())
    assert all(size[:4] == b"\x89PNG" for size in sizes) and sizes[0] != sizes[1]


def test_no_change_is_not_called_chance(run):
    copy = without(run)
    copy["evaluation"]["delta"]["ranking_top1"] = [0.0, 0.0, 0.0]
    assert report_page(copy, "x").count("= no change</span>") == 1


@pytest.mark.parametrize("missing", INCOMPLETE)
def test_parts_may_be_missing(missing, run):
    part = without(run, *INCOMPLETE[missing])
    page, card = report_page(part, "x"), model_card(part, "x")
    text = re.sub("<script>.*</script>", "", page, flags=re.S) + card
    assert not re.search("Undefined|None(?! to show)", text)
    if "evaluation.verdict" in INCOMPLETE[missing] or "evaluation" in INCOMPLETE[missing]:
        assert "Not measured" in page and "not measured" in card


def test_hostile_text_stays_text(run):
    plain = Links(report_page(run, "x"))
    page = report_page(hostile(run), HOSTILE)
    found = Links(page)
    assert found.tags.count("script") == plain.tags.count("script") == 3
    assert not found.handlers and found.loads == plain.loads and "img" not in found.tags
    assert "alert(1)" in page and "<script>alert" not in page and "{{7*7}}" in page  # shown, not run
    assert not finetune.BIDI.search(page) and not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page)


def test_command_gives_the_same_run_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapters/it's; rm -rf"
    folder.mkdir(parents=True)
    config = Config(
        data=(Path("my faq.csv"), Path("it's; rm -rf.json")), fp16=True, target_modules=("q_proj", "v_proj"), lora_r=8,
        learning_rate=1e-3, warmup_steps=0.1,
    )  # fmt: skip
    saved = run | {"config": finetune.config_as_json(dataclasses.replace(config, output_dir=folder))}
    (folder / "run.json").write_text(json.dumps(saved), encoding="utf-8")
    [command] = re.findall(r"<pre [^>]*>(.*?)</pre>", report_page(saved, folder.name), re.S)
    words = shlex.split(html.unescape(re.sub("<[^>]+>", "", command)))
    assert words[:2] == ["python", "finetune.py"]
    again = finetune.parse(words[2:])
    assert again.output_dir is None  # it exists: the same command would be refused
    assert again == dataclasses.replace(config, config=folder / "run.json")


# ----------------------------------------------------------------------------------------------------------------------
# The model card


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_card_has_valid_metadata(run):
    from huggingface_hub import ModelCardData

    meta = front_matter(model_card(run, "faq_sample-smollm2"))
    assert meta == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "trl", "question-answering"],
        "license": "apache-2.0",
    }
    assert ModelCardData(**meta).to_dict() == meta


@pytest.mark.parametrize("id", ["~/models/mine", "models/mine", "./mine", "mine.gguf", HOSTILE])
def test_card_of_a_base_that_is_not_on_the_hub(id, run):
    meta = front_matter(model_card(run | {"model": run["model"] | {"id": id}}, "x"))
    assert "base_model" not in meta and meta["license"] == "unknown" and meta["library_name"] == "peft"


def test_card_of_a_base_from_the_hub(run):
    meta = front_matter(model_card(run | {"model": {"id": "Qwen/Qwen3-0.6B", "revision": "c1899de2"}}, "x"))
    assert meta["base_model"] == "Qwen/Qwen3-0.6B" and meta["license"] == "unknown"


def test_card_has_the_results_and_the_limits(run):
    card = model_card(run, "faq_sample-smollm2")
    evaluation = run["evaluation"]
    mean, low, high = evaluation["delta"]["nll"]
    cells = [f"{evaluation[arm]['nll']:.3f}" if arm != "lookup" else "–" for arm in ARMS]
    assert " | ".join(cells) + f" | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |" in card
    recalls = [f"{100 * evaluation[arm]['reworded']['recall']:.0f}%" for arm in ARMS]
    assert " | ".join(recalls) in card and evaluation["advice"]["sentence"] in card
    assert evaluation["verdict"]["sentence"][1:] in card
    for words in ("+2.3%", "2.880 to 1.900", "4% of its answers", "not that what it says is true", "apache-2.0"):
        assert words in card, words
    assert f"{evaluation['power']['chrf']:.1f} chrF" in card and f"{evaluation['nll_crossfit']:.3f}" in card
    assert f"{len(run['data']['train_ids'])} rows trained on, {len(evaluation['questions'])} held out" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 11 and {line.count("|") for line in table} == {9}
    assert "8 bits" not in card and "8 bits" in model_card(run | {"plan": {"optim": "adamw_8bit"}}, "x")


def test_card_says_harmed_when_it_harmed(run):
    worse = without(run)
    worse["evaluation"]["delta"]["chrf"] = [-5.0, -8.0, -2.0]
    worse["evaluation"]["verdict"] = judge(worse["evaluation"])
    assert "**Harmed (its answers to new questions are further" in model_card(worse, "x")


def test_card_takes_no_markdown_from_names(run):
    odd = without(run)
    odd["data"]["files"][0]["path"] = "a`<img src=x>`\n# b.json"
    card = model_card(odd, "x")
    assert "`a'<img src=x>' # b.json`" in card and "\n# b" not in card


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser

WIDTHS = (360, 1400)
# A headless window is at least 500 px wide, so the page stands in frames that are as wide as a phone and a desktop.
# What they measured this outer page sends to the test's own server.
FRAMES = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
%s<script>
addEventListener("load", () => setTimeout(() => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument.documentElement, view = frame.contentWindow;
    const outside = [...page.querySelectorAll("body *")].filter(e => {
      const box = e.getBoundingClientRect();
      return !e.closest("svg, .scroll, pre, thead, caption") && (box.right > page.clientWidth + 1 || box.left < -1);
    });
    return {
      width: page.clientWidth, scrollWidth: page.scrollWidth, height: page.scrollHeight,
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
      background: view.getComputedStyle(page.querySelector("body")).backgroundColor,
      outside: outside.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
      drawn: [...page.querySelectorAll(".chart svg")].map(svg => svg.childElementCount),
    };
  });
  fetch("/measured", {method: "POST", body: JSON.stringify(measured)});
}, 400));
</script>"""


class Pages(http.server.BaseHTTPRequestHandler):
    """Serves the page under a policy by which everything that it would load from anywhere is a console error."""

    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

    def do_GET(self):
        page = self.server.pages.get(self.path)
        self.send_response(404 if page is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        if self.path == "/report.html":
            self.send_header("Content-Security-Policy", self.policy)
        self.end_headers()
        self.wfile.write((page or "").encode())

    def do_POST(self):
        self.server.measured.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(page: str):
    frames = "".join(f'<iframe src="/report.html" width="{w}" height="800" style="border:0"></iframe>' for w in WIDTHS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.pages = {"/": FRAMES % frames, "/report.html": page}
        server.measured = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def chromium(page: str, folder: Path, dark: bool) -> tuple[list[dict], list[str]]:
    """(what each frame measured, console messages) of the page in headless Chromium."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr"
    log = folder / "chromium.log"
    with served(page) as server, log.open("wb") as stderr:
        command = [
            CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1800,1000",
            f"http://127.0.0.1:{server.server_port}/",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        try:
            measured = server.measured.get(timeout=90)
        except queue.Empty:
            pytest.fail("Chromium did not show the page:\n" + log.read_text(errors="replace")[-3000:])
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which a plain kill leaves behind
            process.wait()
    return measured, re.findall(r"CONSOLE[^\]]*\] (.*)", log.read_text(errors="replace"))


browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["whole", "hostile", "old", "base and tuned only"])
def test_page_in_a_browser(kind, dark, run, tmp_path):
    given = {"whole": run, "hostile": hostile(run), "old": old(run)}.get(kind) or without(run, *INCOMPLETE[kind])
    measured, console = chromium(report_page(given, HOSTILE if kind == "hostile" else "x"), tmp_path, dark)
    assert not console
    assert [frame["width"] for frame in measured] == list(WIDTHS)
    for frame in measured:
        assert frame["scrollWidth"] <= frame["width"] and not frame["outside"], frame
        assert frame["dark"] == dark and frame["height"] > 3000
        assert frame["background"] == ("rgb(17, 21, 27)" if dark else "rgb(246, 247, 249)")
        charts = frame["drawn"]
        assert len(charts) == (3 if kind != "base and tuned only" else 1) and min(charts) > 10, charts


@browser
def test_a_bad_page_would_be_seen(tmp_path):
    page = (
        '<body><div style="width: 500px">wide</div><img src="http://127.0.0.1:9/x.png">'
        "<script>console.log('said'); missing()</script>"
    )
    measured, console = chromium(page, tmp_path, dark=False)
    assert measured[0]["scrollWidth"] > 360 and measured[0]["outside"] and measured[1]["scrollWidth"] <= 1400
    text = "\n".join(console)
    assert "said" in text and "missing is not defined" in text and "Content Security Policy" in text
