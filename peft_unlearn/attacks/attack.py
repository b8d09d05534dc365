"""From adapter folders to what attacks bring back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError, nearest
from ..evaluation.subjects import (
    bundle_for,
    embedded_retain_model,
    judged_folders,
    retain_model_folder,
    stack_of,
    subject_of,
    subjects_on,
)
from ..folder.yaml_io import parse_yaml
from ..folder.results import store
from ..folder.write import update_block
from ..registry import methods
from .run import SHOWN, run_attacks, wanted

BLOCK = "attacks"  # of eval.json
Requests = list[tuple[str, dict[str, Any]]]


def attack(
    folders: Sequence[str | Path],
    requests: Requests,
    *,
    base: str | None = None,
    data: str | None = None,
    n: int | None = None,
    seed: int = 0,
    below: Sequence[str | Path] = (),
    progress: Callable[[str, int, int], None] | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Attack base, adapters and, where there is one, the retain-only twin; one loaded base, adapters swapped in place.

    requests: (attack, hyper-parameters), see `requests_of`. The forget rows must be those that every adapter was
    trained to forget, by their hash. With one folder and all rows the result becomes block "attacks" of its eval.json;
    earlier attacks on the same adapter and rows stay in it. below: adapters that these were trained on top of, lowest first.
    """
    chosen = wanted(requests)
    adapters = judged_folders(folders)
    found = list(adapters.values())
    bundle = bundle_for(found, data)
    stack = stack_of(adapters, base, below)
    subjects = subjects_on(stack, list(adapters))
    ref = found[0].manifest.base.ref
    subjects["retain_only"] = embedded_retain_model(ref, bundle)
    checkpoints: dict[str, Any] = dict.fromkeys(subjects, stack.base_dir)
    checkpoints["retain_only"] = retain_model_folder(ref, bundle)
    block = run_attacks(
        subjects,
        chosen,
        bundle,
        stack.tokenizer,
        shown=max([int(w.settings["rows"]) for w in chosen if w.method.name == "relearn"], default=SHOWN),
        n=n,
        seed=seed,
        checkpoints=checkpoints,
        adapter_id=found[0].adapter_id if len(found) == 1 else None,
        base=ref,
        progress=progress,
    )
    block["scale"] = {subject: stack.scales()[name] for subject, name in subject_of(list(adapters)).items()}
    if write and len(found) == 1 and n is None:
        whole = _with_earlier(block, (found[0].eval or {}).get(BLOCK))
        store(found[0].path, lambda: update_block(found[0].path, BLOCK, whole))
    return block


def _with_earlier(block: dict[str, Any], earlier: Any) -> dict[str, Any]:
    """The block with those attacks of an earlier one that were not run again and are about the same thing."""
    same = ("format", "rows", "adapter_id", "base", "versions", "scale")
    if not isinstance(earlier, Mapping) or any(earlier.get(k) != block[k] for k in same):
        return block
    return {**block, "attacks": {**earlier.get("attacks", {}), **block["attacks"]}}


def requests_of(
    *,
    relearn: int | None = None,
    quantize: str | None = None,
    jailbreak: str | None = None,
    plain: Sequence[str] = (),
    everything: bool = False,
    sets: Sequence[str] = (),
) -> Requests:
    """The attacks that the command's flags ask for.

    relearn: rows shown.   quantize: formats, separated by commas.   jailbreak: ``templates``, or a YAML file of them.
    plain: attacks by name with their defaults.   everything: all there are, with all formats.   sets:
    ``relearn.learning_rate=3e-4``, for every request of that attack.

    Raises:
        UserError: every ``--set`` that cannot be understood or is about an attack that was not asked for.
    """
    found: Requests = [(name, {}) for name in plain]
    if relearn is not None:
        found.append(("relearn", {"rows": relearn}))
    found += [("quantize", {"format": f.strip()}) for f in (quantize or "").split(",") if f.strip()]
    if jailbreak is not None:
        found.append(("jailbreak", {} if jailbreak == "templates" else {"file": jailbreak}))
    if everything:
        asked = {name for name, _ in found}
        for method in (m for m in methods("attack") if m.name not in asked):
            needed = next((p for p in method.params.values() if p.required), None)
            found += [(method.name, {needed.name: c} if needed else {}) for c in (needed and needed.choices) or (None,)]
    errors = Errors()
    for text in sets:
        key, sign, value = text.partition("=")
        name, dot, hyper = key.strip().replace("-", "_").partition(".")
        if not (sign and dot and name and hyper):
            errors.add(f"--set {text}: expected ATTACK.NAME=VALUE, e.g. relearn.learning_rate=3e-4")
        elif name not in {asked for asked, _ in found}:
            errors.add(
                f"--set {text}: {name!r} is not among the attacks asked for.{nearest(name, {a for a, _ in found})}"
            )
        else:
            try:
                parsed = parse_yaml(value, f"--set {text}")
            except UserError as problem:
                errors.absorb(problem)
                continue
            for _, given in (r for r in found if r[0] == name):
                given[hyper] = parsed
    errors.raise_if_any("attacks")
    return found


def describe(block: Mapping[str, Any]) -> str:
    """The block as a table of text: before -> after of the first measure of each attack, and the recovery."""
    lines = [
        f"{block['rows']['scored']} forget rows scored, {block['rows']['shown']} shown to attacks that learn; "
        "recovery: 0 = nothing came back, 1 = as the base"
    ]
    for label, one in block["attacks"].items():
        changed = ", ".join(f"{k}={v}" for k, v in one["settings"].items())
        lines += ["", f"{label}  ({changed})" if changed else label]
        wide = max(map(len, one["subjects"]))
        for name, seen in one["subjects"].items():
            if seen is None:
                lines.append(f"  {name:<{wide}} -  {one['reasons'][name]}")
                continue
            measure = next(iter(seen["before"]), None)
            if measure is None:
                continue
            before, after = seen["before"][measure], seen["after"].get(measure)
            text = f"  {name:<{wide}} {measure} {_number(before)} -> {_number(after)}"
            share = (one["recovery"].get(name) or {}).get(measure)
            lines.append(text + _share(share))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    if share["value"] is None:
        return f"   recovery -  ({share['reason']})"
    ci = share["ci95"]
    return f"   recovery {share['value']:.3f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")
