"""What is refused about methods, in which words, and that nothing is loaded, trained or lost by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

import peft_unlearn
from peft_unlearn import registry
from peft_unlearn.errors import UserError
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer, last_checkpoint

GA = {"terms": {"forget": {"ga": {}}, "retain": {"nll": {}}}}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        # unknown names: the nearest spelling
        ({"terms": {"forget": {"npq": {}}}}, r"there is no objective 'npq'.*Did you mean 'npo'"),
        ({"terms": {"forget": {"idk-dop": {}}}}, r"Did you mean 'idk_dpo'"),
        ({"terms": {"forget": {"xyzzy": {}}}}, r"there is no objective 'xyzzy'.*Known: .*npo"),
        ({"rule": "gruu"}, r"there is no rule 'gruu'.*'gru'"),
        ({"smoothing": "sma"}, r"there is no smoothing 'sma'.*'sam'"),
        ({"averaging": "ema"}, r"there is no averaging 'ema'"),
        ({"step_size": "gem"}, r"there is no step_size 'gem'.*'gen'"),
        ({"terms": {"forget": {"npo": {"bata": 1}}}}, r"has no hyper-parameter 'bata'.*'beta'"),
        ({"rule": {"gru": {"gama": 1}}}, r"has no hyper-parameter 'gama'.*'gamma'"),
        ({"smoothing": {"sam": {"rh": 1}}}, r"has no hyper-parameter 'rh'.*'rho'"),
        # ranges: named
        ({"terms": {"forget": {"npo": {"beta": 0}}}}, r"beta=0 is outside \(0, inf\)"),
        ({"terms": {"forget": {"wga": {"beta": -1.0}}}}, r"beta=-1.0 is outside \[0, inf\)"),
        ({"terms": {"forget": {"ga": {"cap": 1.5}}}}, r"cap=1.5 is outside \(0, 1\]"),
        ({"terms": {"forget": {"ga": {"select": 0}}}}, r"select=0 is outside \(0, 1\]"),
        ({"terms": {"forget": {"ga": {"temperature": 0}}}}, r"temperature=0 is outside \(0, inf\)"),
        ({"terms": {"forget": {"npo": {"beta": "big"}}}}, r"beta must be a number, not 'big'"),
        ({"terms": {"forget": {"npo": {"beta": float("nan")}}}}, r"beta must be finite"),
        ({"terms": {"forget": {"ga": {"weight": float("inf")}}}}, r"weight must be a finite number"),
        ({"terms": {"forget": {"ga": 3}}}, r"terms.forget.ga: hyper-parameters are a mapping"),
        ({"rule": {"gru": {"gamma": 0}}}, r"gamma=0 is outside \(0, 1\]"),
        ({"rule": {"gru": {"cos_floor": 0.5}}}, r"cos_floor=0.5 is outside \[-1, 0\]"),
        ({"rule": {"gru": 0.8}}, r"rule 'gru': hyper-parameters are a mapping"),
        ({"rule": {"gru": {"scope": "row"}}}, r"scope='row' is not one of global, layer, tensor"),
        ({"rule": {"gru": {}, "ngdiff": {}}}, r"rule: give one name"),
        ({"smoothing": {"rs": {"n": 0}}}, r"n=0 is outside \[1, inf\)"),
        ({"smoothing": {"rs": {"n": 2.5}}}, r"n must be a whole number"),
        ({"smoothing": {"sam": {"space": "moon"}}}, r"space='moon' is not one of adapter, base"),
        ({"smoothing": {"gp": {"space": "base"}}}, r"smoothing 'gp' works in space adapter only"),
        ({"averaging": {"wa": {"every": 0}}}, r"every=0 is outside \[1, inf\)"),
        ({"averaging": {"wa": {"start": 90}}, "max_steps": 50}, r"starts at step 90, and the run ends at step 50"),
        # something is missing
        ({"terms": {"forget": {"rmu": {}}}}, r"objective 'rmu' needs layer"),
        ({"terms": {"forget": {"ga": {}}}, "rule": "gru"}, r"gru.*constraint or retain"),
        ({"terms": {"forget": {"ga": {}}}, "rule": "ngdiff"}, r"ngdiff.*needs the gradient retain"),
        ({"terms": {"forget": {"pdu": {}}}, "rule": "primal_dual"}, r"primal_dual.*needs the gradient retain"),
        ({"terms": {"retain": {"nll": {}}}, "smoothing": "sam"}, r"works on the gradient named forget"),
        ({"terms": {"forget": {"dpo": {}, "idk": {}}}}, r"would need several winner answers \(refusal, row\)"),
        (
            {"terms": {"forget": {"representation_retention": {"layer": 0}}}, "reference": "precomputed"},
            r"representation_retention need its inner layers",
        ),
        ({"terms": {"other": {"ga": {"batch": ""}}}}, r"batch names a set"),
        ({"per_anchor": {"retian": 2}}, r"no term reads the set 'retian'. Did you mean 'retain'"),
        ({"per_anchor": {"retain": 0.01}}, r"retain 0.01 of \d+ rows is no row in a step"),
    ],
)
def test_configuration_refuses(wrong, says):
    with pytest.raises(UserError, match=says):
        UnlearnConfig(output_dir="unused", use_cpu=True, **{**GA, **wrong})


def test_everything_at_once():
    with pytest.raises(UserError) as e:
        UnlearnConfig(
            output_dir="unused", use_cpu=True, terms={"forget": {"npq": {}, "wga": {"beta": -1}}, "retain": {"kll": {}}},
            rule="gruu", smoothing={"sam": {"rho": -1}},
        )  # fmt: skip
    for part in ("'npo'", "beta=-1 is outside", "'kl'", "'gru'", "rho=-1 is outside [0, inf)", "5 problems"):
        assert part in str(e.value)


@pytest.mark.parametrize("kind", ["objective", "rule", "smoothing", "averaging", "step_size"])
def test_every_range_is_enforced_and_named(kind):
    """One step beyond each end of every declared range, and a wrong type for every parameter."""
    seen = 0
    for m in registry.methods(kind):
        for p in m.params.values():
            if p.range is not None:
                beyond = [x for x in (p.range.min, p.range.max) if x is not None]
                for x in beyond:
                    step = -1 if x == p.range.min else 1
                    (complaint,) = [
                        c for c in m.check({**dict.fromkeys(_required(m), 0), p.name: x + step}) if p.name in c
                    ]
                    assert str(p.range) in complaint and m.name in complaint
                    seen += 1
            if p.type in ("float", "int", "bool"):
                assert m.check({**dict.fromkeys(_required(m), 0), p.name: "text"})
    assert seen or kind == "none"


def _required(m: Any) -> list[str]:
    return [p.name for p in m.params.values() if p.required]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"terms": {"forget": {"dpo": {}}}}, r"dpo: forget set: row 0 has no text in the field 'alternate'"),
        ({"terms": {"forget": {"rmu": {}}}}, r"objective 'rmu' needs layer"),
        ({"terms": {"forget": {"rmu": {"layer": 4}}}}, r"rmu: layer 4 does not exist: the base has blocks 0 to 3"),
        (
            {"terms": {"forget": {"ga": {}}, "retain": {"nll": {}}}, "data": {"forget": "embedded:people#forget"}},
            r"the terms read the retain set, and the data have none",
        ),
        (
            {"terms": {"forget": {"ga": {}}, "retain": {"representation_retention": {"layer": -5}}}},
            r"layer -5 does not exist",
        ),
        ({"terms": {"forget": {"npo": {"beta": -1}}}}, r"beta=-1 is outside \(0, inf\)"),
    ],
)
def test_a_recipe_is_refused_before_any_model_is_loaded(recipe, says, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=says):
        peft_unlearn.train({"base": "embedded:people", "data": "embedded:people", **recipe}, out)
    assert not out.exists() and not Path(f"{out}.work").exists()


# --- while training -----------------------------------------------------------------------------------------------------


def trainer(out: Path, moved: bool = True, terms: Any = None, **over: Any) -> UnlearnTrainer:
    args = UnlearnConfig(
        output_dir=str(out), terms=terms or {"forget": {"npo": {}}, "retain": {"nll": {}}}, per_device_train_batch_size=4,
        **{"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "disable_tqdm": True,
           **over},
    )  # fmt: skip
    data = {"forget": tiny.rows(4, "f", seed=1), "retain": tiny.rows(4, "r", seed=2)}
    return UnlearnTrainer(tiny.lora(tiny.llama(), moved=moved), args, data=data, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("smoothing", [None, "sam", "gp"])
def test_a_gradient_that_is_not_finite(tmp_path, smoothing):
    """Names the step, the term and tensors; the last good checkpoint is whole and resumes."""
    t = trainer(tmp_path / "a", smoothing=smoothing)
    inner = t.training_step

    def poisoned(*a: Any, **k: Any) -> Any:
        if t.state.global_step == 2:
            p = next(p for n, p in t.bare.named_parameters() if "layers.1.mlp.down_proj.lora_B" in n)
            with torch.no_grad():
                p[0, 0] = float("nan")
        return inner(*a, **k)

    t.training_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"^step 3: the gradient of forget \(npo\) is not finite .*in \d+ tensors, first .*lora_"
    ):
        t.train()
    good = last_checkpoint(tmp_path / "a.work")
    assert good is not None and good.endswith("checkpoint-2")
    again = trainer(tmp_path / "b", smoothing=smoothing)
    again.train(resume_from_checkpoint=good)
    assert again.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in again.bare.parameters())


def test_a_loss_that_is_not_finite_names_its_term(tmp_path):
    t = trainer(tmp_path, terms={"forget": {"ga": {}}, "retain": {"nll": {"weight": 1e39}}})
    with pytest.raises(UserError, match=r"step 1: the gradient of retain \(nll\) is not finite"):
        t.train()
    assert last_checkpoint(tmp_path) is None


def test_all_gradients_zero(tmp_path):
    t = trainer(tmp_path, moved=False, terms={"forget": {"neg_kl": {}}, "retain": {"kl": {}}})
    with pytest.raises(UserError, match=r"step 1: the gradients of forget, retain are all exactly zero"):
        t.train()


@pytest.fixture(scope="module")
def forget_alone(tmp_path_factory) -> Any:
    """The first update of the forget term without any other."""
    t = trainer(tmp_path_factory.mktemp("a"), False, {"forget": {"ga": {}}}, max_steps=1, save_strategy="no")
    t.train()
    return t.last_step.update


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rule", [m.name for m in registry.methods("rule")])
def test_one_zero_gradient_is_fine(tmp_path, forget_alone, rule, scope):
    """kl at step 0 is exactly zero and says nothing about the direction: the update is the forget gradient's, and it goes on."""
    t = trainer(
        tmp_path,
        moved=False,
        terms={"forget": {"ga": {}}, "retain": {"kl": {}}},
        rule={rule: {"scope": scope}},
        max_steps=1,
        save_strategy="no",
    )
    t.train()
    assert t.last_step.norms["retain"] == 0.0 and t.last_step.norms["forget"] > 0
    space = t.window.space
    cos = float(space.dot(t.last_step.update, forget_alone))
    cos /= float(space.norm(t.last_step.update)) * float(space.norm(forget_alone))
    if scope == "global" or rule != "ngdiff":  # per tensor ngdiff gives every tensor the same length
        assert cos == pytest.approx(1.0, abs=1e-5)
    longer = trainer(
        tmp_path / "longer",
        moved=False,
        terms={"forget": {"ga": {}}, "retain": {"kl": {}}},
        rule={rule: {"scope": scope}},
        max_steps=3,
        save_strategy="no",
    )
    longer.train()
    assert longer.last_step.norms["retain"] > 0
    assert all(torch.isfinite(p).all() for p in longer.bare.parameters())
