"""More than one GPU: torchrun starts two processes of the real program here, which talk over gloo on the CPU.

Whatever differs between one process and two is rounding: the rows of an update are the same, and so is what is learned.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

import finetune

# Without LoRA+, which lets rounding grow from 1e-6 to 2e-4 in 400 updates of a model of random numbers.
FLAGS = "--num-train-epochs 40 --loraplus-lr-ratio 1 --lora-r 4 --eval-questions 4 --max-new-tokens 8"
CLOSE = 1e-4  # of losses, in nats a token


@pytest.fixture
def start(tiny_model, faq, tmp_path):
    """start(processes, "--flag", ...) -> the running program, its output in files out.txt and err.txt."""
    started = []

    def call(processes: int, *flags, **variables) -> subprocess.Popen:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*(torchrun if processes > 1 else [sys.executable]), ROOT / "finetune.py", "--model", tiny_model]
        files = {name: (tmp_path / f"{name[3:]}.txt").open("w") for name in ("stdout", "stderr")}
        env = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"} | variables
        process = subprocess.Popen([*command, "--data", faq, *FLAGS.split(), *flags], cwd=tmp_path, env=env, **files)
        started.append(process)
        return process

    yield call
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """The same run in one process, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    rows = json.loads((ROOT / "data/faq_sample.json").read_text(encoding="utf-8"))[:40]
    (folder / "faq.json").write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, ROOT / "finetune.py", "--model", tiny_model, "--data", "faq.json", *FLAGS.split()]
    subprocess.run([*command, "--output-dir", "adapter"], cwd=folder, check=True, capture_output=True)
    return folder / "adapter"


def printed(folder: Path) -> tuple[str, list[str]]:
    """What was on the screen, and our own messages on stderr; torchrun adds its report of a failure there."""
    err = (folder / "err.txt").read_text()
    assert "KeyboardInterrupt" not in err
    return (folder / "out.txt").read_text(), re.findall(r"^(?:rank \d: )?(?:finetune\.py: .*|Interrupted.*)", err, re.M)


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    return {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}


def wait_for_checkpoint(partial: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(partial.glob("checkpoint-*/SHA256SUMS")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None and list(partial.glob("checkpoint-*/SHA256SUMS"))


def assert_equal_runs(folder: Path, whole: Path) -> None:
    run, other = (json.loads((path / "run.json").read_text()) for path in (folder, whole))
    losses, others = ([entry["loss"] for entry in each["training"]["log"]] for each in (run, other))
    assert len(losses) > 300 and losses == pytest.approx(others, abs=CLOSE)
    for check, same in zip(run["training"]["epochs"], other["training"]["epochs"], strict=True):
        assert check["step"] == same["step"] and check["nll"] == pytest.approx(same["nll"], abs=CLOSE)
    for question, same in zip(run["evaluation"]["questions"], other["evaluation"]["questions"], strict=True):
        for arm in ("before", "after"):
            assert question["arms"][arm]["nll"] == pytest.approx(same["arms"][arm]["nll"], abs=CLOSE)
    adapter, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, whole))
    assert all(abs(adapter[name] - expected[name]).max() < 1e-3 for name in expected)


def test_two_processes_train_what_one_does(start, whole, tmp_path):
    process = start(2, "--output-dir", "adapter")
    assert process.wait(300) == 0
    assert_equal_runs(tmp_path / "adapter", whole)
    out, messages = printed(tmp_path)
    assert out.count("\nPlan ") == out.count("\nVerdict ") == 1 and not messages
    assert "an update is 2 rows in one forward, on each of 2 processes" in out
    assert not (tmp_path / "adapter.partial").exists()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {path.name for path in whole.iterdir()}

    process = start(2, "--evaluate", "adapter")
    assert process.wait(300) == 0
    measured = printed(tmp_path)[0]
    table = re.findall(r"^ loss .*$", out, re.M)
    assert table and table == re.findall(r"^ loss .*$", measured, re.M)


def test_a_killed_process_ends_the_other_and_one_goes_on_alone(start, whole, tmp_path):
    process = start(2, "--output-dir", "adapter")
    wait_for_checkpoint(tmp_path / "adapter.partial", process)
    ranks_of(process)[1].kill()
    process.wait(30)
    [message] = printed(tmp_path)[1]
    assert message.startswith(finetune.LOST_RANK)
    assert start(1, "--output-dir", "adapter", "--resume").wait(300) == 0
    assert "processes was 2, is 1" in printed(tmp_path)[0]
    assert_equal_runs(tmp_path / "adapter", whole)


@pytest.mark.parametrize("to", ["torchrun", "rank 1"])
def test_a_run_of_one_process_goes_on_in_two_which_a_signal_ends_together(start, whole, tmp_path, to):
    partial = tmp_path / "adapter.partial"
    first = start(1, "--output-dir", "adapter")
    wait_for_checkpoint(partial, first)
    first.terminate()
    assert first.wait(60) == 128 + signal.SIGTERM

    begun = finetune.step_of(finetune.last_checkpoint(partial))
    process = start(2, "--output-dir", "adapter", "--resume")
    deadline = time.monotonic() + 120
    while "Training" not in printed(tmp_path)[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    (ranks_of(process)[1] if to == "rank 1" else process).send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    out, messages = printed(tmp_path)
    assert len(messages) == 1 and messages[0].startswith("Interrupted")
    assert "processes was 1, is 2" in out
    assert finetune.step_of(finetune.last_checkpoint(partial)) > begun
    assert not finetune.damaged(finetune.last_checkpoint(partial))

    assert start(2, "--output-dir", "adapter", "--resume").wait(300) == 0
    assert_equal_runs(tmp_path / "adapter", whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--lora-r", "0"], "--lora-r must be at least 1"),
        (["--effective-batch-size", "3"], "to 2 processes; take --effective-batch-size 4, or fewer of them"),
        (["--target-modules", "no_proj"], "--target-modules"),
        (["--export", "adapter"], "start them without torchrun"),
    ],
)
def test_bad_input_is_told_once(start, tmp_path, flags, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"weight": np.zeros(1)}, tmp_path / "adapter/adapter_model.safetensors")
    process = start(2, *flags)
    assert process.wait(120) == 1  # torchrun's own; it tells that of the process
    _, messages = printed(tmp_path)
    assert len(messages) == 1 and message in messages[0] and not messages[0].startswith("rank")
    assert re.search(r"exitcode *: 2\b", (tmp_path / "err.txt").read_text())
    assert not (tmp_path / "adapters").exists()


def test_a_variable_of_that_name_alone_means_nothing(run, faq):
    done = run("--data", faq, "--dry-run", RANK="1", WORLD_SIZE="gold")
    assert done.returncode == 0 and "Nothing was written" in done.stdout


def test_help_and_unknown_flags_are_shown_once(start, tmp_path):
    assert start(2, "--help").wait(120) == 0
    assert printed(tmp_path)[0].count("--lora-dropout") == 1
    assert start(2, "--no-such-flag").wait(120) == 1
    assert (tmp_path / "err.txt").read_text().count("--no-such-flag") == 1


def test_not_improved_ends_with_all_saved(start, tmp_path):
    """torchrun ends all ranks when one fails, and this is a failure to it."""
    process = start(2, "--max-steps", "2", "--output-dir", "adapter", "--require-improvement")
    assert process.wait(120) == 1 and re.search(r"exitcode *: 3\b", (tmp_path / "err.txt").read_text())
    assert (tmp_path / "adapter/run.json").is_file() and "\nSaved " in printed(tmp_path)[0]


def test_a_fault_of_one_process_is_told_by_it(start, tmp_path):
    """The other one cannot know why."""
    fault = tmp_path / "sitecustomize.py"
    fault.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import random\n"
        "    shuffle = random.Random.shuffle\n"
        "    def fail(self, some):\n"
        "        if len(some) > 30: raise OSError('this machine is on fire')\n"
        "        shuffle(self, some)\n"
        "    random.Random.shuffle = fail\n"
    )
    process = start(2, "--output-dir", "adapter", PYTHONPATH=str(tmp_path))
    assert process.wait(120) != 0
    _, messages = printed(tmp_path)
    assert [m for m in messages if m.startswith("rank 1: finetune.py: failed: OSError: this machine is on fire")]
    assert len(messages) <= 2 and not [m for m in messages if "failed" in m and not m.startswith("rank 1")]
