"""Runs both benchmarks of the network and puts their tables into nbs/speed.qmd, the page on speed.

    python benchmarks/speed.py                       # half an hour on two idle cores; a few minutes on a GPU
    python benchmarks/speed.py --threads 1           # further words go to both benchmarks
    python benchmarks/speed.py --batch 32 --steps 30 --precision bf16       # for a GPU
    python benchmarks/speed.py --dry                 # says what would run
"""
import datetime
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent/"nbs/speed.qmd"
SMALL, LARGE = ["--only", "lite0@320"], ["--only", "lite3@512", "--only", "d0@512"]
# heading -> benchmark, networks, words; what comes later on the command line wins
PARTS = {"Training": [("training.py", SMALL, []), ("training.py", LARGE, ["--rounds", "3", "--steps", "1", "--batch", "2"])],
         "Where the time goes": [("training.py", SMALL, ["--profile"])],
         "Worker processes": [("training.py", SMALL, ["--loaders", "--rounds", "3"])],
         "Inference": [("inference.py", SMALL, ["--rounds", "3", "--steps", "2"]), ("inference.py", LARGE, ["--rounds", "3", "--steps", "1"])]}


def tables(script, networks, words, more):
    "(the machine's line, the tables) of one benchmark."
    command = [sys.executable, str(HERE/script), *networks, *words, *(more if script == "training.py" else without(more, "--batch", "--augment"))]
    print(*command[1:], flush=True)
    o = subprocess.run(command, capture_output=True, text=True)
    machine, _, rest = o.stdout.strip().partition("\n")
    if o.returncode: rest += f"\n\nNot all of this was measured: {o.stderr.strip().splitlines()[-1]}"
    print(rest.strip(), flush=True)
    return machine, rest.strip()


def without(words, *names):
    "Words of a command line less these options and their values."
    out, skip = [], False
    for w in words:
        if w.startswith("--"): skip = w in names
        if not skip: out.append(w)
    return out


def page(more):
    "Everything measured, as markdown."
    out, machine = [], ""
    for heading, runs in PARTS.items():
        out.append(f"## {heading}\n")
        for script, networks, words in runs:
            machine, text = tables(script, networks, words, more)
            out.append(text+"\n")
    words = " ".join(["python benchmarks/speed.py", *more])
    return "\n".join([f"{datetime.date.today()}, {machine}; `{words}`.", "", *out])


if __name__ == "__main__":
    more = sys.argv[1:]
    if {"-h", "--help"} & set(more): print(__doc__)
    elif "--dry" in more: print("\n".join(f"{s} {' '.join(n+w)}" for runs in PARTS.values() for s, n, w in runs))
    else:
        text = PAGE.read_text(encoding="utf-8")
        measured = page(more)
        PAGE.write_text(re.sub(r"(<!-- measured -->\n).*(<!-- end -->)", lambda m: m[1]+"\n"+measured+"\n"+m[2], text, flags=re.S), encoding="utf-8")
