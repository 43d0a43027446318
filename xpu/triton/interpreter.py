"""Triton's interpreter as the kernels need it: with bfloat16 that rounds to nearest and that `tl.dot` multiplies as numbers.

With TRITON_INTERPRET=1 kernels run as Python over NumPy, which has no bfloat16: Triton 3.9 keeps its bits as integers, cuts bits off
where a GPU rounds, and multiplies the integers in `tl.dot`. `repair` mends both, so that no kernel has to know who runs it. It also keeps
the interpreter from replacing the language's functions again at every call of one kernel function by another: a third of the time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

#: Whether kernels of this process are interpreted; Triton decides it where a kernel is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def _widen(bits: Any) -> Any:
    from triton.runtime.interpreter import np

    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Any) -> Any:
    from triton.runtime.interpreter import np

    bits = np.ascontiguousarray(values).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Replace the interpreter's conversions and products of bfloat16; once, and only where kernels are interpreted."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "llmrt_repaired"):
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def new_cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return new_cast(self, handle(_widen(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(_narrow(cast(self, src, tl.float32).data), tl.bfloat16)
        return src if source == target else cast(self, src, dst_type)

    def new_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (handle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *args)

    builder.cast_impl, builder.create_dot, builder.llmrt_repaired = new_cast, new_dot, True
    interpreter._patch_lang = _patching_once(interpreter)


def _patching_once(interpreter: Any) -> Any:
    """Return the function that replaces what a kernel function sees of the language, doing nothing where that has been done."""
    patch = interpreter._patch_lang
    done: set[tuple[int, ...]] = set()

    def patch_once(function: Any) -> Any:
        modules = tuple(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if modules in done:
            return interpreter._LangPatchScope()
        scope, outermost = patch(function), not done
        done.add(modules)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                restore()
                done.clear()

            scope.restore = restore_all
        return scope

    return patch_once


if INTERPRETED:
    repair()
