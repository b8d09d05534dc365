"""What an adapter adds to its base's weights, worked out from the adapter's folder alone: D = s B A, weight by weight.

A LoRA is a list of low-rank deltas, and everything that merging and composing need is in two files: the factors
in adapter_model.safetensors and, in adapter_config.json, what they are multiplied by (alpha / r, or alpha / sqrt(r) with
`use_rslora`; per weight with `rank_pattern` and `alpha_pattern`) and which way round they lie. Weights go by their names
in memory (``model.layers.0.self_attn.q_proj.weight``). Factors are read when asked for, a few at a time.

Forms, as PEFT has them (https://github.com/huggingface/peft, tuners/lora/layer.py):

- Linear: A (r, in), B (out, r). Conv1D and `fan_in_fan_out`: the weight is (in, out), so its delta is (B A)^T.
- Embedding: A (r, vocabulary), B (width, r), delta (B A)^T.
- a fused parameter of E experts (`target_parameters`): A (E * r, in) expert by expert, B (out, r * E) rank by rank, so
  that B.view(out, r, E)[:, :, e] belongs to expert e. Parameters of one module are nested: the one that the module holds
  first is innermost, one ``.base_layer`` deeper in its name. Modules with ``is_transposed`` hold (E, in, out).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import UserError
from ..folder.read import WEIGHTS, AdapterFolder
from ..folder.safetensors_io import TensorEntry, read_header
from .peft_type import FORGET_VECTOR, SPARSE_TYPE

if TYPE_CHECKING:
    from pathlib import Path

    from .forget_vector.delta import VectorDeltas
    from .sparse.delta import SparseDeltas

_KEPT = 6  # weights whose factors stay in memory: the projections of one layer of experts, read in turns


@dataclass(frozen=True)
class Adapted:
    """One adapted weight. `shape` and `transposed` are None where they were not looked up in a model."""

    weight: str
    module: str
    kind: str  # "linear", "embedding" or "parameter"
    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float
    experts: int
    transposed: bool | None
    shape: tuple[int, ...] | None = None

    @property
    def fused(self) -> bool:
        return len(self.shape) == 3 if self.shape is not None else self.experts > 1


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The setting of a PEFT configuration by which the base is another model while the adapter is off; None where it stays."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITE):
        return f"init_lora_weights={start!r}"
    return next(
        (f"{key}={config[key]!r}" for key in ("layer_replication", "kasa_config", "use_kasa") if config.get(key)), None
    )


_REWRITE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "lora-ga")  # prefixes: pissa_niter_4


def read_deltas(
    folder: AdapterFolder, model: nn.Module | None = None, base: Path | None = None
) -> Deltas | SparseDeltas | VectorDeltas:
    """What the adapter in a folder adds to each weight. Raises `UserError` for one that is not a sum with the base's weights.

    base: the folder of the base's files, which a forget vector needs.
    """
    if folder.config["peft_type"] == FORGET_VECTOR and model is not None and base is not None:
        from .forget_vector.delta import VectorDeltas

        return VectorDeltas(folder, model, base)
    if is_sparse(folder):
        from .sparse.delta import SparseDeltas

        return SparseDeltas(folder, model)
    return Deltas(folder, model)


def is_sparse(folder: AdapterFolder) -> bool:
    """Whether an adapter is chosen entries with values: our own type, SHiRA, or SUPERTUNING without a low-rank part."""
    kind = folder.config["peft_type"]
    return kind in (SPARSE_TYPE, "SHIRA") or (kind == "SUPERTUNING" and not folder.config.get("r"))


def plain_sum(folder: AdapterFolder) -> None:
    """Raise `UserError` unless the adapter is a plain sum W + s B A: what can be merged, composed and concatenated."""
    config, where = folder.config, folder.path
    kind = config["peft_type"]
    if kind != "LORA":
        raise UserError(
            f"{where}: merging or composing adapters of type {kind} is not supported: only LoRA and sparse adapters are "
            "known as sums of weights. Serve it unmerged on its base."
        )
    for key, (what, why) in NOT_A_SUM.items():
        if config.get(key):
            raise UserError(
                f"{where}: has {what} ({key}), which is not a plain sum of weights: {why}. Merging or composing it is "
                "not supported; serve it unmerged on its base, or train again without it."
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where}: trains biases (bias: {config['bias']}): they replace the base's, so two of them cannot be summed. "
            "Merging or composing it is not supported; serve it unmerged, or train again with bias: none."
        )
    if changes := changes_base(config):
        raise UserError(
            f"{where}: was trained with {changes}, which also changes the base's weights; the file holds only half of what it does. "
            "Save it with PEFT's path_initial_model_for_weight_conversion first, or train again without it."
        )
    odd = [n for n in read_header(where / WEIGHTS) if not _FACTOR.fullmatch(n)]
    if odd:
        raise UserError(
            f"{where}: {len(odd)} tensors are not the factors of a low-rank sum, first {odd[0]!r}; merging or composing it "
            "is not supported. Serve it unmerged on its base."
        )


NOT_A_SUM = {
    "use_dora": ("DoRA", "it rescales the columns of W + s B A by trained magnitudes"),
    "lora_bias": ("a LoRA bias", "B has a bias of its own, for which the base may have no place"),
    "modules_to_save": ("fully trained modules", "they replace the base's, so two of them cannot be summed"),
    "trainable_token_indices": ("trained token embeddings", "they replace rows of the base's"),
    "use_qalora": ("QALoRA", "it pools its input in groups"),
    "alora_invocation_tokens": ("activated LoRA", "it acts only after certain tokens"),
    "layer_replication": ("replicated layers", "it runs the base's layers in another order"),
    "use_bdlora": ("block-diagonal LoRA", "its factors are kept in another form"),
    "kasa_config": ("KaSA", "it drops part of the base's weights"),
    "arrow_config": ("Arrow", "it chooses among adapters for each token"),
    "monteclora_config": ("MonteCLoRA", "it samples its factors"),
}
_FACTOR = re.compile(r"base_model\.model\.(?P<at>.+?)\.lora_(?P<kind>embedding_)?(?P<which>[AB])(?:\.weight)?")


class Deltas:
    """The deltas of one adapter, by the name that the adapted weight has in memory.

    folder: a complete adapter that is a plain sum (`plain_sum` is called). model: the base, on the meta device if you like:
    with it every shape is checked, parameters are told apart for certain and experts' orientation is known; without it
    `factors` works, and `product` for all but fused experts.
    """

    def __init__(self, folder: AdapterFolder, model: nn.Module | None = None) -> None:
        plain_sum(folder)
        self.folder = folder
        self._modules = None if model is None else dict(model.named_modules())
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self.adapted: dict[str, Adapted] = {}
        for at, (kind, a, b) in self._pairs().items():
            row = self._place(at, kind, a, b)
            if row.weight in self.adapted:
                raise self._wrong(f"{row.weight} is adapted twice")
            self.adapted[row.weight] = row

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapted)

    def __contains__(self, weight: object) -> bool:
        return weight in self.adapted

    def __len__(self) -> int:
        return len(self.adapted)

    def factors(self, weight: str) -> tuple[Tensor, Tensor, float]:
        """(A, B, s) as they lie in the file, float32; for fused experts A is (E * r, in) and B (out, r * E)."""
        if weight not in self._kept:
            row = self.adapted[weight]
            self._kept[weight] = (row.a.tensor().float(), row.b.tensor().float())
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(weight)
        return (*self._kept[weight], self.adapted[weight].scaling)

    def product(self, weight: str, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """(L, R), float32, with L @ R the delta in memory's orientation (rows, columns); of `expert` if it is fused."""
        row = self.adapted[weight]
        a, b, s = self.factors(weight)
        if row.fused and row.transposed is None:
            raise ValueError(f"{weight}: which way round its experts lie is not known without the model")
        if row.experts > 1:
            if expert is None:
                raise ValueError(f"{weight} is a stack of {row.experts} experts: say which one")
            a, b = a.unflatten(0, (row.experts, -1))[expert], b.unflatten(1, (-1, row.experts))[:, :, expert]
        a, b = a.flatten(1), b.flatten(1)  # convolutions: (r, in, kh, kw) and (out, r, 1, 1)
        return (a.T * s, b.T) if row.transposed else (b * s, a)

    def touched(self, weight: str) -> list[int]:
        """The experts whose delta is not zero; [0] or [] for a weight that is not a stack of experts."""
        row = self.adapted[weight]
        a, b, _ = self.factors(weight)
        a = a.reshape(row.experts, -1).any(dim=1)
        b = b.reshape(-1, row.experts).any(dim=0) if row.experts > 1 else b.any()[None]
        return (a & b).nonzero().flatten().tolist()

    # --- reading the folder ---------------------------------------------------------------------------------------

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.folder.path}: {what}; this adapter and its configuration, or its base, do not fit.")

    def _pairs(self) -> dict[str, tuple[str, TensorEntry, TensorEntry]]:
        """Where in the module's name -> (kind, A, B)."""
        found: dict[str, dict[str, TensorEntry]] = {}
        kinds: dict[str, str] = {}
        for name, entry in read_header(self.folder.path / WEIGHTS).items():
            match = _FACTOR.fullmatch(name)
            assert match is not None  # plain_sum
            found.setdefault(match["at"], {})[match["which"]] = entry
            kinds[match["at"]] = "embedding" if match["kind"] else "linear"
        if lone := next((at for at, pair in found.items() if len(pair) < 2), None):
            raise self._wrong(f"{lone} has a lora_{next(iter(found[lone]))} and not the other factor")
        return {at: (kinds[at], pair["A"], pair["B"]) for at, pair in found.items()}

    def _place(self, at: str, kind: str, a: TensorEntry, b: TensorEntry) -> Adapted:
        module = re.sub(r"(\.base_layer)+$", "", at)
        depth = (len(at) - len(module)) // len(".base_layer")
        live = None
        if self._modules is not None:
            live = self._modules.get(module)
            if live is None:
                raise self._wrong(f"it adapts {module}, and there is no such module in the base")
        parameter = self._parameter(module, depth, live)
        if parameter is not None:
            kind = "parameter"
        key = module if parameter is None else f"{module}.{parameter}"
        rank = self._setting("rank_pattern", key, "r")
        alpha = self._setting("alpha_pattern", key, "lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._wrong(f"{key} has the rank {rank!r} and the alpha {alpha!r}")
        scaling = alpha / (math.sqrt(rank) if self.folder.config.get("use_rslora") else rank)
        row = Adapted(
            key if parameter else f"{module}.weight", module, kind, a, b, rank, scaling,
            a.shape[0] // rank if parameter else 1, self._transposed(kind, live),
        )  # fmt: skip
        if a.shape[0] != rank * row.experts or len(b.shape) < 2 or b.shape[1] != a.shape[0]:
            raise self._wrong(
                f"{row.weight} has factors of shape {list(a.shape)} and {list(b.shape)}, which do not fit the rank {rank}"
            )
        return row if live is None else self._fitted(row, live, parameter or "weight")

    def _parameter(self, module: str, depth: int, live: nn.Module | None) -> str | None:
        """Which of the module's parameters the factors `depth` wrappers deep belong to; None: the module as a whole."""
        wanted = set()
        for target in self.folder.config.get("target_parameters") or ():
            parent, _, last = str(target).rpartition(".")
            if not parent or module == parent or module.endswith(f".{parent}"):
                wanted.add(last)
        if live is not None:
            order = [n for n, _ in live.named_parameters(recurse=False) if n in wanted]
        else:  # as every fused family of transformers holds them
            order = sorted(wanted, key=lambda n: (not n.startswith("gate_up"), n))
        if not order:
            if depth:
                raise self._wrong(f"{module} is wrapped {depth + 1} times, and no parameter of it is a target")
            return None
        if depth >= len(order):
            raise self._wrong(f"{module} is wrapped {depth + 1} times, and only {', '.join(order)} of it are targets")
        return order[len(order) - 1 - depth]

    def _setting(self, pattern: str, key: str, default: str) -> Any:
        for name, value in (self.folder.config.get(pattern) or {}).items():
            try:
                found = re.match(rf"(.*\.)?({name})$", key)
            except re.error as e:
                raise self._wrong(f"its {pattern} holds {name!r}, which is no pattern ({e})") from None
            if found:
                return value
        return self.folder.config.get(default)

    def _transposed(self, kind: str, live: nn.Module | None) -> bool | None:
        if kind == "embedding":
            return True
        if kind == "linear":
            if live is None:
                return bool(self.folder.config.get("fan_in_fan_out"))
            return type(live).__name__ == "Conv1D"
        return None if live is None else bool(getattr(live, "is_transposed", False))

    def _fitted(self, row: Adapted, live: nn.Module, parameter: str) -> Adapted:
        """`row` with the weight's shape, if its factors give a delta of that shape."""
        weight = getattr(live, parameter, None)
        if not isinstance(weight, Tensor):
            raise self._wrong(f"{row.module} has no {parameter}")
        shape = tuple(weight.shape)
        transposed = row.transposed and (row.kind != "parameter" or len(shape) == 3)
        rows, columns = row.b.shape[0], math.prod(row.a.shape[1:])
        if transposed:
            rows, columns = columns, rows
        inner = shape[1:] if len(shape) == 3 and row.kind == "parameter" else shape
        experts = shape[0] if inner is not shape else 1
        if (rows, columns) != (inner[0], math.prod(inner[1:])) or experts != row.experts:
            raise self._wrong(
                f"{row.weight} is {list(shape)} in the base, and the adapter's delta for it is "
                f"{[row.experts, rows, columns] if row.experts > 1 or experts > 1 else [rows, columns]}"
            )
        return replace(row, shape=shape, transposed=bool(transposed))
