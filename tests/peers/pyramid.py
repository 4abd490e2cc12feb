"""Our program as the peers' scripts use it, the golden outputs, and the comparisons."""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

PROGRAM = os.environ["PYRAMID"]
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden")
FOLDER = tempfile.TemporaryDirectory(prefix="pyramid-peers-")
failures = 0


def path(name):
    """A path in the script's temporary folder."""
    return os.path.join(FOLDER.name, name)


def run(*arguments):
    done = subprocess.run([PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"peers: pyramid {' '.join(arguments)} ended with status {done.returncode}: {done.stderr[-2000:]}{done.stdout[-500:]}")
    return done.stdout


def convert(source, target, *flags):
    run("convert", source, target, *flags)
    return target


def logits(weights, pictures, *flags):
    """What `pyramid classify` says of an array [B, 3, H, W]."""
    np.save(path("pictures.npy"), pictures)
    answer = json.loads(run("classify", "--ckpt_path", weights, "--logits", "--json", *flags, path("pictures.npy")))
    return np.array(answer["logits"], dtype=np.float64)


def golden(file):
    """The cases of logits_torch.json or logits_mindcv.json."""
    with open(os.path.join(GOLDEN, file)) as text:
        return json.load(text)


def compare(what, theirs, ours, limit):
    """Prints the largest difference; counts a failure if it is over the limit."""
    theirs, ours = np.asarray(theirs, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    same_shape = theirs.shape == ours.shape
    error = float(np.abs(theirs - ours).max()) if same_shape else float("inf")
    report(what, f"{error:.2e}, limit {limit:.0e}" if same_shape else f"{theirs.shape} against {ours.shape}", error <= limit)


def same(what, theirs, ours):
    """The same names with the same bits."""
    differing = [name for name in set(theirs) | set(ours)
                 if name not in theirs or name not in ours or np.asarray(theirs[name]).shape != np.asarray(ours[name]).shape or
                 np.asarray(theirs[name]).tobytes() != np.asarray(ours[name]).tobytes()]
    report(what, f"{len(ours)} tensors bit-equal" if not differing else f"{len(differing)} differ, such as {sorted(differing)[0]}",
           bool(ours) and not differing)


def report(what, found, good):
    global failures
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {what}: {found}", flush=True)


def finish():
    sys.exit(f"{failures} comparisons failed" if failures else 0)
