"""On the embedded people: weights back to what the files say, and a retain model that has nothing to remember."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from peft_unlearn.attacks.requests import wanted
from peft_unlearn.attacks.run import run_attacks
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.folder.base import load_base, load_tokenizer
from peft_unlearn.folder.digest import digest_live


@pytest.mark.slow
def test_the_base_and_the_retain_model_after_every_attack_on_weights():
    paths = {"base": embedded.base_path("people"), "retain_only": embedded.retain_model_path("people")}
    models = {name: load_base(path) for name, path in paths.items()}
    found = run_attacks(
        {name: lambda m=m: nullcontext(m) for name, m in models.items()},
        wanted([("relearn", {}), ("benign", {"steps": 3}), ("quantize", {"format": "int4"}), ("quantize", {"format": "nf4"})]),
        ForgetRetain.load("embedded:people?seed=0"),
        load_tokenizer(paths["base"]),
        checkpoints=paths,
    )  # fmt: skip
    for name, model in models.items():
        assert digest_live(model, paths[name]).verdict == "same"
    assert found.rows == {"scored": 80, "shown": 20, "seed": 0}
    relearned = found.attacks["relearn"]
    assert relearned.subjects["base"]["after"]["value_accuracy"] > 0.9  # what is known stays known
    assert relearned.subjects["retain_only"]["after"]["value_accuracy"] < 0.1  # 20 facts do not teach the other 80
    for one in found.attacks.values():
        share = one.recovery["retain_only"]["value_accuracy"]
        assert share.value == pytest.approx(0.0, abs=0.08) and share.ci95[0] <= 0.0
