"""Train an embedded base and its retain models again, verify them, and only then write them.

python adapters/bases/build people --out adapters/bases      # or domains (a mixture of experts), or digits (image classifiers)
"""

from __future__ import annotations

import argparse
import sys

from build_digits import build_digits
from build_domains import build_domains
from build_people import build

from peft_unlearn.errors import UserError
from peft_unlearn.progress import bars

BUILDERS = {"people": build, "domains": build_domains, "digits": build_digits}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python adapters/bases/build", description=__doc__)
    parser.add_argument("name", nargs="?", default="people", choices=BUILDERS)
    parser.add_argument("--out", default="adapters/bases", help="folder that receives the models")
    parser.add_argument(
        "--retain-models", "--twins", type=int, default=1, help="how many models without the forget set"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and initialization")
    given = parser.parse_args(argv)
    try:
        with bars() as progress:
            found = BUILDERS[given.name](
                given.out, seed=given.seed, retain_models=given.retain_models, progress=progress
            )
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print("\n".join(f"{given.out}/{folder}" for folder in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
