"""What is taken out of an adapter is what acts on dominant activations, and nothing else of it changes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_unlearn.analysis import sanitize as job
from peft_unlearn.attribution import moments
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.training.recipe import prepare

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "adapters" / "published"
sys.path.append(str(ROOT / "tests" / "tuners"))


@pytest.mark.parametrize("width", [6, 40])
def test_the_projection_is_the_ridge_minimizer(width, monkeypatch):
    """Against the normal equations in float64: D (I + strength C / m) = B A, for whole moments and for kept directions."""
    monkeypatch.setattr(moments, "EXACT", 10)
    monkeypatch.setattr(moments, "KEPT", 20)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 5, generator=g) @ torch.randn(
        5, width, generator=g
    )  # of rank 5, so that 20 directions hold it all
    a, b = torch.randn(3, width, generator=g), torch.randn(7, 3, generator=g)
    moment = moments.Moment(width)
    for some in x.split(37):
        moment.add(some)
    c = x.double().T @ x.double()
    c /= c.trace() / width
    want = torch.linalg.solve(torch.eye(width, dtype=torch.float64) + 2.5 * c, (b @ a).double(), left=False)
    new = a.clone()
    sizes = moments.project(new, b, moment, 2.5)
    torch.testing.assert_close((b @ new).double(), want, atol=2e-4, rtol=2e-4)
    d = (b @ a).double()
    found = [d.square().sum(), want.square().sum(), (d @ c @ d.T).trace(), (want @ c @ want.T).trace()]
    torch.testing.assert_close(sizes, torch.stack(found), rtol=1e-3, atol=1e-3)
    hard = a.clone()
    moments.project(hard, b, moment, float("inf"))
    assert (hard @ x.T).abs().max() < 1e-3 * (a @ x.T).abs().max()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text"])
def test_experts_by_the_tokens_that_are_routed_to_them(family):
    """The inputs of each adapted expert, against those that its own forward is given."""
    import families as f

    model = f.adapted(f.base(family), experts={1: [0, 2]}).eval()
    layer = next(m for m in model.modules() if isinstance(m, moments.ExpertsLayer))
    rows = [
        {"input_ids": r.tolist(), "labels": r.tolist(), "attention_mask": [1] * len(r)} for r in f.batch()["input_ids"]
    ]
    found = moments.activations(model, rows)
    given: dict[tuple[str, int], list[torch.Tensor]] = {}
    project = type(layer)._project

    def spy(self, x, p, e, factors):
        given.setdefault((p, e), []).append(x.detach())
        return project(self, x, p, e, [])

    layer._project = spy.__get__(layer)  # type: ignore[method-assign]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    seen = {k: torch.cat(v) for k, v in given.items() if sum(map(len, v))}
    assert seen and {(p, e) for _, p, e in found} == set(seen)
    for (_, p, e), moment in found.items():
        x = seen[p, e]
        assert moment.n == len(x)
        torch.testing.assert_close(moment.seen, x.T @ x, atol=1e-4, rtol=1e-4)
    keys = [key for key, _, _ in moments.factors(model)]
    assert len(keys) == len(set(keys)) and {k[1:] for k in keys} >= {("gate_up", 0), ("down", 2)}


def few(folder: Path, bundle: str) -> str:
    """A bundle in files of three rows of each set."""
    folder.mkdir()
    found = ForgetRetain.load(bundle)
    for name in ("forget", "retain"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in (found.rows(name) or [])[:3]))
    return str(folder)


def test_a_foreign_adapter_and_its_lineage(tmp_path):
    """PEFT's two files alone, as they come from elsewhere: B and shapes stay, A moves, and the new folder says what it is."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(PUBLISHED / "npo" / name, theirs)
    done = job.sanitize(
        theirs, tmp_path / "clean", base="embedded:people", data=few(tmp_path / "data", "embedded:people"), strength=0.3
    )
    clean, old = read_adapter(tmp_path / "clean"), load_file(theirs / "adapter_model.safetensors")
    new = load_file(tmp_path / "clean" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    assert all(torch.equal(new[k], old[k]) == ("lora_B" in k) for k in old)
    assert done.sanitized == read_adapter(PUBLISHED / "npo").adapter_id and done.adapter_id == clean.adapter_id
    record = clean.manifest.method["sanitize"]
    assert record["from"] == done.sanitized and record["strength"] == 0.3 and clean.recipe["sanitize"] == record
    assert done.sanitized in (clean.path / "README.md").read_text() and clean.eval is None
    assert (
        0 < done.effect_left < 1
        and done.before["kl"] > 0
        and done.base["forget/probability"] > done.before["forget/probability"]
    )
    assert "forget/probability" in str(done) and json.dumps(done.to_dict())
    with pytest.raises(UserError, match="then changed by `peft-unlearn sanitize`"):
        prepare(clean.recipe, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, change, words):
    theirs = tmp_path / "theirs"
    shutil.copytree(PUBLISHED / "npo", theirs, ignore=shutil.ignore_patterns("forget.json"))
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=words):
        job.sanitize(theirs, tmp_path / "clean", base="embedded:people", data="embedded:people")
    assert not (tmp_path / "clean").exists()


def test_wrong_requests(tmp_path):
    with pytest.raises(UserError, match="is itself one of the adapters"):
        job.sanitize(PUBLISHED / "npo", PUBLISHED / "npo")
    with pytest.raises(UserError, match="positive number"):
        job.sanitize(PUBLISHED / "npo", tmp_path / "out", strength=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        job.sanitize(tmp_path / "empty", tmp_path / "out")


@pytest.mark.slow
def test_an_expert_adapter_keeps_both_of_its_forms(tmp_path):
    from peft_unlearn.sharing.verify import verify

    done = job.sanitize(PUBLISHED / "domains-top1", tmp_path / "clean", n=4)
    found = verify(tmp_path / "clean")
    assert found.verdict == "ok", str(found)
    assert done.after["kl"] < done.before["kl"] and (tmp_path / "clean" / "expert_lora").is_dir()
