"""``mech-align doctor``: is this machine ready, and what is to be done where it is not?"""

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mech_align.cli.options import Doctor
from mech_align.cli.screen import Screen

_MARKS = {"ok": ("✓", "green"), "note": ("–", "yellow"), "problem": ("✗", "red")}
_PACKAGES = (
    "torch",
    "transformer-lens",
    "sae-lens",
    "transformers",
    "peft",
    "numpy",
    "xarray",
    "plotly",
    "tyro",
    "pydantic",
)


@dataclass(frozen=True)
class Finding:
    """One line: ``ok``, ``note`` (something is not there that not everybody needs) or ``problem``."""

    name: str
    state: str
    said: str
    todo: str = ""


def run(options: Doctor, screen: Screen, words: Sequence[str]) -> int:
    """The whole command. Exit code 1 when there is a problem."""
    checks: list[Callable[[], Finding]] = [
        _python, _packages, _memory, _disk, _gpu, _threads, _browser, _jupyter, _hub_settings, _token, _organism,
    ]  # fmt: skip
    if options.online:
        checks.append(_online)
    found: list[Finding] = []
    for check in checks:
        try:
            found.append(check())
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            found.append(
                Finding(
                    name, "problem", f"{type(error).__name__}: {str(error)[:200]}", "see mech-align doctor --traceback"
                )
            )
            if options.traceback:
                raise
    table = Table(show_header=False, box=None, pad_edge=False)
    for one in found:
        mark, style = _MARKS[one.state]
        table.add_row(
            Text(mark, style=style),
            Text(one.name, style="bold"),
            Text(one.said + (f"\n→ {one.todo}" if one.todo else "")),
        )
    problems = sum(one.state == "problem" for one in found)
    screen.say(table, f"{problems} problem{'s' if problems != 1 else ''}" if problems else "ready")
    screen.finish({"ready": not problems, "checks": [one.__dict__ for one in found]})
    return 1 if problems else 0


def _python() -> Finding:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    return Finding(
        "Python", "ok" if good else "problem", f"{version} in {sys.prefix}", "" if good else "3.11 or newer is needed"
    )


def _packages() -> Finding:
    from mech_align import __version__

    have, missing = [f"mech-align {__version__}"], []
    for name in _PACKAGES:
        try:
            have.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    todo = f"pip install {' '.join(missing)}" if missing else ""
    try:
        if int(metadata.version("transformer-lens").split(".")[0]) >= 4:
            todo = "pip install 'transformer-lens>=3.9,<4': 4.0 removed HookedTransformer"
    except metadata.PackageNotFoundError:
        pass
    return Finding("packages", "problem" if todo else "ok", ", ".join(have), todo)


def _memory() -> Finding:
    from mech_align.memory import available_bytes

    free = available_bytes() / 1e9
    return Finding("memory", "ok" if free > 2 else "note", f"{free:.1f} GB free, {os.cpu_count()} CPU cores",
                   "" if free > 2 else "close other programs, or use small models")  # fmt: skip


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(
        "disk",
        "ok" if free > 1 else "note",
        f"{free:.1f} GB free here",
        "" if free > 1 else "make room, or write elsewhere with --out",
    )


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        parts: list[str] = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            parts.append(f"{torch.cuda.get_device_name(i)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
        return Finding("GPU", "ok", "; ".join(parts))
    if torch.backends.mps.is_available():
        return Finding("GPU", "ok", "Apple GPU (--device mps)")
    built = bool(torch.version.cuda)
    todo = (
        "torch was built for CUDA but sees no GPU: check the driver (nvidia-smi)"
        if built and shutil.which("nvidia-smi")
        else ""
    )
    return Finding("GPU", "note", "none; everything runs on the CPU, large models slowly", todo)


def _threads() -> Finding:
    import torch

    return Finding("threads", "ok", f"torch uses {torch.get_num_threads()} threads")


def _browser() -> Finding:
    named = os.environ.get("BROWSER_PATH", "")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    browser = (
        named if named and Path(named).exists() else next((path for name in names if (path := shutil.which(name))), "")
    )
    kaleido = importlib.util.find_spec("kaleido") is not None
    if browser and kaleido:
        return Finding("still images", "ok", f"kaleido {metadata.version('kaleido')} with {browser}")
    todo = [] if kaleido else ["pip install 'mech-align[export]'"]
    todo += [] if browser else ["apt install chromium, or plotly_get_chrome, or set BROWSER_PATH"]
    return Finding(
        "still images", "note", "PDF and PNG of figures cannot be written; reports and HTML work", "; ".join(todo)
    )


def _jupyter() -> Finding:
    """Plotly figures are blank in JupyterLab when its server lives in another environment than the kernel."""
    own = Path(sys.executable).with_name("jupyter-lab")
    server = shutil.which("jupyter-lab") or shutil.which("jupyter") or (str(own) if own.exists() else "")
    here = Path(sys.prefix).absolute()
    if not server:
        return Finding("Jupyter", "note", "not found; only needed for notebooks", "")
    if not Path(server).absolute().is_relative_to(here):
        return Finding("Jupyter", "note", f"the server {server} lives in another environment than this one ({here})",
                       "figures may stay blank: plotly.io.renderers.default = 'plotly_mimetype+notebook'")  # fmt: skip
    return Finding("Jupyter", "ok", "server and kernel share this environment")


def _hub_settings() -> Finding:
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
    ]
    if offline:
        return Finding(
            "Hugging Face hub",
            "note",
            f"offline ({', '.join(offline)} is set): only local and cached models load",
            f"unset {offline[0]} to download",
        )
    return Finding("Hugging Face hub", "ok", "downloads are allowed (not tried; --online asks)")


def _token() -> Finding:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    there = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or path.is_file()
    return Finding("hub token", "ok" if there else "note", "there is one" if there else "none; open models need none",
                   "" if there else "for gated models: hf auth login, or set HF_TOKEN")  # fmt: skip


def _organism() -> Finding:
    from mech_align.models import check_pad_invariance, load_model

    started = time.monotonic()
    model = load_model("organism:suppressor/tuned", device="cpu")
    worst = check_pad_invariance(model)
    return Finding(
        "shipped model", "ok", f"loads in {time.monotonic() - started:.0f} s; padding changes its logits by {worst:.0e}"
    )


def _online() -> Finding:
    import urllib.request

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/api/models/gpt2"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            json.load(answer)
    except (OSError, ValueError) as error:
        return Finding(
            "online",
            "problem",
            f"{url} does not answer: {error}",
            "check network and proxy, or work with local folders",
        )
    return Finding("online", "ok", f"{url} answers")
