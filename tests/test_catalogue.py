"""The published adapters are what the index says, come from their recipes, and load without this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
import zygote

from peft_unlearn.data.embedded import base_path
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.recipe import dump_recipe, load_recipe, portable_recipe
from peft_unlearn.sharing.verify import verify

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
INDEX = json.loads((ADAPTERS / "index.json").read_text(encoding="utf-8"))["adapters"]
NAMES = [row["name"] for row in INDEX]


def test_the_index_holds_to_its_schema_and_leaves_nothing_out():
    schema = json.loads((ADAPTERS / "index.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(json.loads((ADAPTERS / "index.json").read_text(encoding="utf-8")))
    assert sorted(NAMES) == sorted(p.name for p in (ADAPTERS / "published").iterdir())
    assert len({row["adapter_id"] for row in INDEX}) == len(INDEX)


def test_one_of_every_family():
    schema = json.loads((ADAPTERS / "index.schema.json").read_text(encoding="utf-8"))
    families = schema["properties"]["adapters"]["items"]["properties"]["family"]["enum"]
    assert {row["family"] for row in INDEX} == set(families)


@pytest.mark.parametrize("row", INDEX, ids=NAMES)
def test_a_row_is_its_folder(row):
    found = read_adapter(ADAPTERS / row["path"])
    assert found.adapter_id == row["adapter_id"] and found.manifest.base.digest == row["base_digest"]
    assert found.manifest.base.ref == row["base"] and found.manifest.scale == row["scale"]
    assert (found.path / "adapter_model.safetensors").stat().st_size == row["bytes"]
    assert found.eval is not None
    stored = found.eval["subjects"]["adapter"]
    assert row["numbers"] and all(stored[k] == v for k, v in row["numbers"].items())
    assert {"strip", "relearn"} <= {
        label.partition(":")[0].partition(" ")[0] for label in found.eval["attacks"]["attacks"]
    }
    front = yaml.safe_load((found.path / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["license"] == row["license"] and front["library_name"] == "peft"


@pytest.mark.parametrize("row", INDEX, ids=NAMES)
def test_a_folder_comes_from_its_recipe(row):
    recipe = load_recipe(ADAPTERS / row["recipe"])
    found = read_adapter(ADAPTERS / row["path"])
    hashes = {name: about["sha256"] for name, about in found.manifest.data.items()}
    wanted = yaml.safe_load(dump_recipe(portable_recipe(recipe, found.manifest.base.ref, hashes)))
    if wanted["adapter"].get("experts") == "auto":  # attribution chose them, and the recipe as run says which
        chosen = found.recipe["adapter"].pop("experts")
        assert chosen and all(len(experts) == 1 for experts in chosen.values())
        wanted["adapter"] = {k: v for k, v in wanted["adapter"].items() if k not in ("experts", "per_layer", "top")}
    for key in ("terms", "rule", "smoothing", "reference", "seed", "adapter"):
        assert found.recipe.get(key) == wanted.get(key), key


@pytest.mark.parametrize("name", ["simnpo", "domains-npo"])
def test_verify_says_yes(name):
    found = verify(ADAPTERS / "published" / name)
    assert found.verdict == "ok", str(found)


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "peft_unlearn" not in sys.modules
try:
    import peft_unlearn
    raise SystemExit("this package is there")
except ImportError:
    pass
out = {}
for name, folder, base in json.loads(sys.argv[1]):
    stored = json.load(open(folder + "/forget.json"))["probes"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    worst = 0.0
    for prompt, row in zip(stored["prompts"], stored["adapter"]):
        with torch.no_grad():
            z = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        worst = max(worst, (z[row["ids"]] - torch.tensor(row["logits"])).abs().max().item())
    out[name] = worst
print(json.dumps(out))
"""


def test_plain_peft_loads_all_of_them_where_this_package_is_not():
    """In a process that has transformers and PEFT and not us, every adapter gives the probe logits of its manifest."""
    rows = [
        (
            row["name"],
            str(ADAPTERS / row["path"]),
            str(base_path(row["base"].removeprefix("embedded:").partition("?")[0])),
        )
        for row in INDEX
    ]
    done = zygote.run([sys.executable, "-I", "-S", "-c", CHILD, json.dumps(rows)])
    assert done.returncode == 0, done.stderr[-2000:]
    gaps = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(gaps) == set(NAMES) and max(gaps.values()) < 1e-3
