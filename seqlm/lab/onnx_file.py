"""A step as a model for onnxruntime, and a test that onnxruntime computes what PyTorch computes."""

# B batch, V vocabulary

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqlm import __version__
from seqlm.errors import SeqlmError
from seqlm.extras import extra
from seqlm.lab.trace import LOGITS, SYMBOL, Graph, Node, trace
from seqlm.manifest import sha256
from seqlm.run import Run
from seqlm.store.checkpoint import folder_name

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first with Gelu; onnxruntime has it since 1.17
LARGEST_MESSAGE = 2**31 - 1  # bytes of a protocol buffer
STEPS, BATCH = 20, 2  # of the test
TOLERANCE = 1e-3  # largest difference, relative to the largest logit: sums are in another order


def onnx_model(run: Run) -> bytes:
    """The ONNX file: symbol (B,) and the states -> logits (B, V) and the new states.

    Raises SeqlmError if the library onnx is not installed, for a cell that cannot be exported, and
    for a model that is too large for one file.
    """
    onnx = extra("onnx", "export")
    graph = trace(run)
    if sum(4 * constant.numel() for constant in graph.constants.values()) > LARGEST_MESSAGE - 2**20:
        raise SeqlmError("The weights take more than 2 GB, which one ONNX file cannot hold.")
    model = _model(onnx, graph)
    onnx.helper.set_model_props(model, _metadata(run, graph))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _model(onnx: Any, graph: Graph) -> "onnx.ModelProto":
    helper, number = onnx.helper, onnx.TensorProto.FLOAT

    def declared(name: str, kind: int, tensor: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", *tensor[1:]])

    states = [tuple(state.shape) for state in graph.initial]
    inputs = [declared(SYMBOL, onnx.TensorProto.INT64, (1,))]
    inputs += [declared(n, number, s) for n, s in zip(graph.state_names, states, strict=True)]
    names = [LOGITS, *(f"new_{name}" for name in graph.state_names)]
    shapes = {node.output: node.shape for node in graph.nodes}
    logits = shapes[graph.outputs[0]]
    outputs = [declared(n, number, s) for n, s in zip(names, [logits, *states], strict=True)]
    constants = [_constant(onnx, name, value) for name, value in graph.constants.items()]
    nodes = []
    for node in graph.nodes:
        made, more = _node(onnx, node)
        nodes.append(made)
        constants += more
    # an output has a name of its own, even where it is an input or another output
    nodes += [
        helper.make_node("Identity", [value], [name])
        for value, name in zip(graph.outputs, names, strict=True)
    ]
    whole = helper.make_graph(nodes, "step", inputs, outputs, constants)
    return helper.make_model(
        whole, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="seqlm", ir_version=9
    )


def _node(onnx: Any, node: Node) -> tuple[Any, list[Any]]:
    """The node, and constants for what ONNX takes as inputs and a Node has as attributes."""
    attributes = dict(node.attributes)
    lists: dict[str, list[int]] = {}
    if node.operator == "Reshape":
        lists["shape"] = [-1, *node.shape[1:]]  # for any size of the batch
    elif node.operator == "Slice":
        lists["starts"], lists["ends"] = [attributes.pop("start")], [attributes.pop("end")]
        lists["axes"] = [attributes.pop("axis")]
    elif "axes" in attributes:
        lists["axes"] = attributes.pop("axes")
    constants = [
        _constant(onnx, f"{node.output}_{key}", torch.tensor(value)) for key, value in lists.items()
    ]
    inputs = [*node.inputs, *(constant.name for constant in constants)]
    made = onnx.helper.make_node(node.operator, inputs, [node.output], **attributes)
    return made, constants


def _constant(onnx: Any, name: str, value: Tensor) -> Any:
    return onnx.numpy_helper.from_array(value.numpy(), name)


def _metadata(run: Run, graph: Graph) -> dict[str, str]:
    """What a program needs beside the operators, and where the weights come from."""
    weights = run.path / folder_name(run.step) / "model.safetensors"
    return {
        "seqlm": __version__,
        "run": run.path.name,
        "step": str(run.step),
        "cell": graph.cell,
        "model_sha256": sha256(weights),
        "unit": run.tokenizer.unit,
        "vocabulary": json.dumps(run.tokenizer.shown),
        "beginning": str(run.model.beginning),
        "end": json.dumps(run.tokenizer.end),
        "initial_state": json.dumps([state.tolist() for state in graph.initial]),
    }


def difference(model: bytes, run: Run, steps: int = STEPS) -> float:
    """The largest difference of a logit between onnxruntime and the run, over some steps.

    Two rows read different random symbols.  Raises SeqlmError if the difference is too large for
    another order of sums.
    """
    runtime = extra("onnxruntime", "export")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    symbols = torch.randint(run.tokenizer.vocab_size, (steps, BATCH), generator=random)
    symbols[0] = run.model.beginning
    state = run.model.initial_state(BATCH)
    names = [given.name for given in session.get_inputs()]
    arrays = [tensor.cpu().numpy() for tensor in state]
    gaps, sizes = [], []
    with torch.inference_mode(), run.runtime.active():
        for row in symbols:
            logits, state = run.model.step(row.to(run.model.embedding.weight.device), state)
            inputs = dict(zip(names, [row.numpy(), *arrays], strict=True))
            theirs, *arrays = session.run(None, inputs)
            gaps.append((logits.cpu() - torch.from_numpy(theirs)).abs().max())
            sizes.append(logits.cpu().abs().max())
    largest = float(torch.stack(gaps).max())  # nan if one of them is
    if not largest <= TOLERANCE * float(torch.stack(sizes).max()):
        raise SeqlmError(
            f"onnxruntime computes other logits than PyTorch: they differ by {largest:.2g}. The "
            "file was not written. Check the run with: seqlm check"
        )
    return largest
