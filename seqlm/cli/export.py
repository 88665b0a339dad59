"""seqlm export: a model for programs and pages that have no seqlm."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import Reading, flag, switch
from seqlm.errors import UsageError, unknown
from seqlm.files import require_place
from seqlm.ui import Screen, pairs

if TYPE_CHECKING:
    from seqlm.run import Run

FILES = "Files"  # a panel of --help
WEIGHTS = ("float32", "float16", "int8")


@command("export", "seqlm export --onnx poems.onnx", "seqlm export --web poems-page")
def export(
    screen: Screen,
    reading: Reading,
    onnx: Annotated[
        Path | None,
        flag(
            "ONNX file to write: one step of the model; an existing file is replaced.",
            FILES,
            "FILE",
        ),
    ] = None,
    web: Annotated[
        Path | None, flag("Folder to write: a page that generates in a browser.", FILES, "DIR")
    ] = None,
    weights: Annotated[
        str | None,
        flag("Numbers in the page's matrices. Default: float16.", FILES, "|".join(WEIGHTS)),
    ] = None,
    force: Annotated[bool, switch("Replace a page that exists.", FILES, "--force")] = False,
) -> None:
    """Write a model for programs without seqlm: as an ONNX file, as a web page, or both."""
    if onnx is None and web is None:
        raise UsageError("There is nothing to write. Give --onnx FILE, --web DIR or both.")
    if onnx is not None:
        require_place(onnx)
    if web is None and (force or weights is not None):
        option = "--force" if force else "--weights"
        raise UsageError(f"{option} is about the page only. Give --web DIR, or remove {option}.")
    if weights not in (None, *WEIGHTS):
        raise unknown("value of --weights", weights, WEIGHTS)
    run = reading.load(screen)

    from seqlm.lab.web_page import refuse_to_overwrite, write_page

    if web is not None:
        refuse_to_overwrite(web, force)
    result: dict[str, Any] = {"run": str(run.path), "step": run.step, "onnx": None, "web": None}
    if onnx is not None:
        result |= _write_onnx(screen, run, onnx)
    if web is not None:
        size = write_page(run, web, weights or "float16", force)
        result |= {"web": str(web), "web_bytes": size, "weights": weights or "float16"}
        screen.hint(f"open {web / 'index.html'} in a browser")
    shown = {name: value for name, value in result.items() if value is not None}
    if onnx is not None:
        shown["largest_difference"] = f"{result['largest_difference']:.1e}"
    screen.product(result, "web" if onnx is None else "onnx", pairs(shown, [*shown]))


def _write_onnx(screen: Screen, run: "Run", path: Path) -> dict[str, Any]:
    from seqlm.lab.onnx_file import STEPS, difference, onnx_model
    from seqlm.temporary import write_lines

    model = onnx_model(run)
    largest = difference(model, run)
    write_lines(path, [model])
    screen.note(f"onnxruntime and PyTorch compute the same logits over {STEPS} steps")
    return {
        "onnx": str(path),
        "onnx_bytes": len(model),
        "checked_steps": STEPS,
        "largest_difference": largest,
    }
