"""Hidden states of one model in another: what must come out where the answer is known."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from eval_helpers import qa, tiny
from peft import LoraConfig, get_peft_model

from peft_unlearn.data.collate import pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.evaluation.measured import Unmeasured
from peft_unlearn.evaluation.metrics.depth import fact_row, read_depth, read_patched, states
from peft_unlearn.evaluation.score import on_one_model, score
from peft_unlearn.forward import Pass

ROWS = [qa(i, "old") for i in range(5)]
KEPT = [qa(i, "kept") for i in range(5)]


def olmoe(seed: int = 0):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=259, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    return model


def adapted(base):
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def family(tokenizer):
    """(base, retain-only) from one start: both have learned the kept rows, the base then the forget rows too."""
    from peft_unlearn.data.collate import encode

    model, retain_model = tiny(1), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kept, both = (pad([encode(*to_text(r, tokenizer), tokenizer)[0] for r in rows], 0) for rows in (KEPT, KEPT + ROWS))
    for step in range(180):
        if step == 90:
            retain_model = deepcopy(model).eval()
        model(**(kept if step < 90 else both)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), retain_model


@pytest.fixture
def encoded(tokenizer):
    return [fact_row(*to_text(r, tokenizer), r["value"], tokenizer) for r in ROWS]


@pytest.mark.parametrize("make", [tiny, olmoe])
def test_a_model_in_itself_changes_nothing(make, encoded):
    model = make()
    own, patched = read_depth(model, lambda: nullcontext(model), encoded, 0, token_budget=200)
    assert patched.shape == (5, len(model.model.layers))
    assert (patched == own[:, None]).all()  # bit for bit


@pytest.mark.parametrize("make", [tiny, olmoe])
def test_the_last_block_gives_the_unlearned_models_own_value(make, encoded):
    model = adapted(make())
    subjects = on_one_model(model, {"base": None, "adapter": "default"})
    with subjects["adapter"]() as live:
        own, patched = read_depth(live, subjects["base"], encoded, 0, token_budget=200)
        direct = [per_row(live, row) for row in encoded]
    with subjects["base"]() as live:
        base = [per_row(live, row) for row in encoded]
    assert own == pytest.approx(base, abs=1e-5)
    assert patched[:, -1] == pytest.approx(direct, abs=1e-5)  # same norm, same head
    assert np.abs(np.array(direct) - base).min() > 1e-3  # the adapter does something
    assert np.abs(patched[:, 0] - patched[:, -1]).max() > 1e-3  # and layers differ


def per_row(model, row):
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    return np.mean([float(logp[t - 1, y]) for t, y in enumerate(row["labels"]) if y != -100])


def test_a_patch_is_the_definition(encoded):
    """Block by block by hand: states of one model at the positions before the fact, the other's own elsewhere."""
    source, reader, layer = tiny(1), tiny(2), 0
    tensors = pad(encoded[:1], 0)
    at = (tensors["labels"][0, 1:] != -100).nonzero().squeeze(1)
    with torch.no_grad():
        theirs = source(**{k: tensors[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
        mine = reader(**{k: tensors[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
        h = mine.hidden_states[layer + 1].clone()
        h[0, at] = theirs.hidden_states[layer + 1][0, at]
        rotary = reader.model.rotary_emb(h, torch.arange(h.shape[1])[None])
        mask = torch.full((1, 1, h.shape[1], h.shape[1]), float("-inf")).triu(1)
        for block in reader.model.layers[layer + 1 :]:
            out = block(h, attention_mask=mask, position_embeddings=rotary)
            h = out if torch.is_tensor(out) else out[0]
        logp = reader.lm_head(reader.model.norm(h))[0].log_softmax(-1)
        expected = [float(logp[t, tensors["input_ids"][0, t + 1]]) for t in at]
        got = read_patched(reader, tensors, layer, states(source, tensors)[layer])
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_no_hook_stays(encoded):
    model = tiny()
    tensors = pad(encoded, 0)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with torch.no_grad():
        taken = states(model, tensors)
        read_patched(model, tensors, 1, taken[1])
        assert hooks() == 0
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
            read_patched(model, tensors, 1, taken[1][:1, :3])  # does not fit
    assert hooks() == 0


def test_targets_are_the_value_or_the_whole_answer(tokenizer):
    prompt, answer = "Question: Where?\nAnswer:", " Born in OSLO, it is said."
    row = fact_row(prompt, answer, "Oslo", tokenizer)
    assert tokenizer.decode([y for y in row["labels"] if y != -100]) == "OSLO"
    whole = fact_row(prompt, answer, "Rome", tokenizer)
    assert tokenizer.decode([y for y in whole["labels"] if y != -100]) == answer  # without EOS
    assert fact_row(prompt, answer, None, tokenizer) == whole


def test_models_that_do_not_fit_are_refused(encoded, tokenizer):
    with pytest.raises(Unmeasured, match="3 blocks and this model 2"):
        read_depth(tiny(), lambda: nullcontext(olmoe()), encoded, 0)


def suite():
    metrics = ["unlearning_depth", "fact_recovered", "suppression_depth"]
    sets = {
        "forget": {"role": "forget", "metrics": metrics, "against": "retain"},
        "retain": {"role": "retain", "metrics": []},
    }
    return {"format": 1, "name": "t", "sets": sets}


DATA = {"forget": ROWS, "retain": KEPT}


def test_in_a_suite_with_and_without_a_reference(family, tokenizer):
    base, retain_model = family
    model = adapted(deepcopy(base))
    subjects = dict(on_one_model(model, {"base": None, "adapter": "default"}))
    report = score({**subjects, "retain_only": lambda: nullcontext(retain_model)}, suite(), DATA, tokenizer)
    found = report.subjects
    assert found["base"]["forget/unlearning_depth"] == 0.0 and found["base"]["forget/fact_recovered"] == 1.0
    assert found["retain_only"]["forget/unlearning_depth"] == 1.0
    assert found["retain_only"]["forget/fact_recovered"] == pytest.approx(0.0)
    assert 0.0 < found["adapter"]["forget/unlearning_depth"] <= 1.0
    alone = score(subjects, suite(), DATA, tokenizer)
    assert alone.subjects["adapter"]["forget/unlearning_depth"] is None
    assert "no retain model" in alone.details["adapter"]["forget/unlearning_depth"]["reason"]
    # the same patches, without a reference
    assert alone.subjects["adapter"]["forget/suppression_depth"] == found["adapter"]["forget/suppression_depth"]
    only = score({"adapter": subjects["adapter"]}, suite(), DATA, tokenizer)
    assert "no base" in only.details["adapter"]["forget/suppression_depth"]["reason"]


def test_a_reference_from_another_start_is_refused(family, tokenizer):
    base, _ = family
    foreign = tiny(7)
    subjects = {"base": lambda: nullcontext(base), "retain_only": lambda: nullcontext(foreign)}
    report = score(subjects, suite(), DATA, tokenizer)
    assert report.subjects["base"]["forget/unlearning_depth"] is None
    assert "cannot read the retain model" in report.details["base"]["forget/unlearning_depth"]["reason"]


def test_adapters_are_as_before_afterwards(encoded):
    model = adapted(tiny())
    before = Pass(model, pad(encoded, 0)).logp.detach()
    subjects = on_one_model(model, {"base": None, "adapter": "default"})
    with subjects["adapter"]() as live:
        read_depth(live, subjects["base"], encoded, 0)
        assert torch.equal(Pass(live, pad(encoded, 0)).logp.detach(), before)  # still on, inside
    assert model.active_adapter == "default"
