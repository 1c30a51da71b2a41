"""Peak memory of one call beyond what was allocated before it: results included, inputs not.

On a GPU the allocator reports it, for the call that will be timed. On a CPU a fresh process for each provider runs the
call once while the kernel records the highest resident size (``VmHWM``, reset through ``/proc/self/clear_refs``).
Nothing is sampled, so no peak is missed; the heap returns freed blocks of a megabyte and more at once, so resident
memory is memory in use. The call is warmed up first (on a small problem, or on the same one if it compiles), because
thread stacks and library buffers that are allocated once do not belong to the call.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Call, Case, Provider, Unavailable
from ccu_fast.ops.reduce_similarity.native import buffers

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_extra_bytes(case: Case, provider: Provider, call: Call) -> int:
    """Bytes one call needs at its peak beyond its inputs.

    Args:
        case: what is measured.
        provider: who computes it; on a CPU it is built again, in its own process.
        call: what the provider has built; on a GPU it is called twice.

    Raises:
        Unavailable: the operating system does not record peaks, or the measuring process died.
    """
    if case.device.type == "cuda":
        return _on_gpu(call, case.device)
    if not _CLEAR_REFS.exists():
        raise Unavailable("peak memory on a CPU is read from Linux's /proc")
    return int(in_fresh_process(_on_cpu, case, provider, torch.get_num_threads()))


def peak_of(call: Callable[[], object]) -> int:
    """Growth of this process's resident size while ``call`` runs, at its peak; buffers that we keep count as new."""
    before, peak = peaks_of(call)
    return max(0, peak - before)


def peaks_of(call: Callable[[], object]) -> tuple[int, int]:
    """Resident size of this process before ``call``, and at its peak while it runs."""
    gc.collect()
    buffers.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # free heap pages that stay resident would be reused by the call and not be seen
        trim(0)
    _CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    out = call()
    peak = resident("VmHWM")
    del out
    return before, peak


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a new process that shares nothing with this one; torch is imported once for all of them.

    Raises:
        Unavailable: the process raised or died (out of memory, for example); the message says which.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, before any thread exists; the compiler because it takes longest.
        context.set_forkserver_preload(["benchmarks.ops", "torch._inductor.compile_fx"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_reply, args=(send, function, args))
    process.start()
    send.close()
    try:
        ok, value = receive.recv()
    except EOFError:
        process.join()
        raise Unavailable(f"the measuring process died with exit code {process.exitcode}") from None
    except BaseException:
        process.kill()
        raise
    process.join()
    if not ok:
        raise Unavailable(f"the measuring process raised {value}")
    return value


def _reply(send: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    return_freed_blocks()
    try:
        send.send((True, function(*args)))
    except Exception as error:
        send.send((False, f"{type(error).__name__}: {error}"))


def return_freed_blocks() -> None:
    """From now on this process gives freed blocks of a megabyte and more back at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # glibc raises both thresholds as large blocks are freed, to 32 and 64 MiB, unless they are set.
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def _on_cpu(case: Case, provider: Provider, threads: int) -> int:
    torch.set_num_threads(threads)
    small = Case(case.op, case.op.quick[0], case.dtype, case.device)
    if not provider.compiled and provider.serves(small.shape, "cpu"):
        provider.build(small.inputs(), small.shape)()
    call = provider.build(case.inputs(), case.shape)
    if provider.compiled:
        call()
    return peak_of(call)


def _on_gpu(call: Call, device: torch.device) -> int:
    call()
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del out
    return peak - before


def resident(field: str) -> int:
    """Bytes of a line of ``/proc/self/status``: ``VmRSS``, resident now; ``VmHWM``, at most."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
