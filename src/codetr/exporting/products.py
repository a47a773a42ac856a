"""Linear layers as one operation each: a product with weights, and the sum behind it."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Layer(NamedTuple):
    """product: a node x @ weights. bias: which is added. last: the sum, or the ReLU behind it."""

    product: Any
    bias: Any
    last: Any

    @property
    def rectified(self) -> bool:
        return bool(self.last.op_type == "Relu")


def join_products(graph: Any) -> None:
    """`x @ weights + bias` on any number of axes becomes Gemm on one long axis of rows, in place.

    A ReLU behind it, and a further layer behind that, take the rows as they are. graph: of onnx_ir, with constants as
    initializers and named nodes. What nobody uses any more is left for another pass.
    """
    rows: dict[Any, tuple[Any, Any]] = {}  # values as [rows, width], and their lengths along all axes but the last
    for node in list(graph):
        layer = _layer_of(node)
        if layer is not None:
            _join(graph, layer, rows)


def _layer_of(product: Any) -> _Layer | None:
    """None for a node that is no such product."""
    if product.op_type != "MatMul":
        return None
    x, weights = product.inputs
    added = _only_user(product)
    if x.shape is None or len(x.shape) < 3 or not _constant(weights, 2) or added is None or added.op_type != "Add":
        return None
    biases = [one for one in added.inputs if _constant(one, 1) and one.shape[0] == weights.shape[1]]
    if not biases or added.outputs[0].is_graph_output():
        return None
    after = _only_user(added)
    rectified = after is not None and after.op_type == "Relu" and not after.outputs[0].is_graph_output()
    return _Layer(product, biases[0], after if rectified else added)


def _only_user(node: Any) -> Any:
    users = node.outputs[0].consumers()
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _constant(value: Any, axes: int) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == axes


def _join(graph: Any, layer: _Layer, rows: dict[Any, tuple[Any, Any]]) -> None:
    import onnx_ir as ir

    product, bias, last = layer
    x, weights = product.inputs

    def new(kind: str, *inputs: Any, **attributes: Any) -> Any:
        node = ir.node(kind, inputs, attributes, name=f"{product.name.replace('MatMul', 'Gemm')}/{kind}_{len(names)}")
        names.append(node.name)
        node.outputs[0].name = f"{node.name}.value"
        graph.insert_before(product, node)
        return node.outputs[0]

    def numbers(*values: int) -> Any:
        name = f"rows_{'_'.join(map(str, values))}"
        if name not in graph.initializers:
            graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(list(values), name=name)))
        return graph.initializers[name]

    names: list[str] = []
    width, wider = weights.shape
    if x not in rows:
        rows[x] = new("Reshape", x, numbers(-1, width)), new("Shape", x, end=-1)
    long, lengths = rows[x]
    found = new("Gemm", long, weights, bias)
    if layer.rectified:
        found = new("Relu", found)
    back = new("Reshape", found, new("Concat", lengths, numbers(wider), axis=0))
    back.shape, back.dtype = last.outputs[0].shape, last.outputs[0].dtype
    rows[back] = found, lengths
    last.outputs[0].replace_all_uses_with(back)
