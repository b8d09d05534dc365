"""``python -m peft_unlearn``, and what torchrun starts."""

from .cli import main

main()
