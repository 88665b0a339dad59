"""Load a run and a corpus whose files were changed at random: whatever is in them, only our errors.

    python tests/fuzz.py RUN CORPUS COUNT SEED

Changes files of the last step and of the corpus, writes the manifests anew as a forger would (else
every change ends at a hash), and does what a user does: load, evaluate, generate, resume, train.
Prints one JSON object: outcomes, what was neither a success nor an error of ours, and memory.
"""

import copy
import json
import random
import signal
import struct
import sys
import tomllib
import traceback
from collections import Counter
from pathlib import Path

import tomli_w
import torch

import seqlm
from seqlm.errors import SeqlmError
from seqlm.files import to_json
from seqlm.manifest import listed, seal
from seqlm.store import runs
from seqlm.training import launch

LONGEST = 120  # seconds that a case may take; less than 1 on an idle machine
DEEP = json.loads("[" * 200 + "]" * 200)
NASTY = [None, True, -1, 0, 1, 7, 2**31, 2**62, 10**30, 0.5, 1e308, -1e9, "", "x", "\x1b[31m", DEEP]
NASTY += ["../../../etc/passwd", "/dev/zero", "lem", "files", "<u4", "\ud800", "x" * 5000, [], {}]
NASTY += [[1, 2], {"a": {"b": 1}}, float("nan"), float("inf")]


def peak(reset: bool = False) -> int:
    """The most memory this process has held, in KiB; with `reset` it begins to count again."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The paths to every value of a tree of dicts and lists."""
    found = [path] if path else []
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree if isinstance(tree, list) else [])
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


def changed_tree(tree: dict, draw: random.Random) -> dict:
    """One to three values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        *path, key = draw.choice(places(tree) or [("new",)])
        inner = tree
        for part in path:
            inner = inner[part]
        what = draw.random()
        if what < 0.7:
            inner[key] = draw.choice(NASTY)
        elif what < 0.85:
            if not isinstance(inner, dict) or key in inner:
                del inner[key]
        elif isinstance(inner, dict):
            inner[draw.choice(["new", "step", "name", "width", "../x"])] = draw.choice(NASTY)
    return tree


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, removed, doubled or inserted bytes."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        what, size = draw.randrange(5), draw.choice([1, 2, 8, 100])
        if what == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            data[at:] = b""
        elif what == 2:
            data[at : at + size] = b""
        elif what == 3:
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = draw.randbytes(size)
    return bytes(data)


def mutated(path: Path, draw: random.Random) -> bytes:
    data = path.read_bytes()
    if draw.random() < 0.4:
        return changed_bytes(data, draw)
    if path.suffix == ".json":
        # half a surrogate pair is written as an escape, as JSON allows
        return json.dumps(changed_tree(json.loads(data), draw)).encode()
    if path.suffix == ".toml":
        try:
            return tomli_w.dumps(changed_tree(tomllib.loads(data.decode()), draw)).encode()
        except (TypeError, ValueError):  # TOML has no null
            return changed_bytes(data, draw)
    if path.suffix == ".safetensors":
        size = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        text = json.dumps(changed_tree(header, draw)).encode()
        wrong = draw.choice([0, 0, 0, 1, 2**40])
        return struct.pack("<Q", len(text) + wrong) + text + rest
    return changed_bytes(data, draw)


def reseal(folder: Path, manifest: str) -> None:
    old = json.loads((folder / manifest).read_text())
    files = listed((folder / name for name in old["files"]), "sha256", "spot_sha256")
    (folder / manifest).write_text(to_json(seal({**old, "files": files})))


def forged(path: Path, draw: random.Random) -> bytes:
    """A manifest with other values, under a right seal."""
    try:
        return to_json(seal(changed_tree(json.loads(path.read_text()), draw))).encode()
    except ValueError:  # not even JSON
        return changed_bytes(path.read_bytes(), draw)


def use(run: Path) -> None:
    """Load, evaluate, generate; resume and train a step."""
    loaded = seqlm.load(run, "last")
    loaded.generate(chars=3)
    loaded.evaluate(text=b"the cat sees a dog.", on_unknown="skip")
    setup = launch.start(
        run=str(run), resume=True, settings={"train.steps": 9, "train.eval_every": 0}
    )
    setup.trainer.step(1e-3)


def attempt(run: Path) -> str:
    signal.alarm(LONGEST)
    try:
        use(run)
        return "loaded"
    except SeqlmError as error:
        return type(error).__name__
    finally:
        signal.alarm(0)


def main(run: Path, corpus: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw, step = random.Random(seed), runs.steps(run)[-1]
    manifests = {step: "MANIFEST.json", corpus: "manifest.json"}
    targets = [path for folder in manifests for path in sorted(folder.iterdir())]
    originals = {path: path.read_bytes() for path in targets}
    assert attempt(run) == "loaded"
    before = peak(reset=True)
    assert attempt(run) == "loaded"
    normal = peak(reset=True)
    outcomes, wrong = Counter(), []
    for case in range(count):
        path = targets[case % len(targets)]
        folder, manifest = path.parent, manifests[path.parent]
        path.write_bytes(forged(path, draw) if path.name == manifest else mutated(path, draw))
        try:
            if path.name != manifest:
                reseal(folder, manifest)
            if folder == corpus:
                follow(step, corpus)
            outcomes[attempt(run)] += 1
        except BaseException:
            wrong.append(f"case {case}, {path.name}: {traceback.format_exc()[-700:]}")
        finally:
            for changed in {path, folder / manifest, step / "config.toml", step / manifests[step]}:
                changed.write_bytes(originals[changed])
    figures = {"before": before, "normal": normal, "fuzzed": peak()}
    print(json.dumps({"outcomes": outcomes, "wrong": wrong, "kib": figures}))


def follow(step: Path, corpus: Path) -> None:
    """Write the corpus' new seal into the step's configuration, by which the run knows it."""
    try:
        seal_ = json.loads((corpus / "manifest.json").read_text())["fingerprint"]
    except ValueError:
        return
    config = tomllib.loads((step / "config.toml").read_text())
    config["data"]["fingerprint"] = seal_
    (step / "config.toml").write_text(tomli_w.dumps(config))
    reseal(step, "MANIFEST.json")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("a hang")))
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
