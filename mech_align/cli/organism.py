"""``mech-align organism``: small shipped models with a known answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mech_align.cli.options import OrganismList, OrganismTrain, OrganismVerify
from mech_align.cli.screen import Screen
from mech_align.errors import ModelNotFound
from mech_align.organisms import list_organisms, organism_card, organism_path


def list_(options: OrganismList, screen: Screen, words: Sequence[str]) -> None:
    """What is shipped."""
    rows: list[dict[str, Any]] = []
    for name in list_organisms():
        card, folder = organism_card(name), organism_path(name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        planted = [] if name.endswith("/base") else card.get("planted", [])
        told = {"planted": planted, "question": card.get("question", ""), "bytes": size, "path": str(folder)}
        rows.append({"name": f"organism:{name}", **told})
    table = Table("model", "planted heads", "size")
    for row in rows:
        table.add_row(Text(row["name"]), ", ".join(row["planted"]) or "–", f"{row['bytes'] / 1e6:.1f} MB")
    screen.say(table)
    screen.finish({"organisms": rows})


def train_(options: OrganismTrain, screen: Screen, words: Sequence[str]) -> None:
    """Train it again."""
    _known(options.name)
    from mech_align.organisms.train import train

    card = train(options.out, seed=options.seed, report=screen.note)
    passed = (card.get("verified") or {}).get("passed")
    screen.say(f"written to {options.out}" + ("" if passed is None else f" · verified: {'yes' if passed else 'no'}"))
    screen.finish({"status": "done", "out": str(options.out), "card": card})


def verify_(options: OrganismVerify, screen: Screen, words: Sequence[str]) -> int:
    """Measure the claims again; exit code 1 when one does not hold."""
    _known(options.name)
    folder = options.folder or organism_path(f"{options.name}/base").parent
    if not (Path(folder) / "organism.json").is_file():
        why, hint = "there is no organism.json", "give a folder that organism train wrote"
        raise ModelNotFound(f"{folder} holds no organism", why=why, hint=hint)
    from mech_align.organisms.verify import verify

    found = verify(folder, **({"per_cell": 4, "controls": 20} if options.quick else {}))
    table = Table("claim", "measured", "threshold", "")
    for claim in found["claims"]:
        bound = f"{'≥' if claim['at_least'] else '≤'} {claim['threshold']:g}"
        mark = Text("✓", style="green") if claim["passed"] else Text("✗ does not hold", style="red")
        table.add_row(Text(claim["name"]), f"{claim['value']:.4g}", bound, mark)
    screen.say(table, "every claim holds" if found["passed"] else "not every claim holds")
    screen.finish({"status": "done", "organism": options.name, "folder": str(folder), **found})
    return 0 if found["passed"] else 1


def _known(name: str) -> None:
    organism_path(f"{name}/base")  # raises, with the near names, where there is none
