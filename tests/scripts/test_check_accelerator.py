"""The check of an accelerator: that it finds what is wrong, writes as it goes, and runs in full at a small size."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import check_accelerator
import numpy as np
import pytest
from accelerator_check import attention as checked
from accelerator_check import compared, peers
from accelerator_check.record import Finding, Recorder, StageResult, read_findings, table, write_results
from accelerator_check.sizes import FULL, SMALL
from accelerator_check.stages import STAGES

from phi3_jax.model import attention
from phi3_jax.model.attention import visible
from phi3_jax.training.flops import matmul_parameters

ROOT = Path(__file__).parents[2]


def test_a_kernel_whose_window_is_off_by_one_is_found_and_named(tmp_path, monkeypatch):
    def wrong(q_ids, kv_ids, q_start, kv_start, window):
        return visible(q_ids, kv_ids, q_start, kv_start, window and window + 1)

    monkeypatch.setattr(checked, "LIMITS", {"float32": checked.LIMITS["float32"]})
    monkeypatch.setattr(attention, "visible", wrong)  # what `xla` asks, and `chunked` does not
    recorder = Recorder(tmp_path / "found.jsonl")
    checked.check_attention(replace(SMALL, attention_tokens=64), recorder)
    bad = [one for one in recorder.findings if not one.is_right]
    windows = ("whole row, window", "packed, window")
    assert {one.name for one in bad} == {f"xla, float32, {case}, 4/2 heads of 16" for case in windows}
    assert {one.note.split(",")[0] for one in bad} == {"output", "gradients"}
    right = [one.name for one in recorder.findings if one.limit is not None and one.is_right]
    assert sum(name.startswith("chunked") for name in right) == 8
    left_out = {one.name.split(",")[0]: one.note for one in recorder.findings if one.note.startswith("left out")}
    assert left_out.keys() == {"cudnn", "splash"}
    assert "runs on TPUs, and this is a cpu" in left_out["splash"]
    assert read_findings(recorder.file) == recorder.findings


def test_a_kernel_that_breaks_is_wrong_and_the_others_are_still_compared(tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("cuDNN says no")

    first = checked.cases(SMALL)[:1]
    monkeypatch.setattr(checked, "cases", lambda _: first)
    monkeypatch.setattr(attention, "run_kind", breaks)
    recorder = Recorder(tmp_path / "found.jsonl")
    checked.check_attention(replace(SMALL, attention_tokens=16), recorder)
    broken = [one for one in recorder.findings if one.limit is not None]
    assert len(broken) == len(checked.LIMITS) * 2
    assert {(one.is_right, one.note) for one in broken} == {(False, "RuntimeError: cuDNN says no")}


def test_rows_to_attend_in_have_documents_padding_and_a_window_within():
    ids = np.asarray(checked.segment_ids(2048, 4))[0]
    assert sorted(set(ids.tolist())) == [0, 1, 2, 3, 4]
    window, spanning = checked.cases(FULL)[-1].window, checked.cases(FULL)[1].window
    shortest = min(int((np.asarray(checked.segment_ids(2048, 3)) == document).sum()) for document in (1, 2, 3))
    assert window is not None
    assert spanning is not None
    assert window < shortest < spanning < 2048
    assert (np.asarray(checked.segment_ids(64, 1)) == 1).all()


def test_the_table_and_the_json_say_what_is_wrong_and_what_was_not_reached(tmp_path):
    results = [
        StageResult(
            "attention", "wrong", 3.2, [Finding("xla | whole", 0.5, "", 0.1), Finding("x", 0.05, "", 0.1)], "xla"
        ),
        StageResult(
            "train",
            "out of time",
            60.0,
            [Finding("tokens a second", 12345.6, "", None, "4 x 2048"), Finding("MFU", None, "%")],
            "stopped",
        ),
        StageResult("PEFT", "left out", 1.0, [], "torch not installed"),
        StageResult("model", "wrong", 1.0, [Finding("logits", float("nan"), "", 1e-4)]),
    ]
    write_results(tmp_path, {"command": "c"}, results)
    raw = json.loads((tmp_path / "check.json").read_text())
    assert raw["right"] is False
    assert raw["command"] == "c"
    assert [one["right"] for one in raw["stages"][0]["findings"]] == [False, True]
    assert raw["stages"][3]["findings"][0]["value"] == "nan"
    lines = table(results).splitlines()
    assert lines[2:5] == [
        "| **attention** | wrong: xla | 3 s | | |",
        "| | xla \\| whole | 0.5 | 0.1 | **wrong** |",
        "| | x | 0.05 | 0.1 | right |",
    ]
    assert "| | tokens a second (4 x 2048) | 12,346 |  |  |" in lines
    assert "| | MFU | unknown |  |  |" in lines
    assert lines[-1] == "| | logits | nan | 0.0001 | **wrong** |"
    assert [result.is_right for result in results] == [False, False, True, False]


def test_what_was_written_when_a_stage_was_cut_off_is_kept(tmp_path):
    file = tmp_path / "train.jsonl"
    recorder = Recorder(file)
    recorder.figure("step", 0.5, "s")
    recorder.error("logits", float("inf"), 1.0)
    with file.open("a") as open_file:
        open_file.write('{"name": "tok')
    assert read_findings(file) == recorder.findings
    assert read_findings(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("script", "left", "status", "reason"),
    [
        ("echo 'ptxas | too old' >&2; exit 7", 60.0, "failed", "ptxas | too old (status 7"),
        ("kill -SEGV $$", 60.0, "failed", "it said nothing (status -11"),
        ("exec tail -f /dev/null", 1.0, "out of time", "stopped after 1 s"),
        ("exit 0", 0.2, "out of time", "not begun"),
        ("exit 0", 60.0, "done", ""),
    ],
    ids=["error", "crash", "hangs", "late", "done"],
)
def test_a_stage_that_breaks_or_hangs_ends_alone_and_says_why(tmp_path, monkeypatch, script, left, status, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    options = check_accelerator.arguments(["--output", str(tmp_path)])
    result = check_accelerator.run_stage(options, "attention", left)
    assert (result.status, result.is_right) == (status, status == "done")
    assert reason in result.reason


def test_stages_see_the_devices_that_they_need(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert check_accelerator.environment(tmp_path, "attention")["JAX_PLATFORMS"] == "cuda,cpu"
    assert check_accelerator.environment(tmp_path, "reference")["JAX_PLATFORMS"] == "cpu"
    assert check_accelerator.environment(tmp_path, "PEFT")["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "JAX_PLATFORMS" not in check_accelerator.environment(tmp_path, "attention")


def test_peers_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(peers, "NEEDED", ("torch", "no_such_package"))
    assert "no_such_package not installed" in str(peers.why_not("cpu"))
    monkeypatch.setattr(peers, "NEEDED", ())
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.9", cuda=cuda))
    assert peers.why_not("tpu") == "PyTorch does not use this tpu"
    assert peers.why_not("gpu") == "PyTorch 2.9 sees no GPU"
    assert peers.why_not("cpu") is None


def test_wrong_options_are_refused(capsys):
    for given in (["--minutes", "0"], ["--stages", "nothing"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit) as left:
            check_accelerator.arguments(given)
        assert left.value.code == 2
    assert "expected more than 0" in capsys.readouterr().err


def test_the_full_size_is_phi_3_mini_and_the_comparison_keeps_its_width():
    assert round(matmul_parameters(FULL.model) / 1e9, 1) == 3.7
    assert FULL.compared.hidden_size == FULL.model.hidden_size
    for sizes in (FULL, SMALL):
        assert sizes.compared.sliding_window is not None
        assert sizes.compared.sliding_window < sizes.compared_tokens


@pytest.mark.slow
def test_it_runs_in_full_at_a_small_size_and_finds_a_model_that_is_not_the_cpus(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "check_accelerator.py"), "--small", "--output", str(tmp_path)]
    result = subprocess.run([*command, "--minutes", "60"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    raw = json.loads((tmp_path / "check.json").read_text())
    assert [stage["name"] for stage in raw["stages"]] == [stage.name for stage in STAGES]
    assert raw["right"] is True
    figures = {stage["name"]: {one["name"] for one in stage["findings"]} for stage in raw["stages"]}
    assert {"tokens a second", "MFU by 4N", "hardware utilisation", "memory by plan's estimate"} <= figures["train"]
    assert figures["model"] >= {"dense, bfloat16: gradients", "dense, float32: losses", "nf4, float32: logits"}
    assert "| | dense, float32: losses | 0 | 0.0001 | right |" in (tmp_path / "check.md").read_text()
    # As if the CPU had come to something else.
    path = tmp_path / "reference-dense-float32.npz"
    with np.load(path) as file:
        truth = dict(file)
    np.savez(path, **{**truth, "gradients": truth["gradients"] * 1.01})
    result = subprocess.run([*command, "--stages", "model"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "model: wrong" in result.stdout
    assert "dense, float32: gradients" in result.stdout


def test_a_distance_is_relative():
    assert compared.error(np.float32([1.0, 0.0]), np.float32([0.0, 1.0])) == pytest.approx(2**0.5)
