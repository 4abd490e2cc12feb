"""Two programs measured in turns, because a machine's speed changes from minute to minute: ours, theirs, theirs, ours …"""
import json
import subprocess
import sys


def last_object(text):
    """The last line of `text` that is a JSON object."""
    for line in reversed(text.strip().splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    sys.exit(f"{sys.argv[0]}: no JSON object in the output: {text[-500:]!r}")


def run(name, command, environment=None):
    """Runs to the end, prints its figures and returns its object."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{sys.argv[0]}: {' '.join(command)} ended with status {done.returncode}")
    result = last_object(done.stdout)
    print(f"  {name:18} {result['images_per_second']:9.1f} images/s   peak {result['peak_rss_mb']:.0f} MB   {result.get('path', '')}",
          flush=True)
    return result


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def in_turns(rounds, ours, theirs):
    """[(our object, their object)]; `ours` and `theirs` are called. Who goes first changes, so that neither always gets the warmer machine."""
    pairs = []
    for turn in range(rounds):
        if turn % 2 == 0:
            mine = ours()
            other = theirs()
        else:
            other = theirs()
            mine = ours()
        pairs.append((mine, other))
    return pairs
