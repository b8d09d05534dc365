"""What some metrics need beside one reading and one greedy answer: sampled answers, gradient norms, patched layers.

A provider is a function that is run on a subject only where a metric of the suite takes an input that it gives. One
that fails costs its own metrics their numbers (null and the reason), never anybody else's.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..registry import NEEDS, Method, Param, param_of
from .measured import Unmeasured

if TYPE_CHECKING:
    from .shapes import Measured, Plan, SetPlan

Progress = Callable[[str, int, int], None]  # (what, done, total)
PREFIXES = (
    "reference_",
    "base_",
    "against_",
)  # of an input: the same of the suite's reference, of the base, of the set named in `against`


@dataclass
class Context:
    """What a provider may use beside the model.

    subject: name of the subject that is measured.   base: () -> context manager; the model it yields *is* the base, also
    while another subject is switched on (and where the subject is the base); None where no base is evaluated.
    sets: the sets that the provider is asked about, by name, all with rows.   settings: of the suite, by provider or
    metric.   cache: one dict for all subjects of a `score`, for work that does not depend on the subject.
    """

    subject: str = "model"
    base: Callable[[], AbstractContextManager[Any]] | None = None
    sets: Mapping[str, SetPlan] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: Progress | None = None
    token_budget: int = 4096
    cache: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """A registered provider. gives: names of the inputs; params: its hyper-parameters, as of any method."""

    name: str
    gives: tuple[str, ...]
    fn: Callable[..., Mapping[str, Mapping[str, Any]]]
    params: Mapping[str, Param]

    def check(self, settings: Mapping[str, Any]) -> list[str]:
        """Every complaint about a suite's settings for it."""
        out = []
        for key, value in settings.items():
            if key not in self.params:
                out.append(f"{self.name} has no setting {key!r}.{nearest(str(key), self.params)}")
            elif wrong := self.params[key].check(value):
                out.append(f"{self.name}: {wrong}")
        return out


_PROVIDERS: dict[str, Provider] = {}


def provider(name: str, gives: tuple[str, ...] | None = None) -> Callable[[Any], Any]:
    """Register ``fn(model, plan, measured, context, *, hyper..) -> {input: {set name: values}}``.

    gives: the inputs it returns, default its own name. values: one per row of the set, in order (list, (rows,) array or
    `Ragged`), or an `Unmeasured` where that set has none. Settings are the keyword-only arguments (`Annotated[int,
    Range(1)]` as in the registry); a suite sets them under ``settings: {NAME: {..}}``.
    """

    def decorate(fn: Any) -> Any:
        if name in _PROVIDERS and _PROVIDERS[name].fn.__module__ != fn.__module__:
            raise TypeError(f"provider {name!r} is registered twice ({fn.__module__})")
        hints = typing.get_type_hints(fn, include_extras=True)
        params = {
            p.name: param_of(p.name, hints[p.name], p.default)
            for p in inspect.signature(fn).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        _PROVIDERS[name] = Provider(name, gives or (name,), fn, params)
        NEEDS.update({name, *(gives or ())})  # a metric may say that it needs it
        return fn

    return decorate


def providers() -> dict[str, Provider]:
    """Every registered provider by name."""
    return dict(_PROVIDERS)


def provider_of(name: str) -> Provider | None:
    """The provider that gives the input of that name."""
    return next((p for p in _PROVIDERS.values() if name in p.gives), None)


def inputs_of(method: Method) -> list[str]:
    """What a metric is fed: its positional parameters by name."""
    return [p.name for p in inspect.signature(method.fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def stripped(name: str) -> tuple[str, bool]:
    """An input without its prefixes (``reference_against_logp`` -> ``logp``), and whether ``against_`` was one."""
    against = False
    while provider_of(name) is None:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            break
        name, against = name.removeprefix(prefix), against or prefix == "against_"
    return name, against


def asked_of(sets: Mapping[str, SetPlan], get: Callable[[str], Method]) -> dict[str, list[str]]:
    """Provider -> the sets it is asked about, those named in `against` among them."""
    asked: dict[str, list[str]] = {}
    for name, s in sets.items():
        for metric in s.spec.metrics if s.rows else ():
            for bare, against in map(stripped, inputs_of(get(metric))):
                found = provider_of(bare)
                if found is None:
                    continue
                where = (s.spec.against or "") if against else name
                if where in sets and sets[where].rows and where not in asked.setdefault(found.name, []):
                    asked[found.name].append(where)
    return asked


def provide(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """Run every provider that the plan asks for: input -> set -> values, or `Unmeasured` where it failed."""
    out: dict[str, dict[str, Any]] = {}
    for name, where in plan.providers.items():
        found = _PROVIDERS[name]
        own = Context(**{**vars(context), "sets": {s: plan.sets[s] for s in where}})
        try:
            given = found.fn(model, plan, measured, own, **context.settings.get(name, {}))
            for key in found.gives:
                out[key] = dict(given.get(key, {}))
        except Unmeasured as why:
            out.update({key: dict.fromkeys(where, why) for key in found.gives})
        except Exception as problem:  # whatever it is: the other metrics still have their numbers
            why = Unmeasured(_reason(name, problem))
            if not isinstance(problem, UserError):
                warnings.warn(str(why), stacklevel=2)
            out.update({key: dict.fromkeys(where, why) for key in found.gives})
        _check(name, out, found.gives, {s: len(plan.sets[s].rows) for s in where})
    return out


def _reason(name: str, problem: Exception) -> str:
    text = next(iter(str(problem).strip().splitlines()), "")
    return (
        f"{name} could not be had: {text}"
        if isinstance(problem, UserError)
        else f"{name} failed: {type(problem).__name__}: {text}"
    )


def _check(name: str, out: dict[str, dict[str, Any]], gives: Iterable[str], rows: Mapping[str, int]) -> None:
    for key in gives:
        for s, count in rows.items():
            values = out[key].get(s, Unmeasured(f"{name} gave nothing for this set"))
            if not isinstance(values, Unmeasured) and len(values) != count:
                values = Unmeasured(f"{name} gave {len(values)} values for {count} rows")
            out[key][s] = values
