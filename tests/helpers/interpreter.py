"""Triton's CPU interpreter, made to round as hardware does, and means to look for mistakes that it hides.

The interpreter holds bfloat16 as bit patterns in uint16 and computes on those, truncates float32 to bfloat16, and
ignores TF32. `install` gives products and casts their true rounding, and any other arithmetic on raw bfloat16 an
error: kernels convert to float32 first. It also drops work without effect, most of the interpreter's time. Works for
Triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 with ten bits of mantissa, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(value: object) -> bool:
    return type(value) is _Handle and value.dtype.scalar.name == "bf16"


def install() -> None:
    """Patch the interpreter of this process."""
    if getattr(_Builder, "_rounds_as_hardware", False):
        return
    _Builder._rounds_as_hardware = True
    dot, cast = _Builder.create_dot, _Builder.cast_impl

    def create_dot(self, a, b, d, precision, imprecise):
        def operand(handle):
            if _is_bf16(handle):
                return _Handle(_widen(handle.data), tl.float32)
            if handle.dtype.scalar == tl.float32 and str(precision).split(".")[-1] == "TF32":
                return _Handle(_tf32(handle.data), tl.float32)
            return handle

        return dot(self, operand(a), operand(b), d, precision, imprecise)

    def cast_impl(self, source, target):
        given, wanted = source.dtype.scalar, target.scalar
        if given != tl.bfloat16 and wanted == tl.bfloat16:
            return _Handle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        if given == tl.bfloat16 and wanted != tl.bfloat16:
            source = _Handle(_widen(source.data), tl.float32)
        return cast(self, source, target)

    def refusing(method, what):
        def call(self, *args):
            for arg in args:
                if _is_bf16(arg):
                    raise TypeError(f"{what} on raw bfloat16: convert to float32 first")
            return method(self, *args)

        return call

    _Builder.create_dot, _Builder.cast_impl = create_dot, cast_impl
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(_Builder, name, refusing(getattr(_Builder, name), name))

    # Of NaN and a number, a GPU returns the number, unless the kernel asks for NaN.
    def extreme(function):
        return lambda self, a, b: self.binary_op(a, b, function)

    def clamp(self, x, low, high, propagate_nan):
        keeps = propagate_nan == tl.PropagateNan.ALL
        return self.ternary_op(x, low, high, np.clip if keeps else lambda x, low, high: np.fmin(np.fmax(x, low), high))

    _Builder.create_maxnumf, _Builder.create_minnumf = extreme(np.fmax), extreme(np.fmin)
    _Builder.create_clampf = clamp

    # Since Triton 3.9 loads and stores want masks of bool, which some of the interpreter's own ops make integers.
    def with_bools(method, place):
        def call(self, *args, **options):
            *before, mask = args[: place + 1]
            if isinstance(mask, _Handle):
                mask = _Handle(mask.data.astype(bool), tl.int1)
            return method(self, *before, mask, *args[place + 1 :], **options)

        return call

    _Builder.create_masked_load = with_bools(_Builder.create_masked_load, 1)
    _Builder.create_masked_store = with_bools(_Builder.create_masked_store, 2)

    apply = interpreter.ReduceScanOpInterface.apply

    def reduce(self, values):
        if any(_is_bf16(v.handle) for v in (values if isinstance(values, tuple) else (values,))):
            raise TypeError("reduction of raw bfloat16: convert to float32 first")
        return apply(self, values)

    interpreter.ReduceScanOpInterface.apply = reduce

    # Triton 3.6 with NumPy 2.4: int() of an array of one element raises inside range(tl.program_id(0), ...).
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *scopes):
        result = patch(tensor, *scopes)

        def index(self):
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        setter = next((scope for scope in scopes if hasattr(scope, "set_attr")), None)
        if setter is None:
            tensor.__index__ = index
        else:
            setter.set_attr(tensor, "__index__", index)
        return result

    interpreter._patch_lang_tensor = patch_tensor

    # Whether 32-bit sums overflow is computed in 64 bits, then asserted in debug mode alone, which is off.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # Each call of a device function patches the language again, which its kernel has done.
    patch_language, of_files = interpreter._patch_lang, {}

    def patch_once(fn):
        languages = of_files.get(fn.__module__)
        if languages is None:
            languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
            of_files[fn.__module__] = languages
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return contextlib.nullcontext()
        return patch_language(fn)

    interpreter._patch_lang = patch_once
    _share_types()


def _share_types() -> None:
    """What is the same for every value of one type and shape is made once, not with each value."""
    numpy_dtype, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = get_np_dtype

    core = tl.core
    describe, blocks = core.block_type.__init__, {}

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        key = (type(element_ty), element_ty.name, sizes)
        if key not in blocks:
            describe(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    core.block_type.__init__ = block_type

    @functools.cache
    def wrapped(sizes: tuple[int, ...]):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped(tuple(type.shape) if type.is_block() else ())

    core.tensor.__init__ = tensor

    semantic = interpreter.TritonSemantic
    promote = semantic.binary_op_type_checking_impl

    constants: dict[tuple, core.tensor] = {}  # numbers as operands of a type; nothing writes into a value

    def operands(self, lhs, rhs, *options):
        if type(lhs) is core.tensor and type(rhs) is core.tensor:
            if len(options) < 3 and lhs.type.name == rhs.type.name and not lhs.dtype.is_ptr():
                return lhs, rhs  # neither is converted nor broadcast; more options are of divisions
            return promote(self, lhs, rhs, *options)
        first = type(lhs) is core.tensor
        given, number = (lhs, rhs) if first else (rhs, lhs)
        if type(given) is not core.tensor or type(number) not in (int, float):
            return promote(self, lhs, rhs, *options)
        key = given.type.name, type(number), number, first, options
        if key not in constants:
            promoted = promote(self, lhs, rhs, *options)
            if promoted[not first] is not given:
                return promoted
            if len(constants) == 1000:
                constants.clear()
            constants[key] = promoted[first]
        return (given, constants[key]) if first else (constants[key], given)

    semantic.binary_op_type_checking_impl = operands

    for kind in (core.dtype, core.pointer_type):
        equal = kind.__eq__

        def same(self, other, equal=equal):
            return self is other or equal(self, other)

        kind.__eq__ = same


@contextlib.contextmanager
def reversed_grid() -> Iterator[None]:
    """Run programs last to first: what two programs write to one place then comes out differently."""
    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx

    def backward(x, y, z):
        forward(*(n - 1 - i for n, i in zip(builder.grid_dim, (x, y, z), strict=True)))

    builder.set_grid_idx = backward
    try:
        yield
    finally:
        del builder.set_grid_idx
