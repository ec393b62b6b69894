"""Repairs of Triton's interpreter, which runs the Triton kernels in the tests and in the dry run of benchmarks/gpu."""

import inspect
from functools import cache

import numpy as np
import torch
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def repair() -> None:
    """Once per process, with TRITON_INTERPRET=1 set before triton is imported."""
    _take_an_element_for_an_index()
    _patch_the_language_once()
    _round_to_bfloat16()
    _look_for_overflows_in_numpy()
    _look_up_types_once()
    _describe_blocks_once()


def _take_an_element_for_an_index() -> None:
    """Triton 3.5 and 3.6 take the int() of an array of one element, which numpy 2.4 refuses (triton issue 9171)."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor


def _patch_the_language_once() -> None:
    """The interpreter patches triton.language anew for every device function called, half of its time."""
    patch = interpreter._patch_lang

    def patch_all(fn):  # a kernel is launched: patch what its device functions, Triton's own included, will need
        core = patch(inspect.unwrap(interpreter.tl.max.fn))
        launch = patch(fn)
        if launch is not None:  # Triton 3.5 leaves the language patched
            launch.restore, restore = lambda: (restore(), core.restore()), launch.restore
        return launch

    interpreter._patch_lang = patch_all
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def _round_to_bfloat16() -> None:
    """The interpreter cuts fp32 off to bfloat16 (Triton 3.7); GPUs round to nearest."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar != interpreter.tl.float32 or dst_type.scalar != interpreter.tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast


def _look_for_overflows_in_numpy() -> None:
    """Triton checks each sum, difference and product of integers by eight of its own: a quarter of the time."""

    def check(self, lhs, rhs, operation):
        bits = lhs.type.scalar.int_bitwidth
        if bits >= 64 or not self.builder.options.sanitize_overflow:
            return
        wide = WIDE[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = lhs.type.scalar.get_int_min_value(), lhs.type.scalar.get_int_max_value()
        if wide.size and not low <= wide.min() <= wide.max() <= high:
            raise OverflowError(f"int{bits} overflow in {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _look_up_types_once() -> None:
    """The interpreter makes a table of 18 types whenever it wants the NumPy type of one."""
    look_up = interpreter._get_np_dtype
    of_numbers = cache(look_up)

    def of_any(triton_type):
        element = triton_type.scalar
        return look_up(element) if element.is_ptr() else of_numbers(element)

    interpreter._get_np_dtype = of_any


def _describe_blocks_once() -> None:
    """Each block makes its shape and type anew, of objects for each size: a quarter of the time."""
    of_types: dict[tuple, dict] = {}
    of_shapes: dict[tuple, tuple] = {}
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__

    def type_init(self, element_ty, shape):
        key = str(element_ty), tuple([getattr(size, "value", size) for size in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = vars(self).copy()
        vars(self).update(of_types[key], element_ty=element_ty)

    def tensor_init(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in of_shapes:
            make_tensor(self, handle, type)
            of_shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_shapes[key]

    tl.block_type.__init__, tl.tensor.__init__ = type_init, tensor_init
