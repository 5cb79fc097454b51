"""Changes of the files of a stopped run, drawn by number: damage, other runs' files, links and pipes, forgeries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe_core.base.files import json_digest
from fedmoe_core.simulation.directory.claim import MARKER
from fedmoe_core.simulation.directory.log import LEDGER, METRICS

HOSTILE = (None, -1, 2.7, 99, "x", "", [], {}, [1, "x"], True, 2**70, -(2**63), 1e300, "\x1b[2J", "../../x", [[[[]]]])


@dataclass(frozen=True)
class Scene:
    """Where one change is made.

    Attributes:
        run: the copy of a stopped run that is changed.
        other: a stopped run of another seed.
        outside: a folder with a file that nothing may touch.
        rng: draws the change.
    """

    run: Path
    other: Path
    outside: Path
    rng: Random

    def file(self) -> Path:
        """Draw one file of the run."""
        files = sorted(path for path in self.run.rglob("*") if path.is_file() and path.suffix != ".lock")
        return self.rng.choice(files)

    def log(self) -> Path:
        """Draw one of the logs."""
        return self.run / self.rng.choice([METRICS, LEDGER])


def _flip(scene: Scene, content: bytearray) -> bytes:
    content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
    return bytes(content)


def _bytes(scene: Scene, content: bytearray) -> bytes:
    start = scene.rng.randrange(len(content))
    content[start : start + scene.rng.choice([1, 8, 4096])] = scene.rng.randbytes(scene.rng.choice([0, 1, 8, 100]))
    return bytes(content)


def _zeros(scene: Scene, content: bytearray) -> bytes:
    start = scene.rng.randrange(len(content))
    size = min(scene.rng.choice([1, 16, 4096]), len(content) - start)
    content[start : start + size] = bytes(size)
    return bytes(content)


def _lines(scene: Scene, content: bytearray) -> bytes:
    lines = bytes(content).splitlines(keepends=True)
    first, second = scene.rng.randrange(len(lines)), scene.rng.randrange(len(lines))
    match scene.rng.randrange(4):
        case 0:
            lines.insert(first, lines[second])
        case 1:
            del lines[first]
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case _:
            lines.append(lines[first])
    return b"".join(lines)


CONTENTS: Mapping[str, Callable[[Scene, bytearray], bytes]] = {
    "a bit flipped": _flip,
    "bytes replaced": _bytes,
    "zeros": _zeros,
    "cut": lambda scene, content: bytes(content[: scene.rng.randrange(len(content))]),
    "emptied": lambda scene, content: b"",
    "bytes appended": lambda scene, content: bytes(content) + scene.rng.randbytes(scene.rng.choice([1, 50, 5000])),
    "a newline appended": lambda scene, content: bytes(content) + b"\n",
    "doubled": lambda scene, content: bytes(content) * 2,
    "lines moved": _lines,
}


def _as_link(scene: Scene, path: Path) -> None:
    target = scene.outside / "precious"
    shutil.copyfile(path, target)
    path.unlink()
    path.symlink_to(target)


def _as_pipe(scene: Scene, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_folder(scene: Scene, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_the_other(scene: Scene, path: Path) -> None:
    theirs = scene.other / path.relative_to(scene.run)
    if not theirs.exists():  # a tensor file is named by its digest
        (theirs,) = (scene.other / path.relative_to(scene.run).parent).glob("*.safetensors")
    path.write_bytes(theirs.read_bytes())


def _with_another(scene: Scene, path: Path) -> None:
    other = scene.file()
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


NODES: Mapping[str, Callable[[Scene, Path], None]] = {
    "missing": lambda scene, path: path.unlink(),
    "a link": _as_link,
    "a pipe": _as_pipe,
    "a folder": _as_folder,
    "a broken link": lambda scene, path: (path.unlink(), path.symlink_to(scene.outside / "nowhere"))[1],
    "a device": lambda scene, path: (path.unlink(), path.symlink_to("/dev/zero"))[1],
    "a terabyte": lambda scene, path: os.truncate(path, 1 << 40),
    "of the other run": _of_the_other,
    "swapped with another": _with_another,
    "not permitted": lambda scene, path: path.chmod(0),
}
PLANTED = (
    *("fedmoe-run.lock", "summary.json", "partition.json"),
    *(".summary.json.host-1-abcdefgh.half", "checkpoint/.checkpoint.json.host-1-abcdefgh.half"),
)


def _planted(scene: Scene) -> str:
    """A link under a name that the run will write to."""
    name, target = scene.rng.choice(PLANTED), scene.outside / "precious"
    target.write_text("precious")
    (scene.run / name).unlink(missing_ok=True)
    (scene.run / name).symlink_to(target)
    return f"{name}: planted as a link"


def _whole_checkpoint(scene: Scene) -> str:
    shutil.rmtree(scene.run / "checkpoint")
    match scene.rng.randrange(3):
        case 0:
            shutil.copytree(scene.other / "checkpoint", scene.run / "checkpoint")
            return "checkpoint: of the other run"
        case 1:
            (scene.run / "checkpoint").symlink_to(scene.outside / "checkpoint")
            return "checkpoint: a link"
        case _:
            (scene.run / "checkpoint").write_text("")
            return "checkpoint: a file"


def _leaf(scene: Scene, value: Any) -> tuple[Any, Any]:
    """Draw a container in a JSON value, and a key in it."""
    found = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        for key in keys:
            found.append((node, key))
            walk(node[key])

    walk(value)
    return scene.rng.choice(found)


def _edit(scene: Scene, value: Any) -> str:
    """Change a JSON value in one place; return what was done."""
    node, key = _leaf(scene, value)
    kind = scene.rng.randrange(4)
    if kind == 0:
        del node[key]
        return f"{key} removed"
    if kind == 1 and isinstance(node, dict):
        node["more"] = 1
        return f"a key beside {key}"
    was = node[key]
    near = [was + 1, was - 1] if isinstance(was, int) and not isinstance(was, bool) else []
    node[key] = scene.rng.choice([*HOSTILE, *near])
    return f"{key} = {node[key]!r:.20}"


def _sealed(run: Path, body: dict[str, Any]) -> None:
    """Write a checkpoint's JSON with its digest made again."""
    body.pop("digest", None)
    body["digest"] = json_digest(body)
    (run / "checkpoint" / "checkpoint.json").write_text(json.dumps(body))


def _body(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoint" / "checkpoint.json").read_text())
    return found


def _forged_meta(scene: Scene) -> str:
    body = _body(scene.run)
    what = _edit(scene, body["meta"])
    _sealed(scene.run, body)
    return f"forged meta: {what}"


def _forged_config(scene: Scene) -> str:
    body = _body(scene.run)
    part = scene.rng.choice(["config", "tensors"])
    what = _edit(scene, body[part])
    _sealed(scene.run, body)
    return f"forged {part}: {what}"


def _forged_marker(scene: Scene) -> str:
    path = scene.run / MARKER
    body = json.loads(path.read_text())
    del body["digest"]
    what = _edit(scene, body)
    body["digest"] = json_digest(body)
    path.write_text(json.dumps(body))
    return f"forged marker: {what}"


def _forged_partition(scene: Scene) -> str:
    path = scene.run / "partition.json"
    value = json.loads(path.read_text())
    what = _edit(scene, value)
    path.write_text(json.dumps(value, indent=2) + "\n")
    body = _body(scene.run)
    body["meta"]["partition"] = hashlib.sha256(path.read_bytes()).hexdigest()
    _sealed(scene.run, body)
    return f"forged partition: {what}"


def _forged_tensors(scene: Scene) -> str:
    (file,) = (scene.run / "checkpoint").glob("*.safetensors")
    tensors, rng = load_file(file), scene.rng
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    changes: dict[str, Callable[[], Tensor]] = {
        "NaN": lambda: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor - 1,
        "infinite": lambda: torch.full_like(tensor, torch.inf) if tensor.is_floating_point() else tensor + 100,
        "of another dtype": lambda: tensor.to(rng.choice([torch.int32, torch.float16, torch.bool, torch.uint8])),
        "longer": lambda: torch.cat([tensor.reshape(-1)] * 2),
        "flat and short": lambda: tensor.reshape(-1)[:-1].clone(),
        "of more dimensions": lambda: tensor[None].clone(),
    }
    what = rng.choice([*changes, "removed", "beside another"])
    if what == "removed":
        del tensors[key]
    elif what == "beside another":
        tensors[f"{key}.more"] = torch.zeros(2)
    else:
        tensors[key] = changes[what]()
    file.unlink()
    save_file(tensors, file)
    _name_tensors(scene.run, file)
    return f"forged tensor {key}: {what}"


def _name_tensors(run: Path, file: Path) -> None:
    data, body = file.read_bytes(), _body(run)
    sha256 = hashlib.sha256(data).hexdigest()
    target = file.with_name(f"state-{sha256[:16]}.safetensors")
    file.rename(target)
    body["tensors"] = {"file": target.name, "sha256": sha256, "bytes": len(data)}
    _sealed(run, body)


def _forged_log(scene: Scene) -> str:
    path, body = scene.log(), _body(scene.run)
    entry = body["meta"][path.stem]
    data = path.read_bytes()
    lines = [json.loads(line) for line in data[: entry["bytes"]].splitlines()]
    what = _edit(scene, lines)
    new = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(new + data[entry["bytes"] :])
    body["meta"][path.stem] = {
        "lines": len(lines),
        "bytes": len(new),
        "sha256": hashlib.sha256(new).hexdigest(),
    }
    _sealed(scene.run, body)
    return f"forged {path.name}: {what}"


WHOLE: Mapping[str, Callable[[Scene], str]] = {
    "planted": _planted,
    "whole checkpoint": _whole_checkpoint,
    "forged meta": _forged_meta,
    "forged settings": _forged_config,
    "forged marker": _forged_marker,
    "forged partition": _forged_partition,
    "forged tensors": _forged_tensors,
    "forged log": _forged_log,
}
KINDS = (*CONTENTS, *NODES, *WHOLE, *(kind for kind in WHOLE if kind.startswith("forged")))  # forgeries twice as often


def mutate(scene: Scene, number: int) -> str:
    """Make the change of that number, which decides its kind; return what was done."""
    kind = KINDS[number % len(KINDS)]
    if kind in WHOLE:
        return WHOLE[kind](scene)
    path = scene.file()
    if kind in NODES:
        NODES[kind](scene, path)
    else:
        content = bytearray(path.read_bytes())
        path.write_bytes(CONTENTS[kind](scene, content))
    return f"{path.relative_to(scene.run)}: {kind}"
