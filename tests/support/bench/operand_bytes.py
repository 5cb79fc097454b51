"""How much shared memory the operands of a launch take, in closed form: what tests hold every launch to."""

from __future__ import annotations

from bench.aot.sass import table_of
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.tiles.tile import PIECE, steps_held


def operand_bytes(launch: Launch, arch: str) -> int:
    """Bytes of shared memory that a launch's operands take in closed form; 0 where it has no product of plain numbers.

    Nothing is compiled. The row index of a weight gradient takes stages of its own and some bytes.
    """
    args = launch.args
    if "left_tokens" in args:
        gathered = args["left_tokens"] is not None or args["right_tokens"] is not None
        stages = (launch.stages - 1) // 2 + 1 if gathered else launch.stages
        rows, columns, depth = args["BP"], args["BQ"], args["BT"]
        index, element = 8 * depth * launch.stages if gathered else 0, args["left"]
    elif "BN" in args and "BK" in args and not args.get("FORMAT"):
        stages, rows, depth, index = launch.stages, args["BM"], args["BK"], 0
        if "first_tile" in args:  # a result on its way to memory, see `Tile.store_bytes`
            index = min(rows * args["BN"] * args["out"].element_size(), PIECE)
        columns = args["BN"] * (args.get("HALVES", 1) if "_up" in launch.kernel.fn.__name__ else 1)
        element = args.get("x", args.get("dy", args.get("out")))
    else:
        return 0
    step = (rows + columns) * depth * element.element_size()
    return steps_held(table_of(arch), rows, stages) * step + index
