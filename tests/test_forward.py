"""`Pass`: values, gradients, memory and side effects, against plain forwards with full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from peft_unlearn import head as head_room
from peft_unlearn.errors import UserError
from peft_unlearn.forward import Pass, Reference, adapters_off, blocks, dropouts, layer_module

VOCAB = 97
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: LlamaConfig(**_SMALL, **k),
    "qwen3": lambda **k: Qwen3Config(**_SMALL, head_dim=8, **k),
    # final_logit_softcapping 5 with a head scaled up below: a path that forgets the cap is far off
    "gemma2": lambda **k: Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8, **k),
    "gpt2": lambda **k: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **k
    ),
    "cohere": lambda **k: CohereConfig(**_SMALL, logit_scale=0.3, **k),
    "granite": lambda **k: GraniteConfig(**_SMALL, logits_scaling=3.0, embedding_multiplier=2.0, **k),
    "phi": lambda **k: PhiConfig(**{a: b for a, b in _SMALL.items() if a != "num_key_value_heads"}, **k),
}


def make(family: str, adapt_head: bool = False) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family](pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    targets: Any = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else "all-linear"
    if adapt_head:
        targets = ["c_attn", "lm_head"] if family == "gpt2" else ["q_proj", "v_proj", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    return model.eval()


def batch(vocab: int = VOCAB, rows: int = 3, seq: int = 9) -> dict[str, Tensor]:
    """Unequal lengths: prompts of 3 tokens, one row ends early, one has a hole without targets."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (rows, seq), generator=g)
    labels, attention = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = -100
    labels[1, 6:], attention[1, 6:] = -100, 0
    labels[-1, 5] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def grads(value: Tensor, model: Any) -> list[Tensor]:
    return list(torch.autograd.grad(value, trainable(model)))


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = list(zip(a, b, strict=True))
    top = sum(((u.double() - v.double()) ** 2).sum() for u, v in pairs)
    return float((top / sum((v.double() ** 2).sum() for _, v in pairs)).sqrt())


def full_logits(model: Any, b: dict[str, Tensor], mask: Tensor) -> Tensor:
    out = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False)
    return out.logits[:, :-1][mask].float()


def entropy_and_margin(z: Tensor, y: Tensor) -> Tensor:
    logp = z.log_softmax(1)
    return torch.stack([-(logp.exp() * logp).sum(1), z.logsumexp(1) - z.gather(1, y[:, None]).squeeze(1).tanh()], 1)


def kl_and_product(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
    logq = z_ref.log_softmax(1)
    return torch.stack([(logq.exp() * (logq - z.log_softmax(1))).sum(1), (z * z_ref).mean(1)], 1)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Chunks of 16 rows are the smallest there are; make the batch's 14 targets need more than one."""
    monkeypatch.setattr(head_room, "_CHUNK_FLOATS", 1)
    monkeypatch.setattr(head_room, "_FUSED_FLOATS", 1)


@pytest.mark.parametrize("adapt_head", [False, True], ids=["frozen-head", "adapted-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_logits(family, adapt_head):
    model, b = make(family, adapt_head), batch(rows=6)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in n for n in names) == adapt_head
    p = Pass(model, b, reference=Reference())
    assert len(p.targets) > 16  # two chunks at least
    w, w2 = torch.randn(len(p.targets)), torch.randn(len(p.targets), 2)

    want = full_logits(model, b, p.mask).log_softmax(1).gather(1, p.targets[:, None]).squeeze(1)
    assert p.logp.dtype == torch.float32
    torch.testing.assert_close(p.logp, want, atol=2e-5, rtol=2e-5)
    got_g, want_g = grads((p.logp * w).sum(), model), grads((want * w).sum(), model)
    assert relative(got_g, want_g) <= 2e-6
    if adapt_head:
        head = [i for i, n in enumerate(names) if "lm_head" in n]
        assert relative([got_g[i] for i in head], [want_g[i] for i in head]) <= 2e-6

    got = Pass(model, b).map_logits(entropy_and_margin)  # (n, 2)
    want = entropy_and_margin(full_logits(model, b, p.mask), p.targets)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert relative(grads((got * w2).sum(), model), grads((want * w2).sum(), model)) <= 2e-6

    with torch.no_grad(), model.disable_adapter():
        z_ref = full_logits(model, b, p.mask)
    got = Pass(model, b, reference=Reference()).map_logits(kl_and_product, reference=True)
    want = kl_and_product(full_logits(model, b, p.mask), z_ref, p.targets)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert relative(grads((got * w2).sum(), model), grads((want * w2).sum(), model)) <= 2e-6
    ref = z_ref.log_softmax(1).gather(1, p.targets[:, None]).squeeze(1)
    torch.testing.assert_close(p.ref_logp, ref, atol=2e-5, rtol=2e-5)
    assert not p.ref_logp.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_map_logits_of_one_column_and_detached_column(family):
    model, b = make(family), batch()
    p = Pass(model, b)
    got = p.map_logits(lambda z, y: z.logsumexp(1))
    assert got.shape == p.targets.shape
    want = full_logits(model, b, p.mask).logsumexp(1)
    want_g = torch.autograd.grad((want**2).sum(), trainable(model), retain_graph=True)
    assert relative(grads((got**2).sum(), model), list(want_g)) <= 2e-6
    both = Pass(model, b).map_logits(lambda z, y: torch.stack([z.logsumexp(1), (z.argmax(1) == y).float()], 1))
    w = torch.randn(len(p.targets))
    assert relative(grads((both[:, 0] * w).sum(), model), grads((want * w).sum(), model)) <= 2e-6


def test_direct_head_only_where_it_is_verified():
    assert Pass(make("llama"), batch())._head.direct() is not None
    assert Pass(make("phi"), batch())._head.direct() is not None  # has a bias
    for family in ("gemma2", "cohere", "granite"):
        assert Pass(make(family), batch())._head.direct() is None, family
    assert Pass(make("llama", adapt_head=True), batch())._head.direct() is None


class _Largest(TorchDispatchMode):
    """Remembers every shape that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            # Views make nothing: weight.T of the head is no copy.
            if isinstance(t, Tensor) and not any(isinstance(a, Tensor) and _same(t, a) for a in args):
                self.shapes.add(tuple(t.shape))
        return out


def _same(t: Tensor, a: Tensor) -> bool:
    return t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_logits_tensor_and_no_head_gradient(family, monkeypatch):
    vocab, hidden = 2048, 32
    monkeypatch.setattr(head_room, "_CHUNK_FLOATS", 16 * vocab)
    monkeypatch.setattr(head_room, "_FUSED_FLOATS", 16 * vocab)
    monkeypatch.setitem(_SMALL, "vocab_size", vocab)
    model, b = make(family), batch(vocab, rows=8, seq=24)
    head = Pass(model, b)._head
    head.direct()  # verified once per head, on four rows
    with _Largest() as seen:
        p = Pass(model, b, reference=Reference())
        loss = (p.logp - p.ref_logp).sum() + p.map_logits(kl_and_product, reference=True).sum()
        grads(loss, model)
    assert len(p.targets) > 100
    for shape in seen.shapes:
        if vocab in shape:
            rows = max(1, int(torch.Size(shape).numel() / vocab))
            assert rows <= 16, f"a tensor of shape {shape}"
    assert (vocab, hidden) not in seen.shapes and (hidden, vocab) not in seen.shapes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_differentiating_twice_raises(family):
    model, b = make(family), batch()
    for value in (Pass(model, b).logp, Pass(model, b).map_logits(entropy_and_margin)):
        # Already the first derivative is refused when a second is wanted: torch.autograd.grad would never visit the
        # error node of once_differentiable, and its second derivative would be silently wrong.
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(value.exp().sum(), trainable(model), create_graph=True)


def _everything(p: Pass) -> Tensor:
    values = p.map_logits(kl_and_product, reference=True)
    w = torch.linspace(-1, 2, len(p.targets))
    return (p.logp * w).sum() + (p.ref_logp * p.logp * w).sum() + (values * w[:, None]).sum()


@pytest.mark.parametrize("adapt_head", [False, True], ids=["frozen-head", "adapted-head"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family, adapt_head):
    model, b = make(family, adapt_head), batch()
    model.train()
    plain = grads(_everything(Pass(model, b, reference=Reference())), model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert relative(grads(_everything(Pass(model, b, reference=Reference())), model), plain) <= 1e-7


@pytest.mark.parametrize("adapt_head", [False, True], ids=["frozen-head", "adapted-head"])
def test_bf16_autocast_gives_float32_values(adapt_head):
    model, b = make("llama", adapt_head), batch()
    want = Pass(model, b, reference=Reference())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = Pass(model, b, reference=Reference())
        loss = _everything(p)
        assert p.logp.dtype == p.ref_logp.dtype == torch.float32
        assert p.map_logits(entropy_and_margin).dtype == torch.float32
        got = grads(loss, model)
    torch.testing.assert_close(p.logp, want.logp, atol=0.3, rtol=0.1)
    assert all(torch.isfinite(g).all() for g in got)
    assert relative(got, grads(_everything(want), model)) < 0.1


def test_bf16_base():
    model, b = make("llama"), batch()
    want = Pass(model, b).logp
    model.get_base_model().to(torch.bfloat16)
    p = Pass(model, b)
    assert p.logp.dtype == torch.float32
    torch.testing.assert_close(p.logp, want, atol=0.5, rtol=0.1)
    assert all(torch.isfinite(g).all() for g in grads(p.logp.sum(), model))


# --- the reference model ------------------------------------------------------------------------------------------


def _flags(model: Any) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


def _stacked() -> Any:
    """A frozen active adapter "old" under the trained adapter "default"."""
    model = tiny.lora(tiny.llama(), target_modules=["q_proj", "v_proj"])
    model.add_adapter("old", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["old", "default"])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B.old" in n:
                p.normal_(std=0.3)
    for n, p in model.named_parameters():
        p.requires_grad_(".default." in n)
    return model


def _plain_logp(model: Any, b: dict[str, Tensor]) -> Tensor:
    p = Pass(model, b)
    with torch.no_grad():
        return full_logits(model, b, p.mask).log_softmax(1).gather(1, p.targets[:, None]).squeeze(1)


def test_reference_modes_on_a_stack():
    model, b = _stacked(), batch(320)
    flags, active = _flags(model), list(model.base_model.active_adapters)
    model.base_model.set_adapter(["old"])
    stack_only = _plain_logp(model, b)
    model.base_model.set_adapter(["default"])
    trained_only = _plain_logp(model, b)
    model.base_model.set_adapter(active)
    with model.disable_adapter():
        base = _plain_logp(model, b)
    for n, p in model.named_parameters():
        p.requires_grad_(flags[n])
    wanted = {"before": stack_only, "base": base, "adapter:old": stack_only, "adapter:default": trained_only}
    assert not torch.allclose(stack_only, base, atol=1e-3)
    for mode, want in wanted.items():
        model.train()
        p = Pass(model, b, reference=Reference(mode))
        torch.testing.assert_close(p.ref_logp, want, atol=1e-5, rtol=1e-5)
        assert _flags(model) == flags, mode
        assert list(model.base_model.active_adapters) == active, mode
        assert all(m.training for m in model.modules()), mode
        grads(p.logp.sum(), model)


def test_flags_and_hooks_come_back_after_an_exception():
    model, b = _stacked(), batch(320)
    model.train()
    flags, active = _flags(model), list(model.base_model.active_adapters)

    def broken(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError

    for mode in ("before", "base"):
        with pytest.raises(ZeroDivisionError):
            Pass(model, b, reference=Reference(mode)).map_logits(broken, reference=True)
        with pytest.raises(ZeroDivisionError), Reference(mode).on(model):
            raise ZeroDivisionError
        with pytest.raises(IndexError):  # the model itself fails inside the reference's forward
            Pass(model, {**b, "input_ids": b["input_ids"] + 10**6}, reference=Reference(mode)).ref_logp  # noqa: B018
        assert _flags(model) == flags and list(model.base_model.active_adapters) == active
        assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n.endswith("lm_head"))
    assert not any(m._forward_hooks for m in blocks(model))
    torch.testing.assert_close(Pass(model, b).logp.detach(), _plain_logp(model, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["lora", "attention", "opt"])
def test_reference_is_free_of_dropout(where):
    if where == "lora":
        model = tiny.lora(tiny.llama(), lora_dropout=0.5)
    elif where == "attention":
        model = tiny.lora(tiny.llama(attention_dropout=0.5))
    else:  # keeps its rates as plain attributes of modules
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, dropout=0.5,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        model = tiny.lora(AutoModelForCausalLM.from_config(config), target_modules=["q_proj", "v_proj"])
    b = batch(320)
    assert dropouts(model)
    model.eval()
    want = Pass(model, b, reference=Reference("base")).ref_logp
    model.train()
    training = {n: m.training for n, m in model.named_modules()}
    torch.testing.assert_close(Pass(model, b, reference=Reference("base")).ref_logp, want, atol=1e-5, rtol=1e-5)
    assert {n: m.training for n, m in model.named_modules()} == training
    assert not torch.equal(Pass(model, b).logp, Pass(model, b).logp)  # the trained side does drop


def test_no_dropout_is_found_where_there_is_none():
    assert dropouts(tiny.lora(tiny.llama())) == []
    assert dropouts(make("gpt2")) == []


def test_cached_reference_values_are_taken_from_the_batch():
    model, b = tiny.lora(tiny.llama()), batch(320)
    live = Pass(model, b, reference=Reference())
    cached = Pass(model, {**b, "ref_logp": live.scatter(live.ref_logp)})
    torch.testing.assert_close(cached.ref_logp, live.ref_logp)
    with pytest.raises(UserError, match="reference"):
        Pass(model, b).ref_logp  # noqa: B018


def test_one_forward_per_mode():
    model, b = tiny.lora(tiny.llama()), batch(320)
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append(1))
    head = Pass(model, b)._head
    head.direct()
    calls.clear()
    p = Pass(model, b, reference=Reference(), layers=[0])
    _ = p.logp, p.ref_logp, p.map_logits(entropy_and_margin), p.map_logits(kl_and_product, reference=True), p.hidden(0)
    assert len(calls) == 2


def test_batch_without_targets_and_shapes():
    model, b = tiny.lora(tiny.llama()), batch(320)
    empty = {**b, "labels": torch.full_like(b["labels"], -100)}
    p = Pass(model, empty)
    assert p.logp.shape == (0,) and p.map_logits(lambda z, y: z.logsumexp(1)).shape == (0,)
    assert p.per_sequence(p.logp).shape == (0,)
    p = Pass(model, b)
    n = len(p.targets)
    x = torch.arange(1.0, n + 1)
    assert p.scatter(x)[p.mask].equal(x) and p.scatter(x).sum() == x.sum()
    assert p.per_sequence(torch.ones(n)).equal(p.lengths) and p.lengths.sum() == n


# --- hidden states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hidden_states(family, checkpointing):
    model, b = make(family), batch()
    want = model(**{k: b[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    real = b["attention_mask"].bool()
    last: list[Tensor] = []
    with_hook = blocks(model)[1].register_forward_hook(lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o))
    model(**{k: b[k] for k in ("input_ids", "attention_mask")})
    with_hook.remove()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    p = Pass(model, b, reference=Reference(), layers=[0, 1, -1])
    torch.testing.assert_close(p.hidden(0)[real], want[1][real], atol=1e-5, rtol=1e-5)
    # The library's last entry stands behind the final norm; block 1's own output does not.
    torch.testing.assert_close(p.hidden(1)[real], last[0][real], atol=1e-5, rtol=1e-5)
    assert p.hidden(-1).equal(p.hidden(1))
    w = torch.randn_like(want[1])
    got = torch.autograd.grad((p.hidden(0) * w).sum(), trainable(model), allow_unused=True)
    exact = torch.autograd.grad((want[1] * w).sum(), trainable(model), allow_unused=True)
    assert [g is None for g in got] == [g is None for g in exact]
    assert relative([g for g in got if g is not None], [g for g in exact if g is not None]) <= 2e-6
    with torch.no_grad(), model.disable_adapter():
        ref = model(**{k: b[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    torch.testing.assert_close(p.hidden(0, reference=True)[real], ref[1][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stop_runs_nothing_deeper(family, checkpointing):
    model, b = make(family), batch()
    w = torch.randn(*b["input_ids"].shape, 32)
    exact = torch.autograd.grad((Pass(model, b, layers=[0]).hidden(0) * w).sum(), trainable(model), allow_unused=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ran: list[int] = []
    blocks(model)[1].register_forward_pre_hook(lambda *a: ran.append(1))
    p = Pass(model, b, layers=[0], stop=True)
    got = torch.autograd.grad((p.hidden(0) * w).sum(), trainable(model), allow_unused=True)
    assert not ran
    assert relative([g for g in got if g is not None], [g for g in exact if g is not None]) <= 2e-6
    assert [g is None for g in got] == [g is None for g in exact]
    with pytest.raises(RuntimeError, match="stop"):
        p.logp  # noqa: B018
    # and a later full pass on the same model is as if nothing had been stopped
    model.eval()
    torch.testing.assert_close(Pass(model, b).logp.detach(), _plain_logp(model, b), atol=1e-5, rtol=1e-5)


def test_layers_by_name_and_refusals():
    model, b = tiny.lora(tiny.llama()), batch(320)
    p = Pass(model, b, layers=["layers.0.mlp", 0])
    assert p.hidden("layers.0.mlp").shape == p.hidden(0).shape
    assert layer_module(model, "layers.1") is layer_module(model, 1) is layer_module(model, -1)
    for wrong in (2, -3, "no.such", "mlp"):
        with pytest.raises(UserError, match="layer"):
            layer_module(model, wrong)
    with pytest.raises(RuntimeError, match="before the forward ran"):
        p.hidden(1)


def test_alternate():
    model, b = tiny.lora(tiny.llama()), batch(320)
    winner = batch(320, rows=2, seq=7)
    p = Pass(model, {**b, "alternate": winner}, reference=Reference())
    torch.testing.assert_close(p.alternate.logp, Pass(model, winner).logp)
    assert p.alternate.ref_logp.shape == p.alternate.logp.shape
    with pytest.raises(UserError, match="winner"):
        Pass(model, b).alternate  # noqa: B018


@pytest.mark.parametrize("off", [False, True])
def test_switching_adapters_off_is_what_peft_does(off: bool) -> None:
    def state(model: Any) -> tuple[list[Any], Any, list[bool]]:
        layers = [m.disable_adapters for m in model.modules() if isinstance(getattr(m, "disable_adapters", 0), bool)]
        return layers, model._adapters_disabled, [p.requires_grad for p in model.parameters()]

    seen = []
    for switch in (lambda m: m.disable_adapter(), adapters_off):
        model = tiny.lora(tiny.llama(), modules_to_save=["lm_head"])
        if off:
            model.base_model.disable_adapter_layers()
        before = state(model)
        with switch(model):
            inside = state(model)
        seen.append((before, inside, state(model)))
        with pytest.raises(ZeroDivisionError), switch(model):
            raise ZeroDivisionError
        seen[-1] += (state(model),)
    assert seen[0] == seen[1] and all(seen[0][1][0])
