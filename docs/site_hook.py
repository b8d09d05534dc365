"""What mkdocs adds to the pages of docs/: pages whose text lies elsewhere, the reference of the public names, every method's page.

The files themselves read well in the repository: their links are relative to where they lie. Here each link is turned into one to
the page of the site, or to the repository where the site has no such page.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The text lies at -> the page is called
ELSEWHERE = {
    "README.md": "index.md",
    "adapters/README.md": "specification.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)


def _generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference() -> str:
    """The page of the public names, by the room in which each is written."""
    sys.path.insert(0, str(ROOT))
    import peft_unlearn

    titles = {
        "training": "Training", "data": "Data", "evaluation": "Evaluating", "attacks": "Attacks", "analysis": "Analysis",
        "attribution": "Attribution", "merging": "Merging and composing", "stack": "Stacks", "sharing": "Sharing",
        "registry": "Methods of your own", "forward": "What an objective reads", "errors": "Errors",
    }  # fmt: skip
    where = peft_unlearn._WHERE
    rooms = sorted({w.split(".")[0] for w in where.values()}, key=lambda r: [*titles, r].index(r))
    out = ["# Reference\n", "Every name here is imported from `peft_unlearn`; nothing loads before it is used.\n"]
    for room in rooms:
        out.append(f"## {titles.get(room, room)}\n")
        for name, module in sorted(where.items()):
            if module.split(".")[0] == room:
                out.append(f"::: peft_unlearn.{module}.{name}\n    options: {{heading: {name}, toc_label: {name}}}\n")
    return "\n".join(out)


def on_config(config: Any) -> Any:
    """Every method's page stands under Methods, without being named in mkdocs.yml."""
    pages = _generate().build(written_only=False)
    config.extra["method_pages"] = pages
    titles = {
        "README.md": "All methods",
        **{n: n.removesuffix(".md") for n in pages if n != "README.md"},
        "uoe.md": "One expert: UOE",
    }
    for i, item in enumerate(config.nav):
        if "Methods" in item:
            config.nav[i] = {"Methods": [{title: f"methods/{name}"} for name, title in titles.items()]}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose text lies elsewhere or is generated."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / text_at).read_text(encoding="utf-8") for text_at, page in ELSEWHERE.items()}
    made |= {f"methods/{name}": text for name, text in config.extra["method_pages"].items()}
    for page, text in {**made, "api.md": reference()}.items():
        if (on_disk := files.get_file_from_path(page)) is not None:
            files.remove(on_disk)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a file in the repository -> links of the site."""
    lies_at = {page_name: text_at for text_at, page_name in ELSEWHERE.items()}
    source = lies_at.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    in_site = {f"docs/{f.src_uri}": f.src_uri for f in files if not f.inclusion.is_excluded()} | ELSEWHERE

    def there(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in in_site:
            link = posixpath.relpath(in_site[path], posixpath.dirname(page.file.src_uri) or ".")
        elif (ROOT / path).exists():
            link = f"{config.repo_url.rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        else:
            return match[0]  # mkdocs says that it leads nowhere
        return f"{match[1]}{link}{'#' + anchor if anchor else ''}{match[3]}"

    return "".join(p if p.startswith("```") else LINK.sub(there, p) for p in FENCED.split(markdown))
