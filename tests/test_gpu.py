"""Training on a CUDA GPU, through Unsloth. Skipped where there is none."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GPUS, ROOT

import finetune

# A check after each of six epochs: what is stopped after the first one still has five to go.
UPDATES = 48
FLAGS = "--num-train-epochs 6 --goal style --early-stopping-patience 0 --replay-fraction 0 --loraplus-lr-ratio 1"
FLAGS += " --lora-r 4 --eval-questions 4 --max-new-tokens 8"
needs_gpu = pytest.mark.skipif(not finetune.has_gpu(), reason="needs a CUDA GPU")


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs a CUDA GPU")
def test_what_needs_a_gpu():
    """All tests marked `gpu`, of every file: this process has hidden its GPUs."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"CUDA_VISIBLE_DEVICES": GPUS} if GPUS is not None else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    print(done.stdout[-5000:])
    assert done.returncode == 0


@pytest.fixture
def start(tiny_model, faq, tmp_path):
    """start("--flag", ..., processes=1) -> the running program, what it prints in out.txt."""

    def call(*flags, processes: int = 1) -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / "finetune.py", "--model", tiny_model]
        out = (tmp_path / "out.txt").open("w")
        command += ["--data", faq, *FLAGS.split(), *flags]
        return subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)

    return call


def stop_in_training(process: subprocess.Popen, partial: Path, number: int) -> None:
    """Send it this signal between its first check and its last."""
    while not list(partial.glob("checkpoint-*/SHA256SUMS")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(120)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "run.json").read_text())["training"]["log"]]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_losses(start, tmp_path, number):
    assert start("--output-dir", "whole").wait(600) == 0
    process = start("--output-dir", "stopped")
    stop_in_training(process, tmp_path / "stopped.partial", number)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert start("--output-dir", "stopped", "--resume").wait(600) == 0
    assert "Resume    from" in (tmp_path / "out.txt").read_text()
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_run_begun_in_fp16_goes_on_in_bf16(start, tmp_path):
    stop_in_training(start("--output-dir", "a", "--fp16"), tmp_path / "a.partial", signal.SIGTERM)
    assert start("--output-dir", "a", "--resume").wait(600) == 0
    assert "precision was float16, is bfloat16" in (tmp_path / "out.txt").read_text()
    assert len(losses(tmp_path / "a")) == UPDATES


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(finetune.torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(start, tmp_path):
    assert start("--output-dir", "one", "--lora-dropout", "0").wait(600) == 0
    assert start("--output-dir", "two", "--lora-dropout", "0", processes=2).wait(600) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)  # in bf16


@pytest.mark.gpu
@needs_gpu
def test_lora_plus_learns_with_moments_in_8_bits(start, tmp_path):
    """With so little memory that no option's estimate fits, the last one is taken; the tiny model fits all the same."""
    assert start("--output-dir", "a", "--loraplus-lr-ratio", "8", "--max-vram", "0.16").wait(600) == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["plan"]["optim"] == finetune.ADAMW_8BIT
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0]
