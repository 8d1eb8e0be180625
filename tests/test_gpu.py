"""Training on a CUDA GPU, through Unsloth: what test_ranks.py does on a CPU. Skipped where there is none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPUS, ROOT
from test_ranks import start, wait_for_checkpoint, whole  # noqa: F401 (fixtures)

import finetune

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


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "run.json").read_text())["training"]["log"]]


def stop(process: subprocess.Popen, partial: Path, number: int) -> int:
    """The exit code of a run that gets this signal in the middle of training."""
    wait_for_checkpoint(partial, process)
    process.send_signal(number)
    return process.wait(120)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_losses(start, whole, tmp_path, number):  # noqa: F811
    code = stop(start(1, "--output-dir", "adapter"), tmp_path / "adapter.partial", number)
    assert code == (128 + number if number == signal.SIGTERM else -number)
    assert start(1, "--output-dir", "adapter", "--resume").wait(600) == 0
    assert losses(tmp_path / "adapter") == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_run_begun_in_fp16_goes_on_in_bf16(start, whole, tmp_path):  # noqa: F811
    stop(start(1, "--output-dir", "adapter", "--fp16"), tmp_path / "adapter.partial", signal.SIGTERM)
    assert start(1, "--output-dir", "adapter", "--resume").wait(600) == 0
    assert "precision was float16, is bfloat16" in (tmp_path / "out.txt").read_text()
    assert len(losses(tmp_path / "adapter")) == len(losses(whole))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(finetune.torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(start, whole, tmp_path):  # noqa: F811
    assert start(2, "--output-dir", "adapter").wait(600) == 0
    assert losses(tmp_path / "adapter") == pytest.approx(losses(whole), abs=0.02)  # in bf16


@pytest.mark.gpu
@needs_gpu
def test_lora_plus_learns_with_moments_in_8_bits(start, tmp_path):  # noqa: F811
    """With so little memory that no option's estimate fits, the last one is taken; the tiny model fits all the same."""
    flags = ["--loraplus-lr-ratio", "8", "--max-vram", "0.16", "--max-steps", "40"]
    assert start(1, "--output-dir", "adapter", *flags).wait(600) == 0
    assert json.loads((tmp_path / "adapter" / "run.json").read_text())["plan"]["optim"] == finetune.ADAMW_8BIT
    assert losses(tmp_path / "adapter")[-1] < losses(tmp_path / "adapter")[0]
