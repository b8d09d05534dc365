"""What some metrics need beside one reading and one greedy answer: sampled answers, gradient norms, patched layers.

A provider is a function that is run on a subject only where a metric of the suite takes an input that it gives. One
that fails costs its own metrics their numbers (null and the reason), never anybody else's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..registry import NEEDS, Param, complaints, get, params_of
from .measured import Unmeasured

if TYPE_CHECKING:
    from .shapes import Measured, Plan, SetPlan

Progress = Callable[[str, int, int], None]  # (what, done, total)
# of an input: the same of the suite's reference, of the base, of the set named in `against`
PREFIXES = ("reference_", "base_", "against_")


@dataclass
class Context:
    """What a provider may use beside the model.

    subject: name of the subject that is measured.   base: () -> context manager; the model it yields *is* the base, also
    while another subject is switched on (and where the subject is the base); None where no base is evaluated.
    sets: the sets that the provider is asked about, by name, all with rows.   settings: of the suite, by provider or
    metric.
    """

    subject: str = "model"
    base: Callable[[], AbstractContextManager[Any]] | None = None
    sets: Mapping[str, SetPlan] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: Progress | None = None
    token_budget: int = 4096

    def progress_of(self, what: str) -> Callable[[int, int], None] | None:
        """Progress of one piece of work, called as f(done, total)."""
        report = self.progress
        return None if report is None else lambda done, total: report(what, done, total)

    def per_set(self, read: Callable[[SetPlan], Any]) -> dict[str, Any]:
        """Set name -> read(set), or the `Unmeasured` that it raises."""
        out: dict[str, Any] = {}
        for name, s in self.sets.items():
            try:
                out[name] = read(s)
            except Unmeasured as why:
                out[name] = why
        return out


@dataclass(frozen=True)
class Provider:
    """A registered provider. gives: names of the inputs; params: its hyper-parameters, as of any method."""

    name: str
    gives: tuple[str, ...]
    fn: Callable[..., Mapping[str, Mapping[str, Any]]]
    params: Mapping[str, Param]

    def check(self, settings: Mapping[str, Any]) -> list[str]:
        """Every complaint about a suite's settings for it."""
        return complaints(settings, self.params, self.name, "setting")


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
        _PROVIDERS[name] = Provider(name, gives or (name,), fn, params_of(fn))
        NEEDS.update({name, *(gives or ())})  # a metric may say that it needs it
        return fn

    return decorate


def providers() -> dict[str, Provider]:
    """Every registered provider by name."""
    return dict(_PROVIDERS)


def provider_of(name: str) -> Provider | None:
    """The provider that gives the input of that name."""
    return next((p for p in _PROVIDERS.values() if name in p.gives), None)


def stripped(name: str) -> tuple[str, bool]:
    """An input without its prefixes (``reference_against_logp`` -> ``logp``), and whether ``against_`` was one."""
    against = False
    while provider_of(name) is None:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            break
        name, against = name.removeprefix(prefix), against or prefix == "against_"
    return name, against


def inputs_asked(sets: Mapping[str, SetPlan]) -> Iterator[tuple[str, SetPlan]]:
    """Every input that a metric of the suite takes, without prefixes, with the set it is read on (one named in `against`, say)."""
    for s in sets.values():
        for metric in s.spec.metrics if s.rows else ():
            for name, against in map(stripped, get("metric", metric).inputs):
                where = s.against if against else s
                if where is not None and where.rows:
                    yield name, where


def providers_asked(sets: Mapping[str, SetPlan]) -> dict[str, list[str]]:
    """Provider -> the sets it is asked about."""
    asked: dict[str, dict[str, None]] = {}
    for name, s in inputs_asked(sets):
        if found := provider_of(name):
            asked.setdefault(found.name, {})[s.spec.name] = None
    return {name: list(where) for name, where in asked.items()}


def provide(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """Run every provider that the plan asks for: input -> set -> values, or `Unmeasured` where it failed."""
    out: dict[str, dict[str, Any]] = {}
    for name, where in plan.providers.items():
        found = _PROVIDERS[name]
        sets = {s: plan.sets[s] for s in where}
        try:
            settings = context.settings.get(name, {})
            given = found.fn(model, plan, measured, replace(context, sets=sets), **settings)
        except Unmeasured as why:
            given = {key: dict.fromkeys(where, why) for key in found.gives}
        except Exception as problem:  # whatever it is: the other metrics still have their numbers
            text = next(iter(str(problem).strip().splitlines()), "")
            of_user = isinstance(problem, UserError)
            why = Unmeasured(
                f"{name} failed: {text}" if of_user else f"{name} failed: {type(problem).__name__}: {text}"
            )
            if not of_user:
                warnings.warn(str(why), stacklevel=2)
            given = {key: dict.fromkeys(where, why) for key in found.gives}
        for key in found.gives:
            values = given.get(key, {})
            out[key] = {**values, **{s: _checked(name, values.get(s), len(plan.sets[s].rows)) for s in where}}
    return out


def _checked(name: str, values: Any, rows: int) -> Any:
    """A provider's values of one set, or why they cannot be used."""
    if values is None:
        return Unmeasured(f"{name} returned no values for this set")
    if isinstance(values, Unmeasured) or len(values) == rows:
        return values
    return Unmeasured(f"{name} returned {len(values)} values for {rows} rows")
