"""Measure what ``import clda_core`` costs over ``import torch``; fail above the budget."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

BUDGET_MS = 50.0
RUNS = 10
IN_PROCESS = "import time, torch; t = time.perf_counter(); import clda_core; print(time.perf_counter() - t)"


def main() -> None:
    """Time whole processes, interleaved, and the import alone inside the second kind; judge the latter's median."""
    whole = {"import torch": [], "import clda_core": []}
    alone = []
    subprocess.run([sys.executable, "-c", "import clda_core"], check=True)
    for _ in range(RUNS):
        for statement, times in whole.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            times.append(1e3 * (time.perf_counter() - start))
        shown = subprocess.run([sys.executable, "-c", IN_PROCESS], check=True, stdout=subprocess.PIPE).stdout
        alone.append(1e3 * float(shown))
    for statement, times in whole.items():
        print(f'python -c "{statement}": median of {RUNS}: {statistics.median(times):.0f} ms')
    cost = statistics.median(alone)
    print(f"import clda_core after import torch: median of {RUNS}: {cost:.1f} ms (budget {BUDGET_MS:.0f} ms)")
    if cost > BUDGET_MS:
        sys.exit("the import is over its budget")


if __name__ == "__main__":
    main()
