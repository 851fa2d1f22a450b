"""Print an exact pin for every distribution that mech-align needs with some extras: `python scripts/pin.py dev docs`.

`pip freeze` would also pin what merely happens to be installed.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "mech-align"
HEADER = """\
# Exact versions that were tested together; `make constraints` writes this file.
# torch: no local version (+cpu, +cu126), so that the machine's own index decides which build it gets."""


def needed(root: str, extras: set[str]) -> dict[str, str]:
    """Which distributions, at which version, does `root` with `extras` pull in here?"""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(root, extra) for extra in ("", *sorted(extras))]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is needed and not installed: pip install -e '.[{','.join(sorted(extras))}]' first")
        versions[name] = found.version.split("+")[0]
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                todo += [(child, more) for more in ("", *requirement.extras)]
    del versions[root]
    return versions


if __name__ == "__main__":
    print(HEADER)
    for name, version in sorted(needed(ROOT, set(sys.argv[1:])).items()):
        print(f"{name}=={version}")
