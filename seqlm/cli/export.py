"""seqlm export: a model for programs that have no seqlm."""

from pathlib import Path
from typing import Annotated

from seqlm.cli._app import command
from seqlm.cli._flags import Reading, flag
from seqlm.ui import Screen, pairs

FILES = "Files"  # a panel of --help


@command("export", "seqlm export --onnx poems.onnx")
def export(
    screen: Screen,
    reading: Reading,
    onnx: Annotated[
        Path,
        flag(
            "ONNX file to write: one step of the model; an existing file is replaced.",
            FILES,
            "FILE",
        ),
    ],
) -> None:
    """Write a model for programs that have no seqlm: as an ONNX file."""
    run = reading.load(screen)

    from seqlm.lab.onnx_file import STEPS, difference, onnx_model
    from seqlm.temporary import write_lines

    model = onnx_model(run)
    largest = difference(model, run)
    write_lines(onnx, [model])
    screen.note(f"onnxruntime computes the same logits over {STEPS} steps")
    result = {
        "run": str(run.path),
        "step": run.step,
        "onnx": str(onnx),
        "onnx_bytes": len(model),
        "checked_steps": STEPS,
        "largest_difference": largest,
    }
    screen.product(
        result, "onnx", pairs({**result, "largest_difference": f"{largest:.1e}"}, [*result])
    )
