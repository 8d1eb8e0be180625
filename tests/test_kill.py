"""A run that is killed, anywhere: --resume ends with the adapter of a run that went through. Two runs in one folder; a
run whose numbers go wrong. Through the real command line, but where it says so."""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, rows
from test_train import adapter, same

import finetune

# finetune.py that saves a checkpoint after each update, counts what it does to files of its folder (before it is done:
# open for writing, make, rename, remove), and sends itself a signal at one of these moments.
KILLED_AT = """
import os, sys, finetune
moment, number, trace, *flags = sys.argv[1:]
finetune.CHECKPOINT_SECONDS = -1
count, trace = 0, open(trace, "a", buffering=1)
def watch(event, args):
    global count
    path = os.fspath(args[0]) if args and isinstance(args[0], (str, os.PathLike)) else ""
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    changes |= event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    below = event in ("os.remove", "os.rmdir") and args[-1] != -1  # rmtree() goes by the descriptor of the folder
    if not changes or path.endswith("lock") or not (below or ".partial" in path or ".export-" in path):
        return
    count += 1
    trace.write(f"{event} {path}\\n")
    if count == int(moment):
        os.kill(os.getpid(), int(number))
sys.addaudithook(watch)
sys.exit(finetune.main(flags))
"""
FLAGS = ["--max-new-tokens", "4", "--lora-r", "4", "--learning-rate", "1e-3", "--num-train-epochs", "4"]
FLAGS += ["--eval-questions", "4", "--replay-fraction", "0.05", "--lora-dropout", "0.1"]


class Job:
    """The same run again and again, in folders of their own; `whole` is one that went through."""

    def __init__(self, cwd: Path, model: Path):
        self.cwd, self.flags = cwd, ["--data", "faq.json", "--model", str(model), *FLAGS, "--output-dir"]
        (cwd / "faq.json").write_text(json.dumps(rows(30)), encoding="utf-8")
        done = self("whole", trace=cwd / "trace")
        assert done.returncode == 0, done.stderr
        self.moments = (cwd / "trace").read_text().splitlines()

    def start(self, name, *more, moment=0, number=signal.SIGKILL, trace=os.devnull) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED_AT, str(moment), str(int(number)), str(trace), *self.flags, name, *more]
        heard = functools.partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # tests in the background inherit "ignore"
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
        return subprocess.Popen(command, cwd=self.cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, **how)

    def __call__(self, *args, wait=None, **kwargs) -> subprocess.CompletedProcess:
        """The finished process; after `wait` seconds it gets the signal, wherever it is."""
        process = self.start(*args, **kwargs)
        try:
            output, errors = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(kwargs["number"])
            output, errors = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def last(self, pattern: str) -> int:
        """The number of the last moment like that."""
        return max(self.all(pattern))

    def all(self, pattern: str) -> list[int]:
        return [n for n, moment in enumerate(self.moments, 1) if re.search(pattern, moment)]


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory) -> Job:
    return Job(tmp_path_factory.mktemp("killed"), tiny_model)


def results(folder: Path) -> tuple:
    """What a resumed run must have in common with one that went through."""
    run = json.loads((folder / "run.json").read_text())
    training = {key: run["training"][key] for key in ("log", "epochs", "steps", "tokens", "best_step")}
    evaluation = {key: value for key, value in run["evaluation"].items() if key != "seconds"}
    return training, evaluation, run["data"], run["plan"]


def resumed_as_whole(job, name: str) -> str:
    """--resume, after which all is as in a run that went through. Returns the first thing that it said of it."""
    done = job(name, "--resume")
    assert done.returncode == 0, done.stderr + done.stdout
    assert same(adapter(job.cwd / "whole"), adapter(job.cwd / name))
    assert results(job.cwd / "whole") == results(job.cwd / name)
    assert not (job.cwd / f"{name}.partial").exists()
    assert {path.name for path in (job.cwd / name).iterdir()} == {path.name for path in (job.cwd / "whole").iterdir()}
    shutil.rmtree(job.cwd / name)
    return next((line for line in done.stdout.splitlines() if line.startswith(("Resume", "Saved"))), "")


PLACES = {
    "before anything is trained": (r"open .*replay.json", signal.SIGTERM, 143),
    "inside a checkpoint": (r"open .*checkpoint-9/trainer_state.json", signal.SIGKILL, -9),
    "inside an old checkpoint": (r"remove optimizer.pt", signal.SIGKILL, -9),
    "inside the final folder": (r"open .*result/run.json", signal.SIGINT, 130),
    "when it is there": (r"remove train.log", signal.SIGKILL, -9),
}


@pytest.mark.parametrize("where", PLACES)
def test_killed_and_resumed_is_the_same_adapter(where, job):
    pattern, number, code = PLACES[where]
    moments = job.all(pattern)  # the last; of removals the first, for at the end everything is removed
    killed = job("killed", moment=moments[0 if where == "inside an old checkpoint" else -1], number=number)
    assert killed.returncode == code and "Traceback" not in killed.stderr, killed.stderr
    assert not (job.cwd / "killed/adapter_model.safetensors").exists() or where == "when it is there"
    resumed_as_whole(job, "killed")


def test_an_export_that_is_killed_is_made_again(job):
    """At each fifth of what it does to files."""
    export = [sys.executable, "-c", KILLED_AT]
    how = {"cwd": job.cwd, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}

    def exported(moment: int = 0) -> subprocess.CompletedProcess:
        trace = job.cwd / "export.trace"
        trace.unlink(missing_ok=True)
        return subprocess.run([*export, str(moment), "9", trace, "--export", "whole"], **how)

    def made() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (job.cwd / "whole/export").iterdir()}

    before = sorted(path.name for path in (job.cwd / "whole").iterdir())
    done = exported()
    assert done.returncode == 0, done.stderr
    files, moments = made(), len((job.cwd / "export.trace").read_text().splitlines())
    for moment in range(2, moments, max(1, moments // 5)):
        shutil.rmtree(job.cwd / "whole/export")
        killed = exported(moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        left = [path.name for path in (job.cwd / "whole").iterdir() if path.name not in before]
        if "export" not in left:
            assert any(name.startswith(finetune.UNFINISHED) for name in left)
            assert exported().returncode == 0
            assert sorted(path.name for path in (job.cwd / "whole").iterdir()) == sorted([*before, "export"])
        assert made() == files
    shutil.rmtree(job.cwd / "whole/export")


def test_a_signal_that_python_drops_is_heard_later():
    """What is raised inside __del__ ends nothing; a run must end all the same."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, finetune.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            Finalized()
            time.sleep(20)
        assert stopped.value.args == (signal.SIGTERM,)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_twenty_random_moments(job, capsys):
    """Twelve of what it does to files, eight by the clock; and of these some twice."""
    dice = random.Random(20)
    seconds = json.loads((job.cwd / "whole/run.json").read_text())["seconds"] + 4  # the libraries' start
    for number in range(1, 21):
        how = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        if number <= 12:
            moment = dice.randrange(1, len(job.moments) + 1)
            killed, at = job("killed", moment=moment, number=how), job.moments[moment - 1]
        else:
            wait = round(dice.uniform(3, seconds), 1)
            killed, at = job("killed", number=how, wait=wait), f"after {wait} s"
        if not (job.cwd / "killed.partial").exists() and not (job.cwd / "killed").exists():
            said = "nothing had been written"
            assert job("killed", "--resume").returncode == 2 and job("killed").returncode == 0
            shutil.rmtree(job.cwd / "killed")
        else:
            said = resumed_as_whole(job, "killed")
        with capsys.disabled():
            print(f"\n{number:2} {how.name:8} {at:60} exit {killed.returncode:4}  {said}", end="")


def in_0_1_0(noted: dict) -> dict:
    return {key: value for key, value in noted.items() if key not in ("rows", "machine")}


OTHER_FILES = {"data": ["other"]}
T4 = {"gpu": "Tesla T4", "precision": "float16"}
# What is another in config.json than now; what is said of it; whether --resume is refused.
CHANGES = {
    "setting": (lambda noted: noted | {"lora_alpha": 16}, "lora_alpha was 16, is 32", True),
    "a row": (
        lambda noted: noted | {"rows": noted["rows"] | {"train: Why?": "there"}},
        "train: Why? was there, is not there",
        True,
    ),
    "order": (
        lambda noted: noted | OTHER_FILES | {"rows": dict([*noted["rows"].items()][::-1])},
        "the data files have changed",
        True,
    ),
    "files, but no row": (lambda noted: noted | OTHER_FILES, "changed, but no row of them", False),
    "0.1.0": (in_0_1_0, "from x.partial/checkpoint-3", False),
    "0.1.0, other files": (lambda noted: in_0_1_0(noted) | OTHER_FILES, "the data files have changed", True),
    "library": (
        lambda noted: noted | {"machine": noted["machine"] | {"torch": "2.1.0"}},
        "torch was 2.1.0, is ",
        False,
    ),
    "GPU": (
        lambda noted: noted | {"machine": noted["machine"] | T4},
        "note: precision was float16, is float32: the adapter may differ",
        False,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_refused_or_said(change, tmp_path, monkeypatch, capsys):
    """In this process: what is compared and said, before any model is loaded."""
    monkeypatch.chdir(tmp_path)
    alter, expected, refused = CHANGES[change]
    Path("faq.json").write_text(json.dumps(rows(30)), encoding="utf-8")
    config = finetune.Config(model="x", data=(Path("faq.json"),))
    partial = Path("x.partial")
    partial.mkdir()
    data = finetune.load_data(config)
    finetune.note_run(partial, config, data)
    (partial / "checkpoint-3").mkdir()
    (partial / "checkpoint-3/trainer_state.json").write_text("{}")
    noted = alter(json.loads((partial / "config.json").read_text()))
    (partial / "config.json").write_text(json.dumps(noted))
    config = finetune.dataclasses.replace(config, resume=True)
    if refused:
        with pytest.raises(finetune.BadInput) as said:
            finetune.note_run(partial, config, data)
        assert expected in str(said.value)
    else:
        finetune.note_run(partial, config, data)
        assert expected in capsys.readouterr().out
    assert json.loads((partial / "config.json").read_text()) == noted


def test_changed_data_are_told_row_by_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    partial, table = Path("x.partial"), rows(30)
    partial.mkdir()

    def note(table, resume):
        Path("faq.json").write_text(json.dumps(table), encoding="utf-8")
        config = finetune.Config(model="x", data=(Path("faq.json"),), resume=resume)
        finetune.note_run(partial, config, finetune.load_data(config))

    note(table, False)
    (partial / "checkpoint-3").mkdir()
    (partial / "checkpoint-3/trainer_state.json").write_text("{}")
    note([{"answer": row["answer"], "question": row["question"]} for row in table], True)  # another file, the same rows
    with pytest.raises(finetune.BadInput) as said:
        note([table[0] | {"answer": "Another answer."}, *table[2:]], True)
    lines = str(said.value).splitlines()
    for row, change in ((table[0], "was there"), (table[0], "was not there"), (table[1], "was there")):
        assert any(row["question"][:80] in line and change in line for line in lines), lines


def test_a_half_written_checkpoint_is_not_the_last(tmp_path):
    for step, text in (("9", '{"global_step": 9}'), ("10", '{"global_step":'), ("11", None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(text)
    assert finetune.last_checkpoint(tmp_path).name == "checkpoint-9"
    assert finetune.last_checkpoint(tmp_path, before=9) is None


HOLDS_THE_LOCK = """
import sys, time, finetune
from pathlib import Path
finetune.LOCK_SECONDS = float(sys.argv[2])
lock = finetune.lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that holds the lock of tmp_path. LOCK_SECONDS is 3 here, so that nothing takes minutes."""
    monkeypatch.setattr(finetune, "LOCK_SECONDS", 3)
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path), "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def noted(lock: Path, **changes: str) -> None:
    text = lock.read_text()
    for key, value in changes.items():
        text = re.sub(f"(?m)^{key}=.*", f"{key}={value}", text)
    lock.write_text(text)


def test_a_second_run_is_refused_with_the_firsts_process_and_host(holder, tmp_path):
    import socket

    for _ in range(2):  # and the first keeps its lock
        with pytest.raises(finetune.BadInput) as said:
            finetune.lock_folder(tmp_path)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(said.value)


def at_once(*_):
    pytest.fail("it waited")


def test_the_lock_of_a_killed_run_is_taken_at_once(holder, tmp_path, monkeypatch):
    holder.kill()
    holder.wait()
    monkeypatch.setattr(finetune, "working", at_once)
    finetune.lock_folder(tmp_path).release()
    assert not (tmp_path / "lock").exists()


def test_after_a_reboot_another_process_with_its_number_does_not_count(holder, tmp_path, monkeypatch):
    holder.kill()
    holder.wait()
    before = int(re.search(r"start=(\d+)", (tmp_path / "lock").read_text())[1])
    noted(tmp_path / "lock", pid=str(os.getpid()), start=str(before ^ (1 << 70)))  # the upper half is the boot's id
    monkeypatch.setattr(finetune, "working", at_once)
    finetune.lock_folder(tmp_path).release()


def test_on_a_network_drive_a_lock_counts_while_it_is_renewed(holder, tmp_path):
    """Of another machine's process nothing is known but that: a lost Colab session, the host of a cluster."""
    noted(tmp_path / "lock", host="colab-1")
    with pytest.raises(finetune.BadInput, match=f"process {holder.pid} on colab-1"):
        finetune.lock_folder(tmp_path)
    holder.kill()
    holder.wait()
    finetune.lock_folder(tmp_path).release()


def test_two_runs_in_one_folder(job):
    """Through the command line: the second is refused while the first lives; when it is killed, another may go on."""
    first = job.start("both", "--num-train-epochs", "100")
    while not finetune.last_checkpoint(job.cwd / "both.partial"):
        assert first.poll() is None, first.stderr.read()
    second = job("both", "--resume")
    assert second.returncode == 2 and f"process {first.pid} on " in second.stderr, second.stderr
    first.kill()
    first.communicate()
    third = job("both", "--resume", "--lora-alpha", "8")
    assert third.returncode == 2 and "lora_alpha was 32, is 8" in third.stderr and "looking" not in third.stdout
    assert not (job.cwd / "both.partial/lock").exists()


def endless(gradient):
    return gradient * math.inf


# What is done to a LoRA's weights from outside, before update 21, and what is said then.
FAULTS = {
    "loss": (lambda weight: weight.data.fill_(math.nan), "the training loss is nan; at update 21"),
    "gradient": (lambda weight: weight.register_hook(endless), "the gradient is inf; at update 21"),
    "explosion": (lambda weight: weight.data.normal_(std=1e3), "the training loss exploded: "),
    "nothing learned": (
        lambda weight: weight.requires_grad_(False).zero_(),
        "the adapter did not change in 32 updates",
    ),
}


@pytest.fixture
def trained(faq, tiny_model, tmp_path, monkeypatch):
    """trained(*callbacks, **settings): the whole job in this process, with a checkpoint after each update."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", -1)
    plain = {"model": str(tiny_model), "data": (faq,), "lora_r": 4, "max_new_tokens": 4, "eval_questions": 2}
    plain |= {"replay_fraction": 0.0, "output_dir": Path("x")}
    train = finetune.train

    def call(*callbacks, **settings):
        monkeypatch.setattr(finetune, "train", functools.partial(train, callbacks=callbacks))
        return finetune.run_evaluation(finetune.Config(**plain | settings))

    return call


def before_update(number: int, act, count: int | None = None):
    """A callback that calls act() with each B of the LoRA, or with the first `count`."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == number - 1:
                weights = [weight for name, weight in model.named_parameters() if "lora_B" in name]
                for weight in weights[:count]:
                    act(weight)

    return Callback()


def stop(_):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_whose_numbers_go_wrong_stops_with_the_last_good_checkpoint(fault, trained, tmp_path):
    act, expected = FAULTS[fault]
    with pytest.raises(FloatingPointError, match=re.escape(expected)) as stopped:
        trained(before_update(21, act), max_steps=40, learning_rate=1e-3, target_modules=("q_proj", "lm_head"))
    [note] = stopped.value.__notes__
    good = Path(re.search(r"x\.partial/checkpoint-\d+", note)[0])
    assert good.name == {"gradient": "checkpoint-20", "nothing learned": "checkpoint-31"}.get(fault, "checkpoint-16")
    assert all(weight.isfinite().all() and weight.abs().max() < 100 for weight in adapter(good).values())
    assert "--learning-rate 0.0005" in note and "--output-dir" in note
    assert not Path("x").exists() and not (good.parent / "lock").exists()


def test_an_update_at_a_rate_of_0_is_told(trained):
    """The first of the warm-up: if that is all there is, nothing changes. By default a single update has none."""
    with pytest.raises(FloatingPointError, match=r"did not change in 1 updates; they were all warm-up.*--warmup-steps"):
        trained(max_steps=1, warmup_steps=1)
    shutil.rmtree("x.partial")
    assert trained(max_steps=1)["training"]["steps"] == 1


def test_fp16_skips_updates_until_its_scale_is_at_its_floor():
    import torch

    def log(gradient):
        return [{"step": 1, "loss": 3.0, "grad_norm": gradient}, {"step": 1, "eval_loss": 3.0}]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(1))  # made at the first use
    finetune.check_update(log(math.inf), 3.0, scaler)
    with pytest.raises(FloatingPointError, match="the gradient is inf"):
        finetune.check_update(log(math.inf), 3.0, None)
    scaler.update(0.5)
    with pytest.raises(FloatingPointError, match="fp16 cannot hold the gradients"):
        finetune.check_update(log(math.inf), 3.0, scaler)


def test_a_run_begun_in_fp16_goes_on_without_its_scaler(trained, tmp_path):
    """As in bf16 on a newer GPU: the checkpoint has a scaler's state, the trainer has no scaler."""
    import torch

    with pytest.raises(KeyboardInterrupt):
        trained(before_update(3, stop, 1), max_steps=8)
    checkpoint = finetune.last_checkpoint(Path("x.partial"))
    assert checkpoint.name == "checkpoint-3"
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    torch.save(scaler.state_dict(), checkpoint / "scaler.pt")
    assert trained(max_steps=8, resume=True)["training"]["steps"] == 8


def test_seconds_of_the_job_are_those_of_all_sessions(trained):
    with pytest.raises(KeyboardInterrupt):
        trained(before_update(3, stop, 1), max_steps=8)
    file = finetune.last_checkpoint(Path("x.partial")) / "trainer_state.json"
    state = json.loads(file.read_text())
    assert 0 < state["stateful_callbacks"]["Monitor"]["attributes"]["seconds_before"] < 100
    state["stateful_callbacks"]["Monitor"]["attributes"]["seconds_before"] += 1000  # as if it had been a long run
    file.write_text(json.dumps(state))
    finetune.write_sums(file.parent)
    run = trained(max_steps=8, resume=True)
    assert 1000 < run["training"]["seconds_before_resume"] < run["seconds"] < 1200
