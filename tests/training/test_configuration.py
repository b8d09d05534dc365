"""`UnlearnConfig`, recipes as configuration, and the registry's schema."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from typing import Annotated, Any, Literal

import pytest

from peft_unlearn import registry
from peft_unlearn.data.embedded import asset
from peft_unlearn.errors import Errors, UserError, nearest
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.registry import Range, Source
from peft_unlearn.training.adapt import peft_config
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.recipe import from_recipe, notes, prepare

REAL = sorted(asset("recipes", "real").glob("*.yaml"))
RECIPE: dict[str, Any] = {"terms": {"forget": {"npo": {}}, "retain": {"nll": {}}}, "train": {"use_cpu": True}}
SOURCE = Source("none", "https://example.org", 2025)


def refused(recipe: dict[str, Any]) -> str:
    with pytest.raises(UserError) as e:
        from_recipe(recipe, "out")
    return str(e.value)


def test_defaults():
    c = UnlearnConfig(output_dir="a/b", use_cpu=True)
    assert c.output_dir == "a/b" and c.work_dir == "a/b.work"
    assert UnlearnConfig(output_dir="a/b/", use_cpu=True).work_dir == "a/b.work"
    assert c.remove_unused_columns is False and c.weight_decay == 0 and c.logging_nan_inf_filter is False
    assert str(getattr(c.lr_scheduler_type, "value", c.lr_scheduler_type)) == "constant" and c.max_grad_norm == 1.0
    assert [(t.gradient, t.batch, t.objective.name, t.weight, dict(t.hyper)) for t in c.term_list] == [
        ("forget", "forget", "npo", 1.0, {"beta": 0.1}),
        ("retain", "retain", "nll", 5.0, {}),
    ]
    assert c.rule_method is not None and c.rule_method[0].name == "sum"


def test_recipe_becomes_configuration():
    c = from_recipe(
        {
            "terms": {"forget": {"npo": {"beta": 0.2}, "ga": {"weight": 0.5}}, "constraint": {"nll": {}}, "x": {"kl": {"batch": "retain"}}},
            "rule": "sum", "reference": "base", "seed": 7, "train": {"learning_rate": 1e-3, "max_steps": 5, "use_cpu": True},
            "data": {"forget": "f.jsonl", "retain": "r.jsonl", "anchor": "retain", "max_length": 64, "on_overflow": "chunk"},
            "eval": {"suite": "people", "every": 2, "keep_best": True},
        },
        "out",
    )  # fmt: skip
    assert [(t.gradient, t.batch, t.weight) for t in c.term_list] == [
        ("forget", "forget", 1.0), ("forget", "forget", 0.5), ("constraint", "retain", 1.0), ("x", "retain", 1.0),
    ]  # fmt: skip
    assert (c.seed, c.reference, c.anchor, c.max_length, c.on_overflow, c.learning_rate, c.max_steps) == (
        7, "base", "retain", 64, "chunk", 1e-3, 5,
    )  # fmt: skip
    assert (
        c.load_best_model_at_end and c.metric_for_best_model == "forget_at_floor" and c.eval_steps == c.save_steps == 2
    )
    assert c.greater_is_better is False


def test_gradient_checkpointing_is_never_reentrant():
    c = UnlearnConfig(output_dir="a", gradient_checkpointing=True, use_cpu=True)
    assert c.activation_checkpointing and c.activation_checkpointing_kwargs["use_reentrant"] is False
    with pytest.raises(UserError, match="use_reentrant"):
        UnlearnConfig(
            output_dir="a",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            use_cpu=True,
        )


def test_survives_copy_and_pickle():
    c = from_recipe(RECIPE, "out")
    for other in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert other.term_list == c.term_list and other.rule_method == c.rule_method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": None}, "terms are missing"),
        ({"terms": {}}, "terms: give at least one"),
        ({"terms": ["npo"]}, "terms: give at least one"),
        ({"terms": {"forget": {}}}, "terms.forget: name an objective"),
        ({"terms": {"forget": {"npoo": {}}}}, "no objective 'npoo'. Did you mean 'npo'?"),
        ({"terms": {"forget": {"npo": {"betta": 1}}}}, "no hyper-parameter 'betta'. Did you mean 'beta'?"),
        ({"terms": {"forget": {"npo": {"beta": 0}}}}, "beta=0 is outside (0, inf)"),
        ({"terms": {"forget": {"npo": {"beta": "high"}}}}, "beta must be a number, not 'high'"),
        ({"terms": {"forget": {"npo": {"beta": True}}}}, "beta must be a number, not True"),
        ({"terms": {"forget": {"npo": {"beta": float("nan")}}}}, "beta must be finite"),
        ({"terms": {"forget": {"npo": {"beta": None}}}}, "beta must be a number, not null"),
        ({"terms": {"forget": {"npo": 3}}}, "mapping"),
        ({"terms": {"forget": {"npo": {"weight": "2x"}}}}, "weight must be"),
        ({"terms": {"forget": {"npo": {"weight": float("inf")}}}}, "weight must be"),
        ({"terms": {"others": {"nll": {"batch": 3}}}}, "batch names a set of the data"),
        ({"rule": "summ"}, "no rule 'summ'. Did you mean 'sum'?"),
        ({"rule": {"sum": {"x": 1}}}, "rule 'sum' has no hyper-parameter 'x'"),
        ({"rule": {"sum": 3}}, "mapping"),
        ({"rule": ["sum", "sum"]}, "rule: give one name"),
        ({"reference": "after"}, "reference='after' is not one of before, base"),
        ({"reference": "adapter:"}, "is not one of before, base"),
        ({"reference": 5}, "reference must be text"),
        ({"reference": "precomputed", "terms": {"retain": {"representation_retention": {"layer": 0}}}}, "need its inner layers"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "lucky"}, "seed must be a whole number, not 'lucky'"),
        ({"train": {"learning_rte": 1}}, "no 'learning_rte'. Did you mean 'learning_rate'?"),
        ({"train": {"learning_rate": "fast"}}, "learning_rate must be a number, not 'fast'"),
        ({"train": {"learning_rate": -1.0}}, "learning_rate=-1.0 must be"),
        ({"train": {"max_steps": 1.5}}, "max_steps must be a whole number, not 1.5"),
        ({"train": {"bf16": "yes"}}, "bf16 must be true or false"),
        ({"train": {"output_dir": "elsewhere"}}, "output_dir does not belong there"),
        ({"train": 5}, "train is a section with keys, not 5"),
        ({"train": {"eval_strategy": "sometimes"}}, "sometimes"),
        ({"train": {"fp16": True, "use_cpu": True}}, "fp16"),
        ({"train": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"train": {"torch_compile": True}}, "torch_compile"),
        ({"train": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size=0"),
        ({"data": {"anchor": "holdout"}}, "anchor='holdout' is not one of forget, retain"),
        ({"data": {"on_overflow": "ignore"}}, "on_overflow='ignore'"),
        ({"data": {"per_anchor": 0}}, "per_anchor must be a whole number, at least 1"),
        ({"data": {"per_anchor": "two"}}, "per_anchor must be a whole number, at least 1, or {set: number of rows}, not 'two'"),
        ({"data": {"max_length": 1}}, "max_length=1"),
        ({"eval": {"evry": 3}}, "eval has no 'evry'. Did you mean 'every'?"),
        ({"eval": {"every": 0.5}}, "eval.every must be a whole number"),
        ({"eval": {"every": True}}, "eval.every must be a whole number"),
        ({"eval": {"keep_best": True}}, "eval.every"),
        ({"eval": {"every": 2, "stop_below": "low"}}, "eval.stop_below must be a number"),
        ({"eval": [1]}, "eval is a section with keys"),
    ],
    ids=str,
)  # fmt: skip
def test_malformed_recipes(change, message):
    assert message in refused({**RECIPE, **change})


def test_deepspeed_and_fsdp_are_refused(tmp_path):
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 1}')
    for key, value in (("deepspeed", str(tmp_path / "ds.json")), ("fsdp", "full_shard")):
        with pytest.raises((UserError, ImportError, ValueError)) as e:
            UnlearnConfig(output_dir="a", use_cpu=True, **{key: value})
        assert key in str(e.value).lower()


def test_every_mistake_is_shown_at_once():
    told = refused(
        {**RECIPE, "terms": {"forget": {"npo": {"beta": -1}}}, "rule": "max", "train": {"lr": 1}, "reference": "x"}
    )
    for part in ("beta=-1", "no rule 'max'", "no 'lr'", "reference='x'"):
        assert part in told


# --- registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def method():
    @registry.objective("schema_for_test", unit="token", source=SOURCE, needs=("logp",))
    def schema_for_test(
        p: Any,
        *,
        k: Annotated[int, Range(1, 5)],
        rate: Annotated[float | None, Range(0, 1)] = None,
        flag: bool = False,
        mode: Literal["a", "b"] = "a",
        names: list[str] | None = None,
    ) -> Any:
        """One line.

        More.
        """

    yield registry._METHODS["objective"].pop("schema_for_test")


@pytest.mark.parametrize(
    ("hyper", "complaint"),
    [
        ({"k": 2}, None), ({"k": 2.0, "rate": 1, "mode": "b", "names": ["x"]}, None), ({"k": 1, "rate": None}, None),
        ({}, "needs k"), ({"k": 0}, "k=0 is outside [1, 5]"), ({"k": 1.5}, "whole number"), ({"k": float("inf")}, "finite"),
        ({"k": float("nan")}, "finite"), ({"k": True}, "whole number"), ({"k": None}, "not null"),
        ({"k": 1, "rate": 1.1}, "outside [0, 1]"),
        ({"k": 1, "flag": 1}, "true or false"), ({"k": 1, "mode": "c"}, "not one of ['a', 'b']"), ({"k": 1, "names": "x"}, "list"),
        ({"k": 1, "rat": 1}, "Did you mean 'rate'?"), ([1], "mapping"),
    ],
    ids=str,
)  # fmt: skip
def test_the_signature_is_the_schema(method, hyper, complaint):
    found = method.check(hyper)
    assert (not found) if complaint is None else any(complaint in f for f in found)


def test_method_to_dict(method):
    about = method.to_dict()
    assert about["summary"] == "One line." and about["unit"] == "token" and about["needs"] == ["logp"]
    assert about["params"]["k"] == {"type": "int", "default": None, "min": 1, "max": 5}
    assert about["params"]["mode"]["choices"] == ["a", "b"]
    assert method.resolve({"k": 3}) == {"k": 3, "rate": None, "flag": False, "mode": "a", "names": None}


def test_registering_wrongly_is_a_type_error():
    with pytest.raises(TypeError, match="unknown needs"):
        registry.objective("x", unit="token", source=SOURCE, needs=("logits_of_mars",))
    with pytest.raises(TypeError, match="no schema"):

        @registry.objective("x", unit="token", source=SOURCE)
        def x(p: Any, *, a: set[int] = frozenset()) -> Any: ...

    with pytest.raises(TypeError, match="registered twice"):
        registry._load()

        @registry.objective("npo", unit="token", source=SOURCE)
        def y(p: Any) -> Any: ...


def test_every_registered_method_has_what_a_card_needs():
    for m in registry.methods():
        about = m.to_dict()
        assert about["summary"] and len(about["source"]["paper"]) > 3, m.name
        assert about["source"]["url"].startswith("https://") and 2000 < about["source"]["year"] < 2030, m.name
        assert registry.get(m.kind, m.name.replace("_", "-")) is m


def test_errors_and_nearest():
    e = Errors()
    e.raise_if_any("x")
    e.add("a")
    with pytest.raises(UserError, match=r"^x: a$"):
        e.raise_if_any("x")
    e.add("b")
    with pytest.raises(UserError, match=r"x: 2 problems\n  1\. a\n  2\. b"):
        e.raise_if_any("x")
    assert nearest("sim-npo", ["simnpo", "npo"]) == " Did you mean 'simnpo'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b." and nearest("z", []) == ""


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({"adam_beta1": 1.5, "report_to": "wandb", "save_strategy": "best", "deepspeed": "x.json", "typo": 1},
         ("beta parameter at index 0: 1.5", "report_to: wandb", "save_strategy=best", "deepspeed is not", "no 'typo'")),
        ({"optim": "adamw_8bit", "deepspeed": {"a": 1}, "max_steps": 0}, ("bitsandbytes", "deepspeed is not", "no steps")),
        ({"optim": "galore_adamw", "report_to": {}}, ("the optimizer galore_adamw cannot be made", "report_to: {}")),
        ({"lr_scheduler_type": "cosine_with_min_lr", "accelerator_config": "x"}, ("the schedule cosine_with", "a mapping, not 'x'")),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "x"}, ("kwargs must be a mapping, not 'x'",)),
        ({"num_train_epochs": float("nan"), "per_device_train_batch_size": 2**80}, ("num_train_epochs=nan", "batch_size=")),
        ({"allow_untrained": [5], "log_level": "x", "label_names": 5}, ("a list of texts, not [5]", "log_level", "label_names")),
        ({"optim": "nope", "deepspeed": "x"}, ("nope is not a valid", "deepspeed is not")),
        ({"use_liger_kernel": True, "remove_unused_columns": True}, ("use_liger_kernel", "remove_unused_columns")),
    ],
)  # fmt: skip
def test_values_that_would_fail_far_inside_a_run_are_told_together(train, parts):
    if train.get("optim") == "adamw_8bit" and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is there")
    with pytest.raises(UserError) as e:
        from_recipe({"terms": {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {}}}, "train": train}, "out")
    for part in parts:
        assert part in str(e.value), str(e.value)


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_recipes_for_real_models_are_understood_and_say_whether_they_were_run(path):
    recipe, text = load_recipe(path), path.read_text("utf-8")
    config = from_recipe({**recipe, "train": {**recipe["train"], "bf16": False, "use_cpu": True}}, "out")
    peft_config(recipe["adapter"])
    assert config.learning_rate <= 1e-4, "the small bases' rates destroy a pretrained model"
    assert recipe["name"] == path.stem and f"recipes/real/{path.name}" in text
    measured = {r["request"] for r in json.loads((path.parents[3] / "docs/real.json").read_text("utf-8"))["runs"]}
    assert "NOT RUN HERE" in text or any(request in text for request in measured)


def test_a_recipe_that_keeps_nothing_says_so(tmp_path):
    recipe = {**RECIPE, "base": "embedded:people", "data": "embedded:people", "adapter": {"type": "lora", "r": 2}}
    assert notes(prepare(recipe, tmp_path / "a")) == []
    (line,) = notes(prepare({**recipe, "terms": {"forget": {"npo": {}}}}, tmp_path / "a"))
    assert "no term keeps anything" in line
