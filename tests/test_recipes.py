"""tests/recipes.py, which measures recipes side by side, runs: a tiny model, two updates of two runs."""

import json
import subprocess
import sys

from conftest import ROOT


def test_two_recipes_are_trained_and_measured_at_once(tiny_model, faq, tmp_path):
    few = ("--seeds", 1, "--updates", 2, "--questions", 3, "--prompts", 4, "--max-new-tokens", 6)
    command = ("--model", tiny_model, "--data", faq, "--recipes", "chosen;A, 3 fixed", *few)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/recipes.py", *map(str, command)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "recipes.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [record["recipe"] for record in records]
    assert names[0] == "base" and {"chosen", "chosen, only the base's own wording", "A, 3 fixed rewordings"} <= set(
        names
    )
    assert all(f"| {name} | 1 |" in done.stdout for name in names)
    for record in records[1:]:
        assert len(record["losses"]) == 2 and record["held"] != records[0]["held"], "nothing was trained"
