"""tests/bench/gpu.py is ready for the day an accelerator is at hand: all of it runs at toy shapes on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(figures: list[dict[str, Any]]) -> set[tuple[str, str]]:
    assert all(r["seconds"] > 0 and r["tokens_per_second"] > 0 for r in figures)
    return {(r["shape"], r["what"]) for r in figures}


def test_experts_at_toy_shapes(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.main(["--tiny", "--only", "OLMoE layers", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    kinds = ("expert adapter", "attention LoRA", "reading alone")
    assert measured(found["figures"]) == {("OLMoE layers", w) for w in kinds}
    assert "these figures mean nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_all_of_it_at_toy_shapes(gpu: Any) -> None:
    found = gpu.main(["--tiny"])
    names = measured(found["figures"])
    for what in ("hf_lora", "full_logits_npo", "graddiff", "npo_live", "npo_cached", "rmu", "sam"):
        assert {("1B", what), ("8B", what)} <= names
    assert {("8B", "judging: answers read"), ("8B", "judging: answers decoded")} <= names


def test_time_that_is_over_is_said(gpu: Any) -> None:
    found = gpu.main(["--tiny", "--only", "OLMoE layers", "--minutes", "0"])
    assert [r["left_out"] for r in found["figures"]] == ["the time was over"] * 3
    assert "the time was over" in gpu.table(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no accelerator here; --tiny" in capsys.readouterr().err


def test_losses_with_full_logits_are_the_ones_they_stand_for(gpu: Any) -> None:
    """The hand-written GradDiff has the gradient of ours, up to how units are counted: here every row has as many targets."""
    b = gpu.Bench(True, 1.0, 2, 16, 1)
    base = b.model(gpu.DENSE["1B"])
    model = gpu.get_peft_model(base, gpu.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        torch.nn.init.normal_(p, std=0.05)
    forget, retain = b.batch(320, 1), b.batch(320, 2)
    grads: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step
    try:
        torch.optim.AdamW.step = lambda self: grads.append([p.grad.clone() for p in params])  # type: ignore[assignment, method-assign]
        gpu.full_logits(model, forget, retain, False)()
        gpu.ours(b, model, [{"forget": forget, "retain": retain}], gpu.TERMS)()
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    full, mine = (torch.cat([g.flatten() for g in row]) for row in grads)
    assert float(torch.cosine_similarity(full, mine, dim=0)) > 0.9999
