"""The page and the card of a run: what they say, that hostile text stays text, and how the page looks to a browser."""

import contextlib
import dataclasses
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
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import finetune
from finetune import Config, EvalSet, Example, build_evaluation, judge, load_data, model_card, report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ASKED = 24
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


def made_up_records(data: finetune.Data) -> list[dict]:
    """Three arms as a model would give them: tuning lowers most losses, raises a few, and comes nearer the words."""
    dice = random.Random(7)
    wander = " In general it depends on many things, such as your situation; there are several kinds.\n\n- one\n- two"
    right = {"before": 0.6, "prompted": 0.6, "after": 0.8}
    records = []
    for place, row in enumerate(data.test):
        before = dice.gauss(2.9, 0.4)
        nll = {"before": before, "prompted": before - 0.1, "after": before - dice.gauss(0.55, 0.35)}
        arms = {arm: {"nll": value} for arm, value in nll.items()}
        texts = {
            "before": cut(row.answer, 0.3, wander * 3),
            "prompted": cut(row.answer, 0.4, wander),
            "after": cut(row.answer, dice.uniform(0.5, 1), " Ask your agent."),
        }
        for arm, text in texts.items() if place < ASKED else ():
            arms[arm] |= {
                "ranking_top1": float(dice.random() < right[arm]),
                "chrf": finetune.chrf(text, row.answer),
                "rouge_l": finetune.rouge_l(text, row.answer),
                "eos_rate": float(arm != "before" or place % 3 > 0),
                "mean_words": float(len(text.split())),
                "answer": text,
            }
        asked = {"id": row.id, "question": row.question, "reference": row.answer, "group": data.group_of[row.id]}
        records.append(asked | {"arms": arms})
    return records


def made_up_evaluation(data: finetune.Data) -> dict:
    held_out, records = [Example(row, [1, 2, 3], 1) for row in data.test], made_up_records(data)
    questions = EvalSet(
        held_out, held_out, candidates=[held_out[:10]] * ASKED, train_sample=[],
        train_answers=[records[0]["arms"]["after"]["answer"]], max_new_tokens=100, records=records,
        general=held_out[:1] * 60, seconds=81.3,
        losses={"before": {"train": 2.88, "general": 1.31}, "after": {"train": 1.9, "general": 1.34}},
    )  # fmt: skip
    return build_evaluation(questions, 42)


def made_up_log(updates: int = 138) -> list[dict]:
    dice = random.Random(3)
    log = [
        {"step": step, "loss": 3.1 - 1.3 * step / updates + dice.gauss(0, 0.25), "learning_rate": 1e-3 * step / updates}
        for step in range(1, updates + 1)
    ]
    for step, loss in zip((46, 92, 138), (2.5, 2.36, 2.41), strict=True):
        log[step - 1]["eval_loss"] = loss
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
            "notes": data.notes,
        },
        "template_sha256": "ab" * 32,
        "plan": {
            "micro_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
            "padding_free": False,
        },
        "training": {
            "steps": 138, "best_step": 92, "stopped_early": False, "seconds": 214.56, "tokens": 52431,
            "tokens_per_second": 244.4, "samples_per_second": 2.57, "first_loss": 3.14, "last_loss": 1.87,
            "peak_vram_gib": None, "peak_ram_gib": 2.913, "log": made_up_log(),
        },
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
    for question in copy["evaluation"]["questions"]:
        question["question"] = question["reference"] = HOSTILE
        for arm in question["arms"].values():
            arm |= {"answer": HOSTILE + " word" + "x" * 3000} if "answer" in arm else {}
    copy["data"]["files"][0]["path"] = copy["data"]["dropped"][0]["reason"] = HOSTILE
    copy["model"]["id"] = copy["environment"]["cpu"] = copy["evaluation"]["verdict"]["sentence"] = HOSTILE
    copy["config"]["data"] = [HOSTILE]
    return copy


INCOMPLETE = {
    "no evaluation": ["evaluation"],
    "base and tuned only": ["evaluation." + key for key in ("prompted", "delta", "verdict", "questions", "retention")],
    "no training, no environment": ["training", "environment", "plan", "seconds"],
    "not judged": ["evaluation.verdict", "evaluation.memorization", "evaluation.ranking_chance"],
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


def test_page_loads_nothing(run, data):
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
    assert evaluation["verdict"]["sentence"].partition(": ")[2] in page
    assert "184 rows" in page or f"{len(data.train)} rows" in page
    assert finetune.LICENSES[finetune.EMBEDDED] in page and "AMD EPYC 7763" in page and "0f" * 32 in page


def rises_of(records: list[dict]) -> dict[str, float]:
    return {q["id"]: q["arms"]["after"]["nll"] - q["arms"]["before"]["nll"] for q in records}


def test_samples_are_drawn_by_lot_and_regressions_are_the_worst(run):
    samples, worst = finetune.questions_shown(run)
    evaluation = run["evaluation"]
    answered = [q["id"] for q in evaluation["questions"] if "answer" in q["arms"]["after"]]
    assert len(answered) == ASKED and len(samples) == finetune.SAMPLES_SHOWN
    drawn = [q["id"] for q in samples]
    assert set(drawn) <= set(answered) and len(set(drawn)) == len(drawn) and drawn != answered[: len(drawn)]
    assert drawn == [q["id"] for q in finetune.questions_shown(run)[0]]
    other = run | {"config": run["config"] | {"seed": 43}}
    assert drawn != [q["id"] for q in finetune.questions_shown(other)[0]]
    assert all(q in evaluation["questions"] for q in samples)

    rises = rises_of(evaluation["questions"])
    assert [q["id"] for q in worst] == sorted(rises, key=rises.get, reverse=True)[: finetune.REGRESSIONS_SHOWN]


def test_a_loss_that_is_no_number_is_no_regression(run, data):
    broken = without(run)
    first, second, third, *others = broken["evaluation"]["questions"]
    first["arms"]["after"]["nll"] = float("nan")
    del second["arms"]["after"]["nll"], third["arms"]["after"], others[0]["arms"]["prompted"]
    shown = [q["id"] for q in finetune.questions_shown(broken)[1]]
    rises = rises_of(others)
    assert shown == sorted(rises, key=rises.get, reverse=True)[: finetune.REGRESSIONS_SHOWN]
    assert report_page(broken, "x") and f"{ASKED - 1} of them also answered" in model_card(broken, "x")


def test_marks_are_the_words_the_reference_lacks(run, data):
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


MEANINGS = {  # held-out loss, chrF against the prompted base, ranking, retention in % -> what the page says of it
    "lost elsewhere": ((-0.5, -0.6, -0.4), 5.0, 0.0, 60.0, "Harmed", "but lost much of what it could do elsewhere"),
    "worse here": ((0.5, 0.4, 0.6), 5.0, 0.0, 2.0, "Harmed", "finds the right answers less likely"),
    "a prompt does as well": ((-0.5, -0.6, -0.4), -1.0, 0.0, 2.0, "Style only", "told to be brief comes as close"),
    "cannot tell": ((-0.5, -0.6, -0.4), 5.0, -0.3, 2.0, "Style only", "tell right answers from wrong ones"),
    "chance": ((-0.1, -0.3, 0.1), 5.0, 0.0, 2.0, "No evidence", "may be chance"),
    "fine": ((-0.5, -0.6, -0.4), 5.0, 0.0, 2.0, "Helped", "changed little"),
    "at a cost": ((-0.5, -0.6, -0.4), 5.0, 0.0, 20.0, "Helped", "It came at a cost"),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_page_says_why(case, run, data):
    nll, chrf, ranking, retention, label, words = MEANINGS[case]
    copy = without(run)
    evaluation = copy["evaluation"]
    evaluation["delta"] |= {"nll": nll, "ranking_top1": [ranking] * 3, "chrf_vs_prompted": [chrf] * 3}
    kept = evaluation["retention"]
    kept |= {"after": kept["before"] * (1 + retention / 100), "change_percent": retention}
    evaluation["verdict"] = judge(evaluation)
    page = report_page(copy, "x")
    [meaning] = re.findall(r'<p class="meaning">(.*?)</p>', page)
    assert f"</span> {label}</p>" in page and words in meaning
    others = {other[5] for other in MEANINGS.values() if other[4] == label} - {words}
    assert not [other for other in others if other in meaning]


def test_no_change_is_not_called_chance(run, data):
    copy = without(run)
    copy["evaluation"]["delta"]["ranking_top1"] = [0.0, 0.0, 0.0]
    assert report_page(copy, "x").count("= no change</span>") == 1


@pytest.mark.parametrize("missing", INCOMPLETE)
def test_parts_may_be_missing(missing, run, data):
    part = without(run, *INCOMPLETE[missing])
    page, card = report_page(part, "x"), model_card(part, "x")
    text = re.sub("<script>.*</script>", "", page, flags=re.S) + card
    assert not re.search("Undefined|None(?! to show)", text)
    if "evaluation.verdict" in INCOMPLETE[missing] or "evaluation" in INCOMPLETE[missing]:
        assert "Not measured" in page and "not measured" in card


def test_hostile_text_stays_text(run, data):
    plain = Links(report_page(run, "x"))
    page = report_page(hostile(run), HOSTILE)
    found = Links(page)
    assert found.tags.count("script") == plain.tags.count("script") == 3
    assert not found.handlers and found.loads == plain.loads and "img" not in found.tags
    assert "alert(1)" in page and "<script>alert" not in page and "{{7*7}}" in page  # shown, not run
    assert not finetune.BIDI.search(page) and not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page)


def test_command_gives_the_same_run_again(run, data, tmp_path, monkeypatch):
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
    cells = [evaluation[arm]["nll"] for arm in ("before", "prompted", "after")]
    row = " | ".join(f"{value:.3f}" for value in cells) + f" | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |"
    assert row in card and evaluation["verdict"]["sentence"][1:] in card
    for words in ("+2.3%", "2.880 to 1.900", "4% of its answers", "not that what it says is true", "apache-2.0"):
        assert words in card, words
    assert f"{len(run['data']['train_ids'])} rows trained on, {len(evaluation['questions'])} held out" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 9 and {line.count("|") for line in table} == {6}
    assert "8 bits" not in card and "8 bits" in model_card(run | {"plan": {"optim": "adamw_8bit"}}, "x")


def test_card_says_harmed_when_it_harmed(run):
    worse = without(run)
    worse["evaluation"]["retention"] |= {"after": 6.55, "change_percent": 400.0}
    worse["evaluation"]["verdict"] = judge(worse["evaluation"])
    assert "**Harmed: " in model_card(worse, "x")


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
@pytest.mark.parametrize("kind", ["whole", "hostile", "base and tuned only"])
def test_page_in_a_browser(kind, dark, run, data, tmp_path):
    given = {"whole": run, "hostile": hostile(run)}.get(kind) or without(run, *INCOMPLETE[kind])
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
