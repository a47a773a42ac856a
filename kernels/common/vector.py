# mypy: ignore-errors
"""Vectors of float32 in Numba's code, which LLVM keeps in registers: `Vector`, and what can be done with it."""

import math

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

FLOAT, INT = ir.FloatType(), ir.IntType(32)


class Vector(types.Type):
    """The channels of a cell as one value that LLVM keeps in registers.

    From loops over arrays LLVM makes checks for overlap, and sums in memory.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes, self.llvm = lanes, ir.VectorType(FLOAT, lanes)
        super().__init__(f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector) -> None:
        super().__init__(manager, vector, vector.llvm)


@intrinsic(prefer_literal=True)
def filled(typing, number, lanes):
    vector = Vector(lanes.literal_value)
    return vector(types.float32, lanes), lambda _, builder, __, args: _spread(builder, args[0], vector.lanes)


@intrinsic
def load(typing, array, index, like):
    """The vector number `index` of an array, of the type of `like`."""

    def code(context, builder, _, args):
        first = builder.mul(args[1], args[1].type(like.lanes))
        return builder.load(_pointer(context, builder, array, args[0], first, like.llvm), align=4)

    return like(array, types.intp, like), code


@intrinsic
def load_some(typing, array, first, count, otherwise, like):
    """From element `first` on: `count` lanes, or all of them; `otherwise` in the remaining ones."""

    def code(context, builder, _, args):
        pointer = _pointer(context, builder, array, args[0], args[1], like.llvm)
        numbers = ir.Constant(ir.VectorType(args[2].type, like.lanes), list(range(like.lanes)))
        mask = builder.icmp_signed("<", numbers, _spread(builder, args[2], like.lanes))
        operands = [pointer, INT(4), mask, _spread(builder, args[3], like.lanes)]
        return _call(builder, f"llvm.masked.load.v{like.lanes}f32.p0", like.llvm, operands)

    return like(array, types.intp, types.intp, types.float32, like), code


@intrinsic
def store(typing, array, index, vector):
    """As the vector number `index` of an array."""

    def code(context, builder, _, args):
        first = builder.mul(args[1], args[1].type(vector.lanes))
        builder.store(args[2], _pointer(context, builder, array, args[0], first, vector.llvm), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def prefetch(typing, array, first):
    """Asks for the cache line of an element, which need not exist."""

    def code(context, builder, _, args):
        pointer = _pointer(context, builder, array, args[0], args[1], ir.IntType(8))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, INT(0), INT(3), INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def multiply_add(typing, factor, vector, summand):
    def code(_, builder, __, args):
        product = builder.fmul(_spread(builder, args[0], vector.lanes), args[1], ("contract",))
        return builder.fadd(product, args[2], ("contract",))

    return vector(types.float32, vector, vector), code


@intrinsic
def dot(typing, one, other):
    def code(_, builder, __, args):
        product = builder.fmul(*args, ("contract",))
        return _call(builder, f"llvm.vector.reduce.fadd.v{one.lanes}f32", FLOAT, [FLOAT(-0.0), product], ("reassoc",))

    return types.float32(one, one), code


@intrinsic
def largest(typing, vector):
    def code(_, builder, __, args):
        return _call(builder, f"llvm.vector.reduce.fmax.v{vector.lanes}f32", FLOAT, args)

    return types.float32(vector), code


@intrinsic
def exp_below(typing, vector, top):
    """exp(vector - top), where no lane is above top: 2^n e^r with |r| < 0.35, and six terms for e^r."""

    def code(_, builder, __, args):
        def all_lanes(number: float) -> ir.Constant:
            return ir.Constant(vector.llvm, [float(np.float32(number))] * vector.lanes)

        def multiply_add(a, b, c):
            return builder.fadd(builder.fmul(a, b, ("contract",)), c, ("contract",))

        integers = ir.VectorType(INT, vector.lanes)
        x = builder.fsub(args[0], _spread(builder, args[1], vector.lanes))
        x = builder.select(builder.fcmp_ordered("<", x, all_lanes(-87)), all_lanes(-87), x)  # n stays in range
        turns = builder.fmul(x, all_lanes(math.log2(math.e)))
        n = _call(builder, f"llvm.rint.v{vector.lanes}f32", vector.llvm, [turns])
        r = multiply_add(n, all_lanes(-math.log(2)), x)
        power = all_lanes(1)
        for divisor in (6, 5, 4, 3, 2, 1):
            power = multiply_add(builder.fmul(power, r), all_lanes(1 / divisor), all_lanes(1))
        exponent = builder.shl(builder.fptosi(n, integers), ir.Constant(integers, [23] * vector.lanes))
        return builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), vector.llvm)

    return vector(vector, types.float32), code


def _pointer(context, builder, array, data, first, pointee):
    start = context.make_array(array)(context, builder, data).data
    return builder.bitcast(builder.gep(start, [first]), pointee.as_pointer())


def _spread(builder, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    lane = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(INT, lanes), None))


def _call(builder, name, result, operands, flags=()):
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, operands, fastmath=flags)
