"""--push-to-hub: the real client, a hub of our own on loopback. --report-to: read back from each tracker's files."""

import base64
import hashlib
import importlib.util
import json
import shlex
import sqlite3
import struct
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import rows

import finetune

TOKENS = {"hf_" + "w" * 34: "write", "hf_" + "r" * 34: "read"}  # as the hub gives them, and what they may do
WRITE, READ = TOKENS


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub's whoami, model_info, create_repo and upload_folder call. `server.repos` is what it holds,
    `server.sent` what it was sent, `server.status` the answer to a kind of call when that is to fail.
    """

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status=200, answer=None, **headers):
        body = json.dumps(answer or {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        path, sent, repos = self.path.partition("?")[0], self.body(), self.server.repos
        self.server.sent.append((f"{self.command} {path}", sent))
        here = f"http://127.0.0.1:{self.server.server_port}"
        role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        kind = path.rpartition("/")[2] if "/commit/" not in path else "commit"
        if (status := self.server.status.get(kind, 200)) != 200:
            return self.reply(status, {"error": "as the test wants it"})
        if path.startswith("/lfs/"):  # signed addresses: no token
            self.server.blobs[hashlib.sha256(sent).hexdigest()] = sent
            return self.reply()
        if role is None:
            return self.reply(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return self.reply(200, {"type": "user", "name": "me", "orgs": [{"name": "my-org"}], "auth": token})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(sent)["content"].split("---")[1])
            return self.reply(200, {"errors": [], "warnings": []})
        if role != "write" and self.command == "POST":
            return self.reply(403, {"error": "this token may only read"})
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in repos else 200
            repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
            return self.reply(status, {"url": f"{here}/{name}", "name": name})
        name = "/".join(path.removeprefix("/api/models").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if name not in repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if self.command == "GET":
            return self.reply(200, {"id": name, "private": repos[name]["private"], "siblings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(sent)["files"]
            for file in files:
                file["uploadMode"] = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            return self.reply(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(sent)["objects"]
            objects = [file | {"actions": {"upload": {"href": f"{here}/lfs/{file['oid']}"}}} for file in asked]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        for entry in map(json.loads, sent.splitlines()):  # /commit/main
            value = entry["value"]
            if entry["key"] == "file":
                repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repos[name]["files"][value["path"]] = self.server.blobs[value["oid"]]
        return self.reply(200, {"commitUrl": f"{here}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.blobs, server.sent, server.status = {}, {}, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def logged_in(hub, tmp_path):
    """The environment of a person who may write at this hub; every log lies in tmp_path too."""
    (tmp_path / "tmp").mkdir()
    address = f"http://127.0.0.1:{hub.server_port}"
    # Xet, the hub's own protocol for large files, needs a server of another kind: this is the client's other way.
    env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path.parent / "hf"), "HF_TOKEN": WRITE}
    return env | {"TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def saved(tmp_path) -> Path:
    """The files of a finished run, and others that came later."""
    folder = tmp_path / "adapters/mine"
    folder.mkdir(parents=True)
    texts = dict.fromkeys(("adapter_model.safetensors", "tokenizer.json", "report.html", "run.json", "loss.png"), "{}")
    texts |= {"adapter_config.json": '{"peft_type": "LORA"}', "README.md": "---\nlicense: apache-2.0\n---\n"}
    for name, text in (texts | {"review.json": "{}", "notes.txt": "", "export/adapter.gguf": ""}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # no tensor
    return folder


def everything_sent(hub) -> bytes:
    """All that the hub was sent, and what is encoded in it."""
    sent = [body for _, body in hub.sent] + [body for repo in hub.repos.values() for body in repo["files"].values()]
    for call, body in hub.sent:
        if "/preupload/" in call:
            sent += [base64.b64decode(file["sample"]) for file in json.loads(body)["files"]]
    return b"\n".join(sent)


def texts_of_rows(count: int) -> list[bytes]:
    return [json.dumps(text)[1:-1].encode() for row in rows(count) for text in (row["question"], row["answer"])]


TRAIN = ("--max-steps", "2", "--max-new-tokens", "4", "--lora-r", "4", "--push-to-hub", "me/faq")


def test_a_run_is_pushed_and_again_by_the_command_that_a_failed_push_names(
    run, hub, logged_in, faq, tiny_model, tmp_path
):
    hub.status["commit"] = 403
    done = run("--data", faq, "--model", tiny_model, *TRAIN, **logged_in)
    folder = tmp_path / "adapters/faq-tiny-mistral"
    assert done.returncode == 1 and "403 Forbidden" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "complete" and "Verdict" in done.stdout
    assert not folder.with_name(folder.name + ".partial").exists()
    [again] = [line for line in done.stderr.splitlines() if "is complete" in line]
    command = shlex.split(again.partition("python finetune.py ")[2])
    assert "traceback" not in done.stderr  # the log has gone with the run's unfinished folder

    failed = run(*command, **logged_in)
    assert failed.returncode == 1 and again in failed.stderr, failed.stderr
    [log] = (tmp_path / "tmp").glob("*.log")
    assert f"The traceback is in {log}." in failed.stderr and "403 Forbidden" in log.read_text()

    hub.status.clear()
    pushed = run(*command, **logged_in)
    assert pushed.returncode == 0 and pushed.stderr == "", pushed.stderr
    assert "report.html and run.json hold your questions' text and stayed here" in pushed.stdout
    files = {path.name for path in folder.iterdir()} - {"report.html", "run.json", "SHA256SUMS"}  # it has run.json
    assert files == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"} | {
        "chat_template.jinja", "README.md", "loss.png"
    }  # fmt: skip
    assert hub.repos == {"me/faq": {"private": True, "files": {name: (folder / name).read_bytes() for name in files}}}
    assert not [text for text in texts_of_rows(40) if text in everything_sent(hub)]

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert log in written
    assert not [path for path in written if WRITE.encode() in path.read_bytes()]
    assert WRITE not in done.stdout + done.stderr + failed.stderr + pushed.stdout
    assert (
        not {"push", "push_to_hub", "push_questions"} & json.loads((folder / "run.json").read_text())["config"].keys()
    )

    assert run(*command, "--push-questions", **logged_in).returncode == 0
    assert hub.repos["me/faq"]["files"].keys() == files | {"report.html", "run.json"}
    assert any(text in everything_sent(hub) for text in texts_of_rows(40))


def test_what_did_not_help_is_not_pushed_where_help_is_required(run, hub, logged_in, faq, tiny_model):
    done = run("--data", faq, "--model", tiny_model, *TRAIN, "--require-improvement", **logged_in)
    assert done.returncode == 3, done.stderr
    assert "Pushed    nothing: --require-improvement" in done.stdout
    assert [call for call, _ in hub.sent if not call.startswith("GET")] == []


def test_no_login_is_told_before_training(run, hub, logged_in, faq, tiny_model, tmp_path):
    before = set(tmp_path.rglob("*"))
    done = run("--data", faq, "--model", tiny_model, *TRAIN, **logged_in | {"HF_TOKEN": ""})
    assert done.returncode == 2 and "--push-to-hub me/faq: nobody is logged in" in done.stderr, done.stderr
    assert set(tmp_path.rglob("*")) == before


def test_only_what_an_adapter_needs_is_pushed(run, hub, logged_in, saved):
    done = run("--push", "mine", "--push-to-hub", "my-org/faq", **logged_in)
    assert done.returncode == 0, done.stderr
    wanted = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "loss.png"}
    assert hub.repos["my-org/faq"]["private"] and hub.repos["my-org/faq"]["files"].keys() == wanted


REFUSED = {  # what is wrong -> (name, token, the hub's answer to whoami, what is said)
    "no owner": ("faq", WRITE, 200, "must be owner/name"),
    "bad name": ("me/a..b", WRITE, 200, "must be owner/name"),
    "no login": ("me/faq", "", 200, "nobody is logged in to the hub; set HF_TOKEN"),
    "wrong token": ("me/faq", "hf_wrong", 200, "the hub cannot be asked, or does not know the token (401)"),
    "may only read": ("me/faq", READ, 200, "the token may only read"),
    "another's": ("you/faq", WRITE, 200, "the login is that of me, who is in no organization of that name"),
    "public": ("me/public", WRITE, 200, "is public; make it private"),
    "no answer": ("me/faq", WRITE, 418, "the hub cannot be asked, or does not know the token (418)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_wrong_with_a_push(case, run, hub, logged_in, saved):
    name, token, hub.status["whoami-v2"], said = REFUSED[case]
    hub.repos["me/public"] = {"private": False, "files": {}}
    done = run("--push", "mine", "--push-to-hub", name, **logged_in | {"HF_TOKEN": token})
    assert done.returncode == 2 and done.stderr.startswith("finetune.py: --push-to-hub "), done.stderr
    assert said in done.stderr
    assert not [call for call, _ in hub.sent if not call.startswith("GET")]
    assert not token or token not in done.stderr


def test_no_hub_at_all(run, logged_in, saved):
    done = run("--push", "mine", "--push-to-hub", "me/faq", **logged_in | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (
        done.returncode == 2 and "the hub cannot be asked, or does not know the token (ConnectError)" in done.stderr
    ), done.stderr


def from_tensorboard(folder: Path) -> tuple[dict, dict, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs/mine"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    numbers = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }
    [config] = texts.pop("config").values()
    return json.loads(config), numbers, texts


def from_wandb(folder: Path) -> tuple[dict, dict, dict]:
    """An offline run is a file: seven bytes of header, then records as LevelDB's log cuts them, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, records, parts = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    [start] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in start.config.update if item.key != "_wandb"}
    found = defaultdict(dict)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    found[name][record.history.step.num] = json.loads(item.value_json)
    return config, *numbers_and_texts(found)


def from_trackio(folder: Path) -> tuple[dict, dict, dict]:
    found = defaultdict(dict)
    with sqlite3.connect(folder / "trackio/faq-finetune.db") as database:
        [(config,)] = database.execute("select config from configs where run_name = 'mine'").fetchall()
        for step, metrics in database.execute("select step, metrics from metrics where run_name = 'mine'"):
            for name, value in json.loads(metrics).items():
                found[name][step] = value
    config = {key: value for key, value in json.loads(config).items() if not key.startswith("_")}
    return config, *numbers_and_texts(found)


def numbers_and_texts(found: dict) -> tuple[dict, dict]:
    texts = {name: steps for name, steps in found.items() if any(isinstance(value, str) for value in steps.values())}
    return {name: steps for name, steps in found.items() if name not in texts}, texts


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "trackio": from_trackio}


@pytest.mark.parametrize("tracker", READERS)
def test_trackers_hold_the_same_names_and_steps(tracker, run, faq, tiny_model, tmp_path):
    if not importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is not installed")
    secret = "wb" + "k" * 40
    env = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}
    flags = ("--max-steps", 3, "--max-new-tokens", 4, "--lora-r", 4, "--output-dir", tmp_path / "adapters/mine")
    env |= {"WANDB_API_KEY": secret, "HF_TOKEN": "", "HF_HUB_OFFLINE": "1"}
    done = run("--data", faq, "--model", tiny_model, *flags, "--report-to", tracker, **env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"Tracked   by {tracker}: " in done.stdout
    config, numbers, texts = READERS[tracker](tmp_path)

    result = json.loads((tmp_path / "adapters/mine/run.json").read_text())
    training, evaluation = result["training"], result["evaluation"]
    assert config == result["config"] and config["data"] == ["~/faq.json"]
    assert texts == {part: {3: evaluation[part]["sentence"]} for part in ("verdict", "advice")}
    log = {entry["step"]: entry for entry in training["log"]}
    wanted = {f"train/{name}": {n: log[n][name] for n in (1, 2, 3)} for name in ("loss", "learning_rate")}
    for name, key in (("loss", "nll"), ("recall", "recall"), ("chrf", "chrf")):
        checks = {epoch["step"]: epoch[key] for epoch in training["epochs"]}
        wanted[f"eval/{name}"] = {n: finetune.mean(v) if isinstance(v, list) else v for n, v in checks.items()}
    for arm in finetune.ARMS:
        wanted |= {f"{arm}/{name}": {3: value} for name, value in evaluation[arm].items() if isinstance(value, float)}
        wanted |= {f"{arm}/reworded/{name}": {3: value} for name, value in evaluation[arm]["reworded"].items()}
    assert numbers.pop("train/grad_norm").keys() == {1, 2, 3}
    assert numbers == {name: pytest.approx(steps, rel=1e-5, abs=1e-7) for name, steps in wanted.items()}
    assert {"before/nll", "after/reworded/recall", "lookup/chrf", "eval/loss"} <= numbers.keys()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_resumed_run_stands_once_in_tensorboard(tmp_path, monkeypatch):
    """What was written before it was stopped is in the same folder."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for losses in ((3.0, 2.5), (3.0, 2.5, 2.0)):
        tracker = finetune.Tracker(finetune.Config(report_to="tensorboard"), "mine")
        for step, loss in enumerate(losses, 1):
            tracker.log({"step": step, "loss": loss})
        tracker.run.close()
    assert from_tensorboard(tmp_path)[1] == {"train/loss": {1: 3.0, 2: 2.5, 3: 2.0}}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(EventAccumulator("runs/mine").Reload().Scalars("train/loss")) == 3


def test_a_tracker_that_does_not_start_stops_the_run_before_training(run, faq, tiny_model, tmp_path):
    (tmp_path / "runs").write_text("a file where the tracker wants a folder")
    pytest.importorskip("tensorboard")
    done = run("--data", faq, "--model", tiny_model, "--report-to", "tensorboard")
    assert done.returncode == 2 and "--report-to tensorboard: it does not start" in done.stderr, done.stderr
    assert not (tmp_path / "adapters").exists()
