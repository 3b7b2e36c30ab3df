"""The lm-evaluation-harness on a packed model, with a task made here; only where the harness is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, Packed, tiny_text

pytest.importorskip("lm_eval")

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def test_a_task_runs_on_a_packed_model(packed: Callable[[str, str], Packed], tmp_path: Path) -> None:
    lines = tiny_text(12, seed=5)
    documents = [{"text": line, "choices": [" na shi", " market"], "answer": n % 2} for n, line in enumerate(lines)]
    data = tmp_path / "tiny.jsonl"
    data.write_text("".join(f"{json.dumps({**d, 'text': d['text'][:20]})}\n" for d in documents), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tools/harness.py"), str(packed("gpt2", "market-coded-3_0").directory), "tiny",
         "--include", str(tmp_path / "tasks")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(PROJECT / "src"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|tiny |" in done.stdout
    assert "|acc" in done.stdout
