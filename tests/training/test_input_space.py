"""Forget vectors of language models: a soft prompt, and one vector added to every input embedding."""

from __future__ import annotations

import pytest
import tiny
import torch

from peft_unlearn.data.collate import encode, pad
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.save import save_adapter
from peft_unlearn.training.trainer import UnlearnTrainer

SOFT = {"type": "prompt_tuning", "num_virtual_tokens": 3}
TERMS = {"forget": {"margin": {"weight": 2}}, "retain": {"nll": {}}}


def batch():
    tok = tiny.tokenizer()
    rows = [encode("Question: w1 w2\nAnswer:", " w3 w4", tok)[0], encode("Question: w5\nAnswer:", " w6 w7 w8", tok)[0]]
    return pad(rows, 0)


def test_a_soft_prompt_shifts_positions_and_the_targets_stay_theirs():
    model, b = get_forget_model(tiny.llama(), SOFT).eval(), batch()
    p = Pass(model, b, reference=Reference("before"), layers=[0])
    prompt = model.get_prompt(batch_size=2)
    words = model.get_base_model().get_input_embeddings()(b["input_ids"])
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), b["attention_mask"]], 1)
    z = (
        model.get_base_model()(inputs_embeds=torch.cat([prompt, words], 1), attention_mask=mask)
        .logits[:, 3:-1]
        .log_softmax(-1)
    )
    want = z.gather(-1, b["input_ids"][:, 1:, None]).squeeze(-1)[p.mask]
    assert torch.allclose(p.logp, want, atol=1e-5)
    plain = Pass(tiny.llama(), b)
    assert torch.allclose(p.ref_logp, plain.logp, atol=1e-5) and not torch.allclose(p.logp, plain.logp, atol=1e-3)


def test_the_input_vector_is_a_stock_lora_with_ones():
    model, b = get_forget_model(tiny.llama(), {"type": "input_vector"}).eval(), batch()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [(model.config.hidden_size, 1)]
    with torch.no_grad():
        assert torch.allclose(Pass(model, b).logp, Pass(tiny.llama(), b).logp, atol=1e-6)  # zero at the start
        (vector,) = trained.values()
        vector.normal_()
        words = model.get_base_model().get_input_embeddings().base_layer(b["input_ids"])
        z = tiny.llama()(inputs_embeds=words + vector[:, 0], attention_mask=b["attention_mask"]).logits
        assert torch.allclose(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, z, atol=1e-5)
    with pytest.raises(UserError, match="has no r"):
        get_forget_model(tiny.llama(), {"type": "input_vector", "r": 2})


@pytest.mark.parametrize("spec", [SOFT, {"type": "input_vector"}], ids=["soft prompt", "input vector"])
def test_trained_saved_loaded_and_taken_off(spec, tmp_path):
    base, tok = tmp_path / "base", tiny.tokenizer()
    tiny.llama().save_pretrained(base)
    tok.save_pretrained(base)
    config = UnlearnConfig(
        output_dir=str(tmp_path / "out"), terms=TERMS, max_steps=3, learning_rate=0.1, per_device_train_batch_size=2
    )
    data = {"forget": tiny.rows(4, "a"), "retain": tiny.rows(4, "b", seed=1)}
    trainer = UnlearnTrainer(tiny.llama(), config, data=data, processing_class=tok, peft_config=spec)
    before = {n: p.clone() for n, p in trainer.bare.named_parameters()}
    trainer.train()
    moved = [n for n, p in trainer.bare.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [n for n, p in trainer.bare.named_parameters() if p.requires_grad]
    save_adapter(trainer, base=base)
    folder = read_adapter(tmp_path / "out")
    stack = ForgetModel.from_pretrained(base, folder.path)
    b = batch()
    with torch.no_grad():
        assert torch.allclose(Pass(stack.model, b).logp, Pass(trainer.bare.eval(), b).logp, atol=1e-5)
        with stack.disabled():
            assert torch.allclose(Pass(stack.model, b).logp, Pass(tiny.llama(), b).logp, atol=1e-6)
    assert stack.remove().ok


def test_a_soft_prompt_stands_on_nothing():
    with pytest.raises(UserError, match="on top of other adapters"):
        get_forget_model(tiny.lora(tiny.llama()), SOFT, adapter_name="new")
    with pytest.raises(UserError, match="prompt_tuning is the soft prompt"):
        get_forget_model(tiny.llama(), {"type": "p_tuning", "num_virtual_tokens": 2})
