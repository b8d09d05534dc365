"""Methods are plain functions with one decorator; this module remembers them.

A method's typed signature *is* its schema: keyword arguments after the contract's own parameters are hyper-parameters,
their annotation gives the type (`Annotated[float, Range(0, None)]` the range), their default the default.
Rooms that hold methods are loaded by dotted name at the first look-up, so importing this module costs nothing and
the direction of imports stays a straight line. Third parties add methods through the entry-point group
``peft_unlearn.plugins``: each entry point names a module that registers on import.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from ..errors import UserError, nearest
from .params import Param as Param
from .params import Range as Range
from .params import complaints as complaints
from .params import params_of as params_of

KINDS = ("objective", "rule", "smoothing", "averaging", "step_size", "selection", "oneshot", "metric", "attack")
NEEDS = {"logp", "ref_logp", "logits", "ref_logits", "hidden", "ref_hidden", "router", "ref_router", "alternate"}
# of metrics; a provider of evaluation adds its own name
NEEDS |= {"generation", "perturbed", "retain_model", "pair", "base", "samples", "continuations", "depth", "gradient"}
# what a metric needs, by the names of its inputs, and by what such a name begins with
_FED = {
    "logp": "logp", "logp_mean": "logp", "logp_std": "logp", "body_logp": "logp", "body_logp_mean": "logp",
    "body_logp_std": "logp", "loss_logp": "logp", "correct": "logits", "letter_logp": "logits",
    "right_logp": "perturbed", "wrong_logp": "perturbed", "log_ratio": "perturbed", "generation": "generation",
    "overlap": "continuations", "leaks": "samples", "leak_formats": "samples",
    "fact_logp": "depth", "patched_logp": "depth", "gradient_norm": "gradient",
}  # fmt: skip
_COMPARED = {"against_": "pair", "reference_": "retain_model", "base_": "base"}
_ROOMS = tuple(f"peft_unlearn.{room}" for room in ("objectives", "gradients", "attribution", "evaluation", "attacks"))
_ENTRY_POINTS = "peft_unlearn.plugins"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Source:
    """Where a method was published."""

    paper: str
    url: str
    year: int

    def to_dict(self) -> dict[str, Any]:
        return {"paper": self.paper, "url": self.url, "year": self.year}


@dataclass(frozen=True)
class Method:
    """A registered function and everything a user or a test wants to know about it."""

    name: str
    kind: str
    fn: Callable[..., Any]
    summary: str
    source: Source
    unit: str | Callable[..., int] | None = None
    needs: tuple[str, ...] = ()
    params: Mapping[str, Param] = field(default_factory=dict)
    faithful: str = "verified"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: a plug-in's function may be a closure, and checkpoints pickle the arguments of a run.
        return get, (self.kind, self.name)

    @property
    def title(self) -> str:
        """What people call it in tables and pictures."""
        return self.extra.get("title") or self.name.replace("_", " ")

    @property
    def inputs(self) -> list[str]:
        """Names of its positional parameters: what a metric is fed."""
        return _inputs(self.fn)

    def check(self, hyper: Any) -> list[str]:
        """Every complaint about a set of hyper-parameters: unknown names, types, ranges, missing ones."""
        if not isinstance(hyper, Mapping):
            return [f"{self.kind} {self.name!r}: hyper-parameters are a mapping, e.g. {{beta: 0.1}}, not {hyper!r}"]
        out = complaints(hyper, self.params, f"{self.kind} {self.name!r}", "hyper-parameter")
        missing = [p.name for p in self.params.values() if p.required and p.name not in hyper]
        if missing:
            out.append(f"{self.kind} {self.name!r} needs {', '.join(missing)}")
        return out

    def resolve(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Hyper-parameters with every default filled in: what a manifest records."""
        return {p.name: hyper.get(p.name, p.default) for p in self.params.values()}

    def to_dict(self) -> dict[str, Any]:
        unit = self.unit if self.unit is None or isinstance(self.unit, str) else self.unit.__name__
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "source": self.source.to_dict(),
            "unit": unit,
            "needs": ["twin" if n == "retain_model" else n for n in self.needs],  # as earlier versions wrote it
            "params": {p.name: p.to_dict() for p in self.params.values()},
            "faithful": self.faithful,
            **({"better": self.extra["better"]} if "better" in self.extra else {}),
        }


_METHODS: dict[str, dict[str, Method]] = {kind: {} for kind in KINDS}
_BROKEN: dict[str, str] = {}  # plug-ins that could not be loaded, and why
_loaded = False


def _register(kind: str, name: str, **about: Any) -> Callable[[_F], _F]:
    source = about.pop("source")
    unit, needs = about.pop("unit", None), tuple(about.pop("needs", ()))
    faithful = about.pop("faithful", "verified")
    if unknown := set(needs) - NEEDS:
        raise TypeError(f"{kind} {name}: unknown needs {sorted(unknown)}")

    def decorate(fn: _F) -> _F:
        if name in _METHODS[kind] and _METHODS[kind][name].fn.__module__ != fn.__module__:
            raise TypeError(f"{kind} {name!r} is registered twice ({fn.__module__})")
        params = params_of(fn)
        summary = (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ").strip()
        _METHODS[kind][name] = Method(name, kind, fn, summary, source, unit, needs, params, faithful, about)
        return fn

    return decorate


def objective(
    name: str,
    *,
    unit: str | Callable[..., int],
    source: Source,
    needs: tuple[str, ...] = (),
    faithful: str = "verified",
    alternates: str | None = None,
):
    """Register ``fn(p: Pass, *, hyper...) -> (n_units,)``: one unreduced value per unit, minimized.

    unit: "token" (targets), "sequence" or "row" (rows with a target), "position" (unpadded tokens), or ``fn(batch, hyper) -> int``.
    alternates: where winner answers come from, if it reads any: "row" (field ``alternate``), "refusal", or "generated".
    Hyper-parameters are the keyword-only arguments.
    """
    return _register("objective", name, unit=unit, source=source, needs=needs, faithful=faithful, alternates=alternates)


def rule(
    name: str,
    *,
    source: Source,
    requires: tuple[str, ...] = (),
    requires_any: tuple[str, ...] = (),
    sets_norm: bool | Callable[[Mapping[str, Any]], bool] = False,
    ignores_weights: bool = False,
    faithful: str = "verified",
):
    """Register ``fn(g: dict[str, Vec], space, state, values, *, hyper...) -> Vec``.

    Args:
        requires: names of the gradients it cannot do without.
        requires_any: names of gradients of which it needs at least one.
        sets_norm: it decides on its update's norm, so that clipping would undo it; or a function of the hyper-parameters.
        ignores_weights: it scales every gradient itself, so that the weight of a gradient's only term means nothing.
    """
    about = {"requires": requires, "requires_any": requires_any, "sets_norm": sets_norm}
    return _register("rule", name, source=source, faithful=faithful, ignores_weights=ignores_weights, **about)


def smoothing(name: str, *, source: Source, spaces: tuple[str, ...] = ("adapter",), faithful: str = "verified"):
    """Register ``fn(grad, space, rng, *, hyper...) -> Vec``; `spaces` says which parameter spaces it can perturb."""
    return _register("smoothing", name, source=source, spaces=spaces, faithful=faithful)


def averaging(name: str, *, source: Source, faithful: str = "verified"):
    """Register ``fn(theta: Vec, space, state, step, *, hyper...) -> Vec | None``; a hyper-parameter `start` is its first step."""
    return _register("averaging", name, source=source, faithful=faithful)


def step_size(
    name: str,
    *,
    source: Source,
    check: Callable[[Mapping[str, Any]], str | None] | None = None,
    faithful: str = "verified",
):
    """Register ``fn(loss, eta, *, hyper...) -> float``: a new learning rate from ``loss(xi)``, the retain loss after the
    optimizer's own update at learning rate xi.

    Args:
        check: the complaint about a set of hyper-parameters that their ranges do not show, or None.
    """
    return _register("step_size", name, source=source, check=check, faithful=faithful)


def selection(name: str, *, source: Source, forget: str = "nll", faithful: str = "verified"):
    """Register ``fn(input, ..., *, hyper...) -> scores`` of one weight, float32, higher = rather chosen, -inf = never.

    The names of its inputs say what it is fed (`attribution.inputs.INPUTS`). Scores have the weight's shape; an axis of length 1 means
    that all entries along it stand or fall together.

    Args:
        forget: the objective that `forget_grad` is the gradient of, unless the user names another.
    """
    return _register("selection", name, source=source, forget=forget, faithful=faithful)


def oneshot(name: str, *, source: Source, forget: str = "ga", faithful: str = "verified"):
    """Register ``fn(shot, *, hyper...) -> None``: fills the factors of a fresh adapter in a few passes (`attribution.oneshot.Shot`).

    Args:
        forget: the objective whose gradient is taken, unless the recipe's terms name another.
    """
    return _register("oneshot", name, source=source, forget=forget, faithful=faithful)


def metric(
    name: str,
    *,
    source: Source,
    title: str | None = None,
    better: Mapping[str, str] | None = None,
    within: tuple[float | None, float | None] = (None, None),
    needs: tuple[str, ...] | None = None,
    reference: str | None = None,
    version: int = 1,
    faithful: str = "verified",
):
    """Register ``fn(input, ..., *, hyper...) -> (rows,) or a number``; the names of its inputs say what it is fed.

    Args:
        title: what people call it; default the name with blanks.
        better: a set's role to "lower", "higher" or "reference" (the retain model's value).
        within: where its values can lie, None: no end; numbers of others' folders are believed only there.
        needs: default what the inputs say (``against_x``: rows of another set, ``reference_x``: the retain model's).
        reference: the subject whose value it is compared with; default what `better` and the inputs say.
    """
    better = dict(better or {})

    def decorate(fn: _F) -> _F:
        inputs = _inputs(fn)
        wanted = _needs_of(inputs) if needs is None else ["retain_model" if n == "twin" else n for n in needs]
        against = reference
        if against is None and ("reference" in better.values() or any(i.startswith("reference_") for i in inputs)):
            against = "retain_only"
        about = {
            "title": title,
            "better": better,
            "reference": against,
            "version": version,
            "faithful": faithful,
            "within": within,
        }
        return _register("metric", name, source=source, needs=wanted, **about)(fn)

    return decorate


def _inputs(fn: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _needs_of(inputs: list[str]) -> list[str]:
    """What must be there for a metric to be fed these inputs; inputs of a plug-in's own provider say nothing."""
    own, compared = [], set()
    for name in inputs:
        found = set()
        while name not in _FED and (prefix := next((p for p in _COMPARED if name.startswith(p)), None)):
            name = name.removeprefix(prefix)
            found.add(_COMPARED[prefix])
        if name in _FED:
            own.append(_FED[name])
            compared |= found
    return list(dict.fromkeys([*own, *(need for need in _COMPARED.values() if need in compared)]))


def attack(name: str, *, source: Source, needs: tuple[str, ...] = (), faithful: str = "verified"):
    """Register an attack."""
    return _register("attack", name, source=source, needs=needs, faithful=faithful)


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for room in _ROOMS:
        if importlib.util.find_spec(room) is not None:
            importlib.import_module(room)
    _load_plugins()


@cache
def _load_plugins() -> None:
    from importlib.metadata import entry_points  # slow to import, and only look-ups need it

    for point in entry_points(group=_ENTRY_POINTS):
        try:
            point.load()
        except (Exception, SystemExit) as e:  # somebody else's code, which must not take our own methods along
            why = next(iter(str(e).strip().splitlines()), "") or "no reason given"
            _BROKEN[point.name] = f"{type(e).__name__}: {why}"
            warnings.warn(
                f"plug-in {point.name} ({point.value}) cannot be loaded, so its methods are missing ({_BROKEN[point.name]}); "
                "mend or uninstall it",
                stacklevel=2,
            )


def title(name: str) -> str:
    """What people call the metric of that name, e.g. "ROUGE-L recall"; the name with blanks where nobody registered it."""
    found = _metric(name)
    return found.title if found else name.replace("_", " ")


def within(name: str) -> tuple[float | None, float | None]:
    """Where values of the metric of that name can lie, None: no end; (None, None) where nobody registered it."""
    found = _metric(name)
    return found.extra["within"] if found else (None, None)


def _metric(name: str) -> Method | None:
    """A metric by name. Their room is imported, which needs numpy but not torch."""
    if name not in _METHODS["metric"]:
        importlib.import_module("peft_unlearn.evaluation")
    if name not in _METHODS["metric"]:
        _load_plugins()
    return _METHODS["metric"].get(name)


def methods(kind: str | None = None) -> list[Method]:
    """Every registered method, of one kind or of all, sorted by kind and name."""
    _load()
    kinds = KINDS if kind is None else (kind,)
    return [m for k in kinds for _, m in sorted(_METHODS[k].items())]


def get(kind: str, name: str) -> Method:
    """The method of that name (hyphens accepted).

    Raises:
        UserError: no such method; the message holds the nearest spelling.
    """
    _load()
    found = _METHODS[kind].get(str(name).replace("-", "_"))
    if found is None:
        broken = "".join(f" The plug-in {k} could not be loaded ({why})." for k, why in _BROKEN.items())
        raise UserError(f"there is no {kind} {name!r}.{nearest(str(name), _METHODS[kind])}{broken}")
    return found
