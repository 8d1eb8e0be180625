"""The human verdict: `chat.py --review` in a terminal and in a pipe, the page's blind mode, and what becomes of it."""

import contextlib
import html
import itertools
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_chat_terminal import CTRL_C, CTRL_D, Terminal

import chat
import finetune

ARMS = ["before", "prompted", "retrieved", "after"]
NAMES = {
    "before": "base",
    "prompted": "base told to be brief",
    "retrieved": "base with looked-up rows",
    "after": "tuned",
}
HOSTILE = "\x1b[2J\x1b]0;mine\x07</script><script>window.owned = 1</script><img src=x onerror=alert(1)> \u202e{{7*7}} `"
ALIKE = 5  # the question to which base and prompted base gave one answer


def made_up_run(questions: int = 20) -> dict:
    """A finished run by hand; each answer names its arm, so that a test can vote for one."""
    records = []
    for n in range(questions):
        arms = {arm: {"nll": 1.5, "answer": f"Answer {n} of <{arm}>. " + "Some words. " * n} for arm in ARMS}
        asked = {"id": f"{n:010x}", "question": f"Question number {n}?", "reference": f"The truth about {n}."}
        records.append(asked | {"group": n // 2 if n < 8 else n, "arms": arms})
    records[ALIKE]["arms"]["prompted"]["answer"] = " " + records[ALIKE]["arms"]["before"]["answer"]
    unanswered = {"id": "f" * 10, "question": "Not asked?", "reference": "-", "group": 99}
    records.append(unanswered | {"arms": {arm: {"nll": 1.0} for arm in ("before", "after")}})
    return {"status": "complete", "config": {"seed": 42}, "evaluation": {"questions": records}}


def made_up_adapter(folder: Path, run: dict, name: str = "mine") -> Path:
    adapter = folder / "adapters" / name
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # no tensor
    (adapter / "run.json").write_text(json.dumps(run))
    return adapter


@pytest.fixture
def adapter(tmp_path) -> Path:
    return made_up_adapter(tmp_path, made_up_run())


def piped(adapter: Path, keys: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "chat.py"), "--review", adapter.name, *args]
    env = os.environ | {"XDG_STATE_HOME": str(adapter.parent / "state"), "COLUMNS": "100"}
    return subprocess.run(
        command, input=keys, capture_output=True, text=True, cwd=adapter.parents[1], env=env, timeout=60
    )


def review_of(adapter: Path) -> dict:
    return json.loads((adapter / "review.json").read_text())


def plain_result(review: dict, run: dict) -> tuple[dict, dict]:
    """Shares and differences as one would compute them by hand, with intervals from dice of our own."""
    groups: dict[int, list] = {}
    group_of = {record["id"]: record["group"] for record in run["evaluation"]["questions"]}
    for vote in review["votes"]:
        groups.setdefault(group_of[vote["id"]], []).append(vote["vote"])
    dice = random.Random(1)

    def share(votes: list, arm: str) -> float:
        return sum(1 / len(vote) for vote in votes if vote != "none" and arm in vote) / len(votes)

    def interval(measure) -> list[float]:
        drawn = []
        for _ in range(3000):
            sample = dice.choices(list(groups.values()), k=len(groups))
            drawn.append(measure(list(itertools.chain(*sample))))
        drawn.sort()
        return [measure([vote["vote"] for vote in review["votes"]]), drawn[75], drawn[2925]]

    shares = {arm: interval(lambda votes, arm=arm: share(votes, arm)) for arm in ARMS}
    ahead = {arm: interval(lambda votes, arm=arm: share(votes, "after") - share(votes, arm)) for arm in ARMS[:-1]}
    return shares, ahead


def check_result(adapter: Path) -> dict:
    """The numbers of review.json are those of the plain computation, and the page and the card say them."""
    review, run = review_of(adapter), json.loads((adapter / "run.json").read_text())
    result = review["result"]
    for ours, plain in zip((result["share"], result["after_minus"]), plain_result(review, run), strict=True):
        assert ours.keys() == plain.keys()
        for arm in ours:
            assert ours[arm][0] == pytest.approx(plain[arm][0])
            assert ours[arm][1:] == pytest.approx(plain[arm][1:], abs=0.06)
    votes = review["votes"]
    assert result["judged"] == len(votes) and result["none"] == sum(vote["vote"] == "none" for vote in votes)
    own, low, high = result["share"]["after"]
    others = ", ".join(f"{NAMES[arm]} {result['share'][arm][0]:.0%}" for arm in ARMS[:-1])
    sentence = f"People preferred the tuned model in {own:.0%} of {len(votes)} questions [{low:.0%}, {high:.0%}]; "
    sentence += f"{others}, none good {result['none']}"
    page = html.unescape((adapter / "report.html").read_text())
    assert sentence in page and f"**{sentence}" in (adapter / "README.md").read_text()
    assert page.index(sentence) < page.index("Should you use this fine-tuned model?")
    for arm in ARMS:
        assert f"[{result['share'][arm][1]:.0%}, {result['share'][arm][2]:.0%}]" in page
    assert stat.S_IMODE((adapter / "review.json").stat().st_mode) == 0o600
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "run.json", "review.json", "report.html", "README.md",
    }  # fmt: skip
    return review


# ----------------------------------------------------------------------------------------------------------------------
# In a terminal


def letter_of(terminal: Terminal, arm: str) -> str:
    """Under which letter the arm's answer to the question that is asked now stands on the screen."""
    lines = terminal.since("-- ").split("\n")
    row, column = next((n, line.index(f"of <{arm}>")) for n, line in enumerate(lines) if f"of <{arm}>" in line)
    letters = [line for line in lines[:row] if re.fullmatch("[a-d]( +[a-d])*", line)][-1]
    return letters[:column].split()[-1]


def number_asked(terminal: Terminal) -> int:
    return int(re.findall(r"Question number (\d+)\?", terminal.text)[-1])


def vote(terminal: Terminal, arm: str, place: int) -> int:
    """Vote for the arm, or "n", "s"; returns the number of the question."""
    terminal.wait(lambda: f"-- {place} of 20 -" in terminal.text and "Best?" in terminal.since(f"-- {place} of 20 -"))
    asked = terminal.since("-- ")
    assert not re.search("truth|tuned|told to be", asked)  # nothing may steer the vote
    number = number_asked(terminal)
    terminal.type(letter_of(terminal, arm) if arm in ARMS else arm)
    if arm != "s":
        terminal.wait(lambda: "any key: next" in terminal.since(f"-- {place} of 20 -"))
        assert f"The truth about {number}." in terminal.since("-- ") and "was tuned" in terminal.since("-- ")
    return number


def test_a_review_in_a_terminal_interrupted_gone_on_and_undone(adapter, tmp_path):
    wanted = [*["after"] * 9, *["before"] * 4, "n", "n", *["retrieved"] * 3, "prompted", "after"]
    given: dict[int, str] = {}
    terminal = Terminal(tmp_path, "--review", "mine")
    for place in range(1, 10):
        given[vote(terminal, wanted[place - 1], place)] = wanted[place - 1]
        terminal.type(" ")
    terminal.wait("-- 10 of 20 -")
    terminal.type(CTRL_C)
    terminal.wait("9 of 20 judged")
    assert terminal.leave() == 0 and len(review_of(adapter)["votes"]) == 9
    assert len(check_result(adapter)["votes"]) == 9

    terminal = Terminal(tmp_path, "--review", "mine")
    for place in range(10, 21):
        if place == 15:  # changes their mind about the last two, and about what was chosen at first
            terminal.wait("-- 15 of 20 -")
            terminal.type("u")
            wrong = vote(terminal, "after", 14)
            terminal.type("u")
            terminal.wait(lambda: terminal.text.count("-- 14 of 20 -") == 3)
            assert number_asked(terminal) == wrong
            given[vote(terminal, wanted[13], 14)] = wanted[13]
            terminal.type("x")
        given[vote(terminal, wanted[place - 1], place)] = wanted[place - 1]
        terminal.type("\x1b[A")  # any key; this one is three bytes
    terminal.wait("20 of 20 judged")
    assert terminal.leave() == 0
    review = check_result(adapter)
    votes = {int(vote["id"], 16): vote["vote"] for vote in review["votes"]}
    expected = {number: "none" if arm == "n" else [arm] for number, arm in given.items()}
    if given[ALIKE] in ("before", "prompted"):
        expected[ALIKE] = ["before", "prompted"]
    assert votes == expected and len(votes) == 20
    assert len({tuple(vote["shown"]) for vote in review["votes"]}) > 5  # the letters change from question to question
    assert [int(vote["id"], 16) for vote in review["votes"]] != list(range(20))
    assert review["version"] == 1 and review["seed"] == 42
    assert all(sorted(vote["shown"]) == sorted(ARMS) for vote in review["votes"])


@pytest.mark.parametrize("width", [36, 200])
def test_plain_and_odd_terminals(width, adapter, tmp_path):
    run = json.loads((adapter / "run.json").read_text())
    for record in run["evaluation"]["questions"]:
        record["question"] = record["reference"] = HOSTILE
        record["arms"].setdefault("after", {})["answer"] = HOSTILE
    (adapter / "run.json").write_text(json.dumps(run))
    terminal = Terminal(tmp_path, "--review", "mine", width=width, TERM="dumb")
    terminal.wait("Best?")
    terminal.type("su")  # both at once
    terminal.wait(lambda: terminal.text.count("-- 1 of 20 -") == 2)
    terminal.type("a")
    terminal.wait("any key")
    terminal.type(CTRL_D)
    terminal.wait("1 of 20")
    assert terminal.leave() == 0
    assert "\x1b" not in terminal.raw and "\x07" not in terminal.raw and "\u202e" not in terminal.raw
    assert "</script>" in "".join(terminal.lines)
    assert max(map(len, terminal.lines)) <= width and len(review_of(adapter)["votes"]) == 1
    page = (adapter / "report.html").read_text()
    assert page.count("</script>") == page.count("<script") == 3 and "<img" not in page and "\x1b" not in page


def test_the_terminal_is_left_as_it_was_found(adapter, tmp_path):
    import termios

    for end, code in (("q", 0), (signal.SIGTERM, 143), (signal.SIGINT, 0)):
        terminal = Terminal(tmp_path, "--review", "mine")
        terminal.wait("Best?")
        during = termios.tcgetattr(terminal.child.child_fd)
        assert not during[3] & termios.ICANON
        terminal.type(end) if end == "q" else terminal.child.kill(end)
        terminal.wait(lambda: termios.tcgetattr(terminal.child.child_fd)[3] & termios.ICANON)  # noqa: B023
        after = termios.tcgetattr(terminal.child.child_fd)
        assert after[3] & termios.ECHO and after[6][termios.VINTR] == b"\x03"
        assert terminal.leave() == code


def test_it_starts_at_once(adapter):
    code = "import sys, chat; chat.main(['--review', 'mine']); sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(adapter.parent / "state")}
    done = subprocess.run(
        [sys.executable, "-c", code], input="a\n", text=True, cwd=adapter.parents[1], env=env, capture_output=True
    )
    assert done.returncode == 0 and "1 of 20 judged" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# In a pipe


def letters(vote: dict) -> list[list[str]]:
    """The arms under a, b, c, d when this vote was given."""
    if vote["id"] != f"{ALIKE:010x}":
        return [[arm] for arm in vote["shown"]]
    return [["before", "prompted"] if arm == "before" else [arm] for arm in vote["shown"] if arm != "prompted"]


def test_in_a_pipe(adapter):
    done = piped(adapter, "a\n\nwhat?\nN\nu\nb\ns\nc\n")
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    review = check_result(adapter)
    assert [letters(vote).index(vote["vote"]) for vote in review["votes"]] == [0, 1, 2]
    assert "3 of 20 judged" in done.stdout and done.stdout.count("The truth about") == 4
    assert "too few to rule out chance" in done.stdout
    seen = re.findall(r"Question number (\d+)\?", done.stdout)
    skipped = seen[-3]
    assert piped(adapter, "").stdout.count(f"Question number {skipped}?") == 1  # what was skipped comes again
    assert check_result(adapter) == review

    again = piped(adapter, "\n".join("uuuuu"))
    assert again.returncode == 0 and review_of(adapter)["votes"] == []
    page = (adapter / "report.html").read_text()
    assert "Nobody has judged these answers yet" in page and "People preferred" not in page
    command = "python chat.py --review mine"
    assert command in re.sub("<.*?>", "", page) and f"`{command}`" in (adapter / "README.md").read_text()


def test_answers_that_are_the_same_share(adapter):
    run = made_up_run()
    for record in run["evaluation"]["questions"][:-1]:
        record["arms"]["retrieved"]["answer"] = record["arms"]["after"]["answer"]
        record["arms"]["prompted"]["answer"] = record["arms"]["before"]["answer"]
    (adapter / "run.json").write_text(json.dumps(run))
    done = piped(adapter, "c\nd\n" + "a\n" * 20)  # there are but two letters
    assert "Best? a b   n" in done.stdout and "20 of 20 judged" in done.stdout
    review = check_result(adapter)
    assert all(vote["vote"] in (["retrieved", "after"], ["before", "prompted"]) for vote in review["votes"])
    share = {arm: values[0] for arm, values in review["result"]["share"].items()}
    assert share["retrieved"] == share["after"] and share["before"] == share["prompted"]
    assert sum(share.values()) == pytest.approx(1) and review["result"]["after_minus"]["retrieved"] == [0, 0, 0]


def test_arms_that_a_run_lacks(adapter):
    run = made_up_run()
    for record in run["evaluation"]["questions"]:
        record["arms"].pop("retrieved", None)
    (adapter / "run.json").write_text(json.dumps(run))
    assert "Best? a b c   n" in piped(adapter, "a\n").stdout
    assert list(review_of(adapter)["result"]["share"]) == ["before", "prompted", "after"]


# ----------------------------------------------------------------------------------------------------------------------
# Votes from the page, and files that are not what they should be


def votes_file(folder: Path, count: int = 20, arm: str = "after", **fields) -> Path:
    """As the page writes it."""
    run = made_up_run()
    questions = finetune.blind_questions(run)["questions"][:count]
    votes = []
    for question in questions:
        best = next(answer["arms"] for answer in question["answers"] if arm in answer["arms"])
        votes.append({"id": question["id"], "vote": best, "shown": ARMS[::-1]})
    path = folder / "votes-mine.json"
    path.write_text(json.dumps({"version": 1, "adapter": "mine", "votes": votes} | fields))
    return path


def test_votes_are_taken_in_once_and_overwrite_nothing(adapter, tmp_path):
    assert piped(adapter, "n\nn\nn\n").returncode == 0
    first = review_of(adapter)["votes"]
    file = votes_file(tmp_path)
    done = piped(adapter, "", "--votes", str(file))
    assert done.returncode == 0 and "17 votes taken in; 3 of these" in done.stdout and "\x1b" not in done.stdout
    review = check_result(adapter)
    assert review["votes"][:3] == first and len(review["votes"]) == 20 and review["result"]["none"] == 3
    assert "preferred the tuned model in 85% of 20 questions" in done.stdout
    written = (adapter / "review.json").read_bytes()
    again = piped(adapter, "", "--votes", str(file))
    assert "0 votes taken in; 20 of these" in again.stdout and (adapter / "review.json").read_bytes() == written


BAD_REVIEWS = {
    "no JSON": ("{", "line 1"),
    "not text": (b"\xff\x00\xfe", "review.json"),
    "a list": ([], "damaged"),
    "another version": ({"version": 2, "votes": []}, "damaged"),
    "votes that are none": ({"version": 1, "seed": 42, "votes": [7]}, "damaged"),
    "another seed": ({"version": 1, "seed": 43, "votes": []}, "another run (seed"),
    "other answers": ({"version": 1, "seed": 42, "answers": "0", "votes": []}, "another run (answers"),
    "other questions": ({"version": 1, "votes": [{"id": "x", "vote": "none", "shown": ARMS}]}, "(questions"),
    "odd id": ({"version": 1, "votes": [{"id": [], "vote": "none", "shown": ARMS}]}, "(questions"),
}
ID = f"{0:010x}"
BAD_VOTES = {
    "of another adapter": ({"adapter": "other"}, "another run (adapter"),
    "odd vote": ({"votes": [{"id": ID, "vote": ["mine"], "shown": ARMS}]}, "damaged"),
    "no such answer": ({"votes": [{"id": ID, "vote": ["before", "after"], "shown": ARMS}]}, "damaged"),
    "odd letters": ({"votes": [{"id": ID, "vote": ["after"], "shown": 5}]}, "damaged"),
    "no letters": ({"votes": [{"id": ID, "vote": ["after"]}]}, "damaged"),
    "twice": ({"votes": [{"id": ID, "vote": ["after"], "shown": ARMS}] * 2}, "given twice"),
    "terminal's orders": ({"votes": [{"id": "\x1b[2J", "vote": "none", "shown": ARMS}]}, "another run (questions"),
}


@pytest.mark.parametrize("case", BAD_REVIEWS)
def test_a_review_that_is_damaged_or_of_another_run(case, adapter):
    content, words = BAD_REVIEWS[case]
    raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
    (adapter / "review.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(finetune.BadInput) as told:
        chat.open_review(str(adapter))
    message = str(told.value)
    assert words in message and "mine/review.json" in message and "move it away" in message and "\n" not in message


def test_nothing_is_overwritten(adapter):
    (adapter / "review.json").write_text("{")
    done = piped(adapter, "a\n")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert (adapter / "review.json").read_text() == "{" and not (adapter / "report.html").exists()


@pytest.mark.parametrize("case", BAD_VOTES)
def test_votes_that_are_damaged_or_of_another_run(case, adapter, tmp_path):
    fields, words = BAD_VOTES[case]
    with pytest.raises(finetune.BadInput) as told:
        chat.take_votes(chat.open_review(str(adapter)), votes_file(tmp_path, **fields))
    message = str(told.value)
    assert words in message and "votes-mine.json" in message and "report.html" in message
    assert "\x1b" not in message and "\n" not in message and not (adapter / "review.json").exists()


def test_flags_that_do_not_fit(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, words in [
        (["--votes", "x.json"], "needs --review"),
        (["--review", "mine", "What?"], "takes no question"),
        (["--review", "mime"], "did you mean mine?"),
        (["--review", "mine", "--votes", "none.json"], "none.json"),
    ]:
        with pytest.raises(finetune.BadInput, match=re.escape(words)):
            chat.run_review(chat.parse_options(args), sys.stdout)
    odd = '{"evaluation": {"questions": [{"arms": 3}]}}'
    for content, words in [("{}", "no answers"), (odd, "damaged"), ("[", "run.json"), ("[]", "damaged")]:
        (adapter / "run.json").write_text(content)
        with pytest.raises(finetune.BadInput, match=words):
            chat.open_review("mine")
    (adapter / "run.json").unlink()
    assert piped(adapter, "").returncode == 2


# ----------------------------------------------------------------------------------------------------------------------
# The page's blind mode, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)")


class Browser:
    """A page in headless Chromium, spoken to over its DevTools pipe."""

    def __init__(self, process: subprocess.Popen, to: int, back: int):
        self.process, self.to, self.back, self.buffer, self.number = process, to, back, b"", 0
        self.session, self.events = None, []

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            piece = os.read(self.back, 1 << 20)
            assert piece, "Chromium has ended"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, code: str):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code: str) -> None:
        end = time.monotonic() + 30
        while not self.js(code):
            assert time.monotonic() < end, f"waited for {code}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def look(self, width: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def problems(self) -> list[dict]:
        bad = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]


@contextlib.contextmanager
def chromium(folder: Path):
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
    (there, to), (back, here) = os.pipe(), os.pipe()
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{here}', CHROMIUM, *flags.split()]
    command.append(f"--user-data-dir={folder / 'profile'}")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(there, here), start_new_session=True, **quiet)
    os.close(there)
    os.close(here)
    page = Browser(process, to, back)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        downloads = str(folder / "downloads")
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=downloads)
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which a plain kill leaves behind
        process.wait()
        os.close(to)
        os.close(back)


PARTS = "[...document.querySelectorAll('h1, table, section, .sample')]"
VISIBLE = f"{PARTS}.filter(e => e.offsetParent && !e.closest('#judge')).length"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def text_of(page: Browser, part: str) -> str:
    return page.js(f"document.getElementById('judge-{part}').innerText")


def vote_on_page(page: Browser, arm: str) -> int:
    """Vote by key for the arm, or "n"; returns the number of the question."""
    assert page.js("document.getElementById('judge-after').hidden")
    assert "truth" not in page.js("document.body.innerText")
    assert "tuned" not in text_of(page, "answers")
    number = int(re.search(r"number (\d+)", text_of(page, "question"))[1])
    code = f"[...document.querySelectorAll('#judge-answers .answer')].findIndex(e => e.textContent.includes('<{arm}>'))"
    page.key("abcd"[page.js(code)] if arm in ARMS else arm)
    assert text_of(page, "reference") == f"The truth about {number}." and "tuned" in text_of(page, "answers")
    return number


@browser
def test_blind_mode_of_the_page(adapter, tmp_path):
    run = made_up_run()
    run["evaluation"]["questions"][0]["arms"]["before"]["answer"] += HOSTILE
    (adapter / "run.json").write_text(json.dumps(run))
    finetune.write_pages(adapter)
    page_file, head = adapter / "report.html", '<meta charset="utf-8">'
    policy = f'{head}<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page_file.write_text(page_file.read_text().replace(head, policy, 1))
    wanted = [*["after"] * 12, *["before"] * 3, *["prompted"] * 2, "n", "n", "after"]
    with chromium(tmp_path) as page:
        page.look(1400)
        page.open(page_file.as_uri())
        assert page.js(VISIBLE) > 3
        page.js("document.getElementById('judge-open').click()")
        assert page.js(VISIBLE) == 0 and text_of(page, "progress") == "1 of 20"
        given = {}
        for arm in wanted[:8]:
            given[vote_on_page(page, arm)] = arm
            page.key("x")
        page.key("s")
        assert text_of(page, "progress") == "10 of 20"
        page.key("u")  # the skip
        page.key("u")  # the eighth vote
        assert text_of(page, "progress") == "8 of 20"
        given[vote_on_page(page, "n")] = "n"
        page.key("u")
        given[vote_on_page(page, wanted[7])] = wanted[7]
        shown = text_of(page, "question")
        page.open(page_file.as_uri())  # as a reload
        page.js("document.getElementById('judge-open').click()")
        assert text_of(page, "progress") == "9 of 20" and text_of(page, "question") != shown
        for arm in wanted[8:]:
            given[vote_on_page(page, arm)] = arm
            page.js("document.getElementById('judge-next').click()")
        assert text_of(page, "progress") == "20 of 20 judged"
        page.js("document.getElementById('judge-download').click()")
        file = tmp_path / "downloads/votes-mine.json"
        for _ in range(200):
            time.sleep(0.05)
            if file.exists() and file.stat().st_size:
                break
        page.key("q")
        assert page.js(VISIBLE) > 3 and not page.js("window.owned") and not page.problems()
    saved = json.loads(file.read_text())
    assert saved["version"] == 1 and saved["adapter"] == "mine" and len(saved["votes"]) == 20
    done = piped(adapter, "", "--votes", str(file))
    assert done.returncode == 0 and "20 votes taken in; 0 of these" in done.stdout, done.stderr
    review = check_result(adapter)
    expected = {number: "none" if arm == "n" else [arm] for number, arm in given.items()}
    if given[ALIKE] in ("before", "prompted"):
        expected[ALIKE] = ["before", "prompted"]
    assert {int(vote["id"], 16): vote["vote"] for vote in review["votes"]} == expected
    assert len({tuple(vote["shown"]) for vote in review["votes"]}) > 5


@browser
def test_blind_mode_fits_phone_and_desktop(adapter, tmp_path):
    run = made_up_run()
    for record in run["evaluation"]["questions"][:-1]:
        record["question"] = HOSTILE + "x" * 300
        for arm in record["arms"].values():
            arm["answer"] += HOSTILE + "word" * 200
    (adapter / "run.json").write_text(json.dumps(run))
    assert piped(adapter, "a\nb\n").returncode == 0
    with chromium(tmp_path) as page:
        for width, dark in itertools.product((360, 1400), (False, True)):
            page.look(width, dark)
            page.open((adapter / "report.html").as_uri())
            assert page.js(OVERFLOW) == 0
            page.js("document.getElementById('judge-open').click()")
            assert page.js(OVERFLOW) == 0
            page.key("a")
            assert page.js(OVERFLOW) == 0 and page.js("document.querySelector('.picked h4').innerText")
            assert not page.js("window.owned") and not page.problems()


@browser
def test_blind_mode_where_the_browser_keeps_nothing(adapter, tmp_path):
    finetune.write_pages(adapter)
    with chromium(tmp_path) as page:
        refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no') }})"
        page.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
        page.open((adapter / "report.html").as_uri())
        page.js("document.getElementById('judge-open').click()")
        vote_on_page(page, "after")
        assert "download them before" in text_of(page, "kept") and not page.problems()
