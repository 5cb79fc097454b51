"""What a short GPU session runs, in order, each part in a box of seconds, and the record of how a part ended.

The commands are `first` and `second`. Nothing here imports torch: what reads the plan must live on when a part takes
its process down.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 5.0  # seconds; in less a part has not even started
SECONDS = {"first": 300.0, "second": 420.0}
OWN = "fedmoe,fedmoe-recompute,fedmoe-graphed"
TORCH = "grouped_mm,grouped_mm-compact,transformers-grouped_mm"
PEERS = "scattermoe,sonicmoe,triton_kernels,megablocks"
HALF = ("--sustained", "0.5")  # seconds back to back; the whole 2 s are for a session with time
MACHINE = ("cache", "facts")  # parts about the machine, which every command begins with
# Names of `cases.SWEEP_CASES`, which imports torch.
SWEEP = ",".join(f"{name}-{tokens}" for tokens in (2048, 512, 128, 8192) for name in ("quarter", "all"))
HOTTEST = "data_gradient,weight_gradient,up"
RUN, CACHE = "bench.gpu.run", "bench.gpu.cache"  # the modules that parts are commands of


@dataclass(frozen=True)
class Part:
    """One part: a process of its own, which is ended with all it started when its box is over.

    Attributes:
        name: stable; what is done under it is not done again.
        seconds: its box; time that earlier parts left over is added.
        words: what the module is told.
        must: whether the command's verdict is red where it does not finish.
        tuned: whether it runs with the tiles that an earlier part found; left out while there are none.
        always: whether it runs although an earlier command finished it.
        module: what Python runs.
    """

    name: str
    seconds: float
    words: tuple[str, ...]
    must: bool = False
    tuned: bool = False
    always: bool = False
    module: str = RUN


@dataclass(frozen=True)
class Ended:
    """What became of a part: its status in a word, its last exit code (None = it was ended), when, and how long."""

    status: str
    code: int | None
    at: float
    seconds: float
    must: bool


def cases(shape: str, names: str, contenders: str, *more: str) -> tuple[str, ...]:
    """Return the words of a part that times these cases of one or more shapes, each by commas."""
    return ("time", "--shapes", shape, "--cases", names, "--contenders", contenders, *more)


def parts(command: str, *, tiny: bool = False) -> tuple[Part, ...]:
    """List the parts of `first` or `second`; with `tiny` the same on the shapes of a rehearsal."""
    qwen, wide = ("tiny", "tiny-oai,tiny-relu") if tiny else ("qwen3-30b-a3b", "gpt-oss-20b,mixtral-8x7b,olmoe-1b-7b")
    one = ("kernels", "--kernel-cases", "tiny" if tiny else "qwen3-30b-a3b")
    facts = (
        Part("cache", 20, ("unpack",), always=True, module=CACHE),
        Part("facts", 25, ("facts",), always=True),
    )
    if command == "first":
        return (
            *facts,
            Part("kernels", 30, one, must=True),
            Part("correct-bfloat16", 65, ("correct", "--checks", "bfloat16"), must=True),
            Part("memcheck", 45, ("sanitize", "--tools", "memcheck", "--count", "4")),
            Part("time", 65, cases(qwen, "all,small,quarter,eighth", f"{OWN},{TORCH},dense", *HALF), must=True),
            Part("tune", 40, ("tune", "--shapes", qwen, "--families", HOTTEST)),
        )
    assert command == "second", command
    few = "fedmoe,grouped_mm,dense"
    return (
        *facts,
        Part("correct", 56, ("correct",), must=True, always=True),
        Part("peers", 45, cases(qwen, "all,small", f"{OWN},{TORCH},{PEERS},dense", *HALF)),
        Part("routing", 10, ("routing",)),
        Part("tune-more", 30, ("tune", "--shapes", qwen), tuned=True),
        Part("time-tuned", 25, cases(qwen, "all,small", few, *HALF), tuned=True),
        Part("time-wide", 35, cases(wide, "all,eighth-quarter", few, *HALF)),
        Part("model", 23, ("model",)),
        Part("ncu", 20, ("ncu",)),
        Part("sanitize", 20, ("sanitize", "--tools", "memcheck", "--count", "12")),
        Part("kernels-all", 15, ("kernels",)),
        # The most telling numbers of tokens first; what does not fit is named.
        Part("sweep", 35, cases(qwen, f"{SWEEP},all,quarter", "fedmoe,fedmoe-graphed,grouped_mm", *HALF)),
        # Liger tunes itself at its first step, by 240 configurations. So it comes last and takes no time from others.
        Part("liger", 54, cases(qwen, "all", f"{OWN},{TORCH},{PEERS},liger,dense", *HALF)),
    )
