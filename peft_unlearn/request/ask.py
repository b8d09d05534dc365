"""A base that is asked: its greedy answers, each generated once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.chat import Template
from ..data.formats import to_text
from ..evaluation.generate import cut_at, greedy
from ..folder.atomic import write_text

Progress = Callable[[str, int, int], None]
Generate = Callable[[list[str], int], list[str]]


class Asker:
    """``ask(questions)`` -> the model's greedy answers, in its own template.

    Args:
        kept: a JSON file of earlier answers, read and added to; its keys are hashes over `base`, template, text and length, so that
            another base's answers are never taken.
        generate: ``(prompts, max_new_tokens) -> answers`` instead of the model's own greedy ones.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        *,
        base: str = "",
        kept: Path | None = None,
        progress: Progress | None = None,
        batch_size: int = 32,
        generate: Generate | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template, self.base = model, tokenizer, template, base
        self.kept, self.progress, self.batch_size = kept, progress, batch_size
        self.generate = generate or (lambda prompts, most: greedy(model, tokenizer, prompts, most, batch_size))
        self.stop = (
            () if template != "qa" else ("\n",)
        )  # a model that is no chat model goes on with questions of its own
        self.asked, self.seconds = 0, 0.0
        self._known: dict[str, str] = json.loads(kept.read_text("utf-8")) if kept is not None and kept.is_file() else {}

    def __call__(self, questions: Sequence[str], max_new_tokens: int = 24, what: str = "asking the base") -> list[str]:
        keys = {q: self._key(q, max_new_tokens) for q in questions}
        left = [q for q, key in keys.items() if key not in self._known]
        for start in range(0, len(left), self.batch_size):
            batch = left[start : start + self.batch_size]
            prompts = [to_text({"question": q, "answer": "-"}, self.tokenizer, self.template)[0] for q in batch]
            began = time.monotonic()
            given = self.generate(prompts, max_new_tokens)
            self.asked, self.seconds = self.asked + len(batch), self.seconds + time.monotonic() - began
            self._known |= {keys[q]: cut_at(a, self.stop) for q, a in zip(batch, given, strict=True)}
            self._keep()
            if self.progress is not None:
                self.progress(what, start + len(batch), len(left))
        return [self._known[keys[q]] for q in questions]

    def affordable(self, seconds: float, low: int, high: int) -> int:
        """How many more questions fit into that time, by what those asked so far took; between `low` and `high`."""
        if not self.asked or math.isinf(seconds):
            return high
        return max(low, min(high, int(seconds * self.asked / max(self.seconds, 1e-9))))

    def _key(self, question: str, length: int) -> str:
        about = json.dumps([self.base, self.template, question, length], sort_keys=True, default=dict)
        return hashlib.sha256(about.encode()).hexdigest()[:24]

    def _keep(self) -> None:
        if self.kept is not None:
            write_text(self.kept, json.dumps(self._known, ensure_ascii=False, indent=0))
