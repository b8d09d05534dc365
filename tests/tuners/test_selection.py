"""The file of a selection: what was chosen comes back, and what is none is refused."""

import pytest
import torch

from peft_unlearn.errors import UserError
from peft_unlearn.tuners.selection import Selection


def _one(i=(0, 3, 5)):
    return Selection({"a.weight": torch.tensor(i)}, {"a.weight": (2, 3)}, {"method": "random"})


def test_round_trip(tmp_path):
    back = Selection.load(_one().save(tmp_path / "s.safetensors"))
    assert (
        torch.equal(back.indices["a.weight"], torch.tensor([0, 3, 5])) and back.indices["a.weight"].dtype == torch.int64
    )
    assert back.shapes == {"a.weight": (2, 3)} and back.about == {"method": "random"}
    assert (back.count, back.density) == (3, 0.5)


@pytest.mark.parametrize("bad", [(3, 1), (1, 1), (-1, 2), (0, 6)])
def test_positions_must_rise_within_the_weight(tmp_path, bad):
    with pytest.raises(UserError, match="rising numbers below 6"):
        Selection.load(_one(bad).save(tmp_path / "s.safetensors"))


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for name in ("text", "plain.safetensors", "nothing"):
        with pytest.raises(UserError, match="selection"):
            Selection.load(tmp_path / name)
