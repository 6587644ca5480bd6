"""How many 16-byte loads a thread of compiled code has on their way at once: what hides the latency of memory.

A count of loads in the code cannot tell: a compiler may move each load down to its use, and then one is on its way at a time however
many there are. So the hot loop (of those in the code the one with the most such loads; without loops, all of it) is walked twice, in
order, with a queue of loads. Loads are answered in the order in which they were asked for: a wait for one is a wait for all before it.

- CUDA: the first instruction that names a register which a load will write waits for that load.
- HIP: `s_waitcnt vmcnt(n)` waits until at most n are left; stores are in the same queue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

Queue = list[tuple[set[str], int]]  # of each access, oldest first: registers that it will write, 16-byte loads that it is
Step = Callable[[str, Queue], None]  # what a line of code does to the queue

SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
SASS_LOAD = re.compile(r"\bLDG\.E(\S*)\s+(R\d+)(?:,\s*(R\d+)(?=,))?")
GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_")
GCN_WAIT = re.compile(r"\bs_waitcnt\b.*\bvmcnt\((\d+)\)")


def cuda_loads_in_flight(sass: str) -> int:
    """Of what `cuobjdump -sass` prints."""
    lines = SASS_LINE.findall(sass)
    line_at = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    code = [text for _, text in lines]
    jumps = [(index, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for index, text in enumerate(code)]
    loops = [(line_at.get(int(found[1], 16), index), index) for index, found in jumps if found]
    return _most(code, loops, _step_cuda)


def hip_loads_in_flight(amdgcn: str) -> int:
    """Of an assembly text."""
    code = amdgcn.splitlines()
    line_at = {text.split(":")[0]: index for index, text in enumerate(code) if text.startswith(".LBB")}
    jumps = [(index, re.search(r"\bs_c?branch\S*\s+(\.LBB\w+)", text)) for index, text in enumerate(code)]
    loops = [(line_at[found[1]], index) for index, found in jumps if found]
    return _most(code, loops, _step_hip)


def _most(code: Sequence[str], loops: Sequence[tuple[int, int]], step: Step) -> int:
    bodies = [code[start : end + 1] for start, end in loops if start < end]
    hot = max(bodies, key=lambda body: (_n_wide(body, step), -len(body)), default=[])
    path = [*hot, *hot] if _n_wide(hot, step) else code
    return max(_walk(path, step), default=0)


def _n_wide(code: Sequence[str], step: Step) -> int:
    """16-byte loads in `code`."""
    return sum(next(_walk([line], step)) for line in code)


def _walk(code: Sequence[str], step: Step) -> Iterator[int]:
    """16-byte loads on their way after each line."""
    queue: Queue = []
    for line in code:
        step(line, queue)
        yield sum(n_wide for _, n_wide in queue)


def _step_cuda(line: str, queue: Queue) -> None:
    named = set(re.findall(r"\bR\d+\b", line))
    for index in reversed(range(len(queue))):
        if named & queue[index][0]:
            del queue[: index + 1]
            break
    if load := SASS_LOAD.search(line):
        kind, first, second = load.groups()
        n_words = 8 if ".256" in kind else 4 if ".128" in kind else 2 if ".64" in kind else 1
        starts = [int(name[1:]) for name in (first, second) if name and name not in line.partition("[")[2]]
        each = n_words // len(starts) if starts else n_words
        queue.append(({f"R{start + word}" for start in starts for word in range(each)}, n_words // 4))


def _step_hip(line: str, queue: Queue) -> None:
    if wait := GCN_WAIT.search(line):
        del queue[: max(len(queue) - int(wait[1]), 0)]
    elif GCN_ACCESS.search(line):
        queue.append((set(), int("_load_dwordx4" in line)))
