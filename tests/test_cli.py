"""Flags, --config and --help, through the real command line."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

import finetune

BAD_FLAGS = {
    "misspelt flag": (["--learning-rat", "1e-4"], "--learning-rate"),
    "unknown choice": (["--lr-scheduler-type", "cosin"], "cosine"),
    "no number": (["--lora-r", "many"], "--lora-r"),
    "rank": (["--lora-r", "0"], "--lora-r must be at least 1"),
    "dropout": (["--lora-dropout", "1.5"], "--lora-dropout"),
    "epochs": (["--num-train-epochs", "0"], "--num-train-epochs"),
    "batch": (["--effective-batch-size", "0"], "--effective-batch-size"),
    "rate": (["--learning-rate", "5"], "--learning-rate"),
    "length": (["--max-length", "3"], "--max-length"),
    "eval fraction": (["--eval-fraction", "0.9"], "--eval-fraction"),
    "one field of two": (["--question-field", "q"], "go together"),
    "memory": (["--max-vram", "-1"], "--max-vram"),
    "push of nothing": (["--push", "x"], "--push needs --push-to-hub"),
    "push and another job": (["--push", "x", "--push-to-hub", "me/x", "--dry-run"], "goes with no other job"),
    "config file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "nothing to resume": (["--resume"], "no unfinished run"),
    "output exists": (["--output-dir", "."], "already exists"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, run, faq, tmp_path):
    flags, expected = BAD_FLAGS[case]
    done = run("--data", faq, *flags)
    assert done.returncode == 2 and expected in done.stderr + done.stdout, done.stderr
    assert "Traceback" not in done.stderr and set(tmp_path.iterdir()) == {faq}


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not
    with pytest.raises(finetune.BadInput, match="--report-to trackio: pip install trackio first"):
        finetune.parse(["--report-to", "trackio"])


def test_several_faults_are_told_at_once(run):
    done = run("--lora-r", "0", "--learning-rate", "5", "--eval-fraction", "0.9")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 3


def test_help_names_every_knob_with_its_default(run):
    done = run("--help")
    assert done.returncode == 0
    for name in (
        "--data",
        "--dry-run",
        "--lora-r",
        "--max-vram",
        "(default: 0.75)",
        "the whole job on data/faq_sample",
    ):
        assert name in done.stdout


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("learning_rate: 1e-4\nlora_r: 8\ndata: [a.json, b.json]\nfp16: true\nmax_vram: null\n")
    config = finetune.parse(["--config", str(path), "--lora-r", "32"])
    assert (config.learning_rate, config.lora_r, config.lora_alpha, config.fp16) == (1e-4, 32, 32, True)
    assert [str(p) for p in config.data] == ["a.json", "b.json"]


def test_a_runs_json_is_a_config_file(tmp_path):
    path = tmp_path / "run.json"
    values = {"learning_rate": 3e-5, "data": (finetune.Path("x.csv"),), "replay_fraction": 0.0, "seed": 0}
    saved = finetune.config_as_json(finetune.Config(**values))
    said = "a model says \x95, \x9b31m and \ud800"  # in YAML these are errors, in a terminal commands
    text = finetune.json_text({"status": "complete", "config": saved, "said": said}, indent=1)
    assert not finetune.CONTROL.search(text) and json.loads(text)["said"] == said
    path.write_text(text)
    assert finetune.parse(["--config", str(path)]) == finetune.Config(**values, config=path)
    path.write_text(json.dumps(json.loads(text) | {"said": "\x95"}, ensure_ascii=False))
    assert finetune.parse(["--config", str(path)]) == finetune.Config(**values, config=path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learnig_rate: 1", "did you mean 'learning_rate'?"),
        ("- 1", "keys and values"),
        ("a: [", "not YAML"),
        (yaml.safe_dump({"lora_r": "many"}), "--lora-r"),
    ],
)
def test_bad_config_files(content, expected, run, tmp_path):
    (tmp_path / "my.yaml").write_text(content)
    done = run("--config", "my.yaml")
    assert done.returncode == 2 and expected in done.stderr + done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["finetune.py", "chat.py"])
def test_version_is_the_changelogs_and_needs_no_torch(script, tmp_path):
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [version, *_] = re.findall(r"(?m)^## (\d+\.\d+\.\d+)", changes)
    for name in ("torch", "transformers", "unsloth"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('imported')")
    command, env = [sys.executable, str(ROOT / script), "--version"], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{script} {version}\n", "")


@pytest.mark.parametrize("script", ["finetune.py", "chat.py"])
def test_uv_installs_what_the_requirements_say(script):
    """The block in the script, found as PEP 723 finds it, names what requirements.txt names."""
    text = (ROOT / script).read_text(encoding="utf-8")
    [block] = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    lines = (line[2:] if line.startswith("# ") else line[1:] for line in block["content"].splitlines(keepends=True))
    metadata = tomllib.loads("".join(lines))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.partition(" #")[0].strip() for line in lines if line and not line.startswith("#")]
    assert block["type"] == "script" and metadata["dependencies"] == wanted and len(wanted) > 20
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]  # py311
    assert metadata["requires-python"].replace(".", "") == oldest.replace("py", ">=")
