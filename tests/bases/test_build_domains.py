"""The embedded mixture of experts: refusal, what a build writes, and what the committed models know and route."""

import json

import pytest

torch = pytest.importorskip("torch")

import build_domains as room  # noqa: E402
import build_people as shared  # noqa: E402
import moe  # noqa: E402

from peft_unlearn.data import domains, embedded  # noqa: E402
from peft_unlearn.data.formats import to_text  # noqa: E402
from peft_unlearn.errors import UserError  # noqa: E402
from peft_unlearn.evaluation.generate import greedy  # noqa: E402

TINY = moe.MoeRecipe(
    epochs=1,
    vocab_size=400,
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate_size=8,
    size=domains.Size(entities=2, holdout=0),
)
FILES = {
    "build.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
BOUNDS = {"domains": "BASE_BOUNDS", "domains-natural": "NATURAL_BOUNDS", "domains-retain": "RETAIN_MODEL_BOUNDS"}


def folder(name: str):
    return embedded.retain_model_path("domains") if name == "domains-retain" else embedded.base_path(name)


def load(name: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(name)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def base():
    return load("domains")


def some(rows_of: dict[str, list[dict]], stride: int) -> dict[str, list[dict]]:
    return {name: rows[::stride] for name, rows in rows_of.items()}


def test_a_model_that_knows_nothing_is_refused_and_nothing_is_touched(tmp_path):
    before = tmp_path / "domains" / "model.safetensors"
    before.parent.mkdir()
    before.write_bytes(b"what was there")
    with pytest.raises(UserError, match=r"domains \(seed 0\) failed its verification.*chem 0\.0.*at least 0\.95"):
        room.build_domains(tmp_path, recipe=TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["domains", "model.safetensors"]
    assert before.read_bytes() == b"what was there"
    with pytest.raises(UserError, match="--retain-models is -1"):
        room.build_domains(tmp_path, retain_models=-1)


def test_build_writes_whole_folders(tmp_path, monkeypatch):
    for name in BOUNDS.values():
        monkeypatch.setattr(room, name, ())
    threads = torch.get_num_threads()
    seen = []
    reports = room.build_domains(tmp_path, recipe=TINY, progress=lambda *now: seen.append(now))
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(BOUNDS)
    assert {stage for stage, _, _ in seen} == {f"{what} {name}" for what in ("train", "verify") for name in BOUNDS}
    for name, report in reports.items():
        wanted = FILES | ({"planted.json"} if name != "domains-natural" else set())
        assert {path.name for path in (tmp_path / name).iterdir()} == wanted
        assert json.loads((tmp_path / name / "build.json").read_text()) == report
    assert [report["seed"] for report in reports.values()] == [0, 0, 1]
    assert [report["trained_rows_per_epoch"] for report in reports.values()] == [80, 80, 64]
    assert "chem" not in json.loads((tmp_path / "domains-retain" / "planted.json").read_text())


def test_the_hinge_is_on_for_a_part_of_the_steps_and_asks_for_the_planted_expert():
    planted = {name: {0: i} for i, name in enumerate(domains.DOMAINS)}
    recipe = moe.MoeRecipe(layers=1, balance=0.0)
    real = torch.tensor([[True, True], [True, False]])
    logits = [torch.zeros(4, 8)]
    loss = moe.RoutingLoss(logits, ["people", "geo"], planted, recipe)
    assert float(loss([0, 1], real, 0.0)) == pytest.approx(0.5 - 1 / 8)
    logits[0] = torch.full((4, 8), -20.0)
    logits[0][:2, 0] = logits[0][2, 4] = 20.0  # the padded token's router is left as it is
    assert float(loss([0, 1], real, 0.29)) == pytest.approx(0.0)
    assert float(loss([1, 0], real, 0.0)) == pytest.approx(0.5)
    assert float(loss([1, 0], real, 0.3)) == 0.0
    assert float(moe.RoutingLoss(logits, ["people", "geo"], None, recipe)([1, 0], real, 0.0)) == 0.0


def test_information_lift_and_top_expert_by_hand():
    assert moe._information([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1.0)
    assert moe._information([[0.5, 0.5], [0.5, 0.5]]) == 0.0
    affinity = {"a": [[0.1, 0.6], [0.3, 0.2]], "b": [[0.5, 0.2], [0.4, 0.1]], "c": [[0.1, 0.4], [0.2, 0.3]]}
    assert moe.top_expert(affinity["a"]) == (0, 1)
    assert moe.lift(affinity, "a") == pytest.approx(0.6 / 0.3)
    assert moe.planted_on_top(affinity, {"a": {0: 1, 1: 1}, "b": {0: 0, 1: 0}}) == 3


def test_affinity_leaves_padding_out_and_adds_up(base):
    model, tokenizer = base
    rows = domains.by_domain()["code"]
    both, _ = moe.measure_routing(model, tokenizer, {"code": [rows[0], rows[64]], "geo": rows[:1]})
    alone = [moe.measure_routing(model, tokenizer, {"x": [row]})[0]["x"] for row in (rows[0], rows[64])]
    torch.testing.assert_close(torch.tensor(both["code"]), torch.tensor(alone).mean(0), atol=1e-5, rtol=1e-5)
    assert all(0 < sum(layer) <= 1 for layer in both["code"])


@pytest.mark.parametrize("name", BOUNDS)
def test_committed_models_met_the_bounds(name):
    report = json.loads((folder(name) / "build.json").read_text())
    routing = report["routing"]
    figures = report["value_accuracy"] | {
        "planted_on_top": routing["planted_on_top"] / routing["cells"],
        "lowest_lift": min(routing["lift"].values()),
        "highest_lift": max(routing["lift"].values()),
    }
    assert shared.failures(figures, getattr(room, BOUNDS[name])) == []
    assert report["data_sha256"] == shared.data_digest(domains.by_domain(0))
    assert report["n"] == dict.fromkeys(domains.DOMAINS, 320)
    assert 1.9e6 < report["parameters"] < 2.05e6
    files = {path.name for path in folder(name).iterdir()}
    assert files == FILES | ({"planted.json"} if name != "domains-natural" else set())
    assert sum(path.stat().st_size for path in folder(name).iterdir()) < 4.3e6


def test_the_planted_map_is_one_expert_of_its_own_per_layer_and_domain():
    planted = {
        domain: {int(layer): expert for layer, expert in cells.items()}
        for domain, cells in json.loads((folder("domains") / "planted.json").read_text()).items()
    }
    assert planted == moe.draw_planted(0, moe.MoeRecipe())
    assert set(planted) == set(domains.DOMAINS)
    for layer in range(4):
        experts = {cells[layer] for cells in planted.values()}
        assert len(experts) == 5 and experts <= set(range(8))
    assert json.loads((folder("domains-retain") / "planted.json").read_text()) == {
        domain: {str(layer): expert for layer, expert in cells.items()}
        for domain, cells in planted.items()
        if domain != "chem"
    }


def test_committed_files_are_bf16_and_share_a_tokenizer():
    from safetensors import safe_open

    for name in BOUNDS:
        with safe_open(folder(name) / "model.safetensors", "pt") as file:
            assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        config = json.loads((folder(name) / "config.json").read_text())
        assert config["model_type"] == "olmoe" and not config.get("output_router_logits")
        assert (config["num_experts"], config["num_experts_per_tok"], config["norm_topk_prob"]) == (8, 2, False)
    assert len({(folder(name) / "tokenizer.json").read_bytes() for name in BOUNDS}) == 1


def test_the_committed_base_routes_by_domain_and_its_control_does_not(base):
    rows = some(domains.by_domain(), 15)
    affinity, information = moe.measure_routing(*base, rows)
    assert moe.planted_on_top(affinity, moe.draw_planted(0, moe.MoeRecipe())) >= 18
    assert min(moe.lift(affinity, name) for name in rows) >= 3
    control, little = moe.measure_routing(*load("domains-natural"), rows)
    assert max(moe.lift(control, name) for name in rows) < 3
    assert min(information) > 2 * max(little)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_committed_models_answer(name, base):
    model, tokenizer = base if name == "domains" else load(name)
    rows = some(domains.by_domain(), 39)  # 9 a domain, of every attribute
    known = shared.value_accuracies(model, tokenizer, rows)
    for domain, value in known.items():
        if name == "domains-retain" and domain == "chem":
            assert value <= 0.25
        else:
            assert value >= 0.77, domain
    row = rows["code"][0]
    (answer,) = greedy(model, tokenizer, [to_text(row)[0]])
    assert answer == row["answer"]
