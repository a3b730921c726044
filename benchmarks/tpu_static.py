"""Cycles of a TPU kernel, counted without a TPU.

    python -m benchmarks.tpu_static FILE.py:FUNC TOPOLOGY

FUNC() returns (fn, [args], flops), flops a number or None. From Python, imported before anything
initialises libtpu:

    from benchmarks import tpu_static as ts
    for k in ts.measure(fn, ts.struct((1, 24, 4608, 128)), ..., topology="v6e:2x2"):
        print(ts.describe(k, flops=...))

The function is compiled ahead of time, and libtpu dumps the scheduled VLIW program (LLO). What the
scalar unit does is executed here (loop counters, grid bookkeeping, predicates, branches); vector
work is only counted. For each kernel this gives the bundles issued (a bundle is a cycle; the
schedule has empty bundles for the latency and occupancy of MXU, XLU and EUP), how busy each unit
is, register spills, VMEM use, HBM traffic and an estimate of the stalls on DMA.

Checked against figures of hardware in public documents: v4 cycle counters (a constant offset, then
within 1 cycle in 435); v5e matmuls of 4096^3 and 8192^3, XLA's and Pallas's (within 2-4 % after
about 0.11 ms of host dispatch is taken off). Not modelled: HBM page and stride inefficiency, VMEM
bank conflicts, loading of instruction overlays, clock throttling, host launch overhead.
"""

import collections
import dataclasses
import functools
import glob
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# libtpu reads these once. A second import under another name shares the first one's dump folder.
if not os.environ.get("TPU_STATIC_DUMP"):
    os.environ["TPU_STATIC_DUMP"] = tempfile.mkdtemp(prefix="tpu_static_")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if (
    _flags := f"--xla_jf_dump_to={os.environ['TPU_STATIC_DUMP']} --xla_jf_dump_llo_text=true"
) not in os.environ.get("LIBTPU_INIT_ARGS", ""):
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_flags}".strip()

import jax
from jax.experimental import topologies

from taca_jax.parallel.chips import CHIPS, Chip

DUMP = os.environ["TPU_STATIC_DUMP"]  # emptied by every measurement
DELAY_SLOTS = 4  # bundles executed after a taken branch
UNITS = (
    *("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP"),
    *("VLOAD", "FILL", "VSTORE", "SPILL", "SALU"),
)
DMA_LATENCY_S = 0.45e-6  # fits the published v5e timings of the 128x128x128-block matmul
GRANULE = 32  # bytes
IMEM_BUNDLES = 65536  # a longer kernel is swapped in pieces inside its own loop


@dataclasses.dataclass
class KernelStats:
    """What one kernel costs; times in cycles of one TensorCore."""

    name: str
    chip: Chip
    cycles: int = 0  # issued bundles
    stall: int = 0  # modelled DMA waits
    units: dict[str, float] = dataclasses.field(default_factory=dict)  # unit -> busy fraction
    spills: int = 0
    fills: int = 0
    vmem: int = 0
    code_bundles: int = 0
    hbm_bytes: int = 0
    # (cycles, first bundle, last + 1, runs) of every straight-line piece, hottest first
    hot: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    loops: list[str] = dataclasses.field(default_factory=list)
    warnings: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unit_ops: dict[str, int] = dataclasses.field(default_factory=dict)
    temp_bytes: int = 0  # of the whole program

    @property
    def ms(self) -> float:
        """Milliseconds at the chip's clock, stalls included."""
        return (self.cycles + self.stall) / self.chip.clock * 1e3


def core_bandwidth(chip: Chip) -> float:
    """Bytes/s between HBM and one core, where all cores of the chip read at once."""
    return chip.memory_bandwidth / chip.cores


def struct(shape: Sequence[int], dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    """An argument of that shape, to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def _topology(name: str) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def compile_tpu(fn: Callable, *args: Any, topology: str = "v5e:2x2") -> jax.stages.Compiled:
    """Compile `fn` ahead of time for one device of `topology`."""
    # A one-device mesh whose abstract device is the TPU: lowering rules ask it
    # for the chip generation (they would otherwise see the host's CPU).
    mesh = jax.sharding.Mesh([_topology(topology).devices[0]], ("x",))
    one = jax.sharding.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), args)
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*placed).compile()


def measure(
    fn: Callable,
    *args: Any,
    topology: str = "v5e:2x2",
    keep: str | os.PathLike[str] | None = None,
    rare_branches: bool = True,  # False: skip what a branch on run-time data guards
) -> list[KernelStats]:
    """Compile `fn` and count each of its kernels; `keep`: a folder for a copy of the dump."""
    shutil.rmtree(DUMP, ignore_errors=True)
    os.makedirs(DUMP, exist_ok=True)
    compiled = compile_tpu(fn, *args, topology=topology)
    try:
        out = analyse_dump(DUMP, CHIPS[topology.split(":")[0]], rare_branches=rare_branches)
    finally:
        if keep:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(DUMP, keep)
        shutil.rmtree(DUMP, ignore_errors=True)
    for k in out:
        k.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return out


class _Unknown:
    """A value the interpreter cannot know: from memory or from a vector."""

    def _u(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _u
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _u
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _u
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _u
    __hash__ = object.__hash__


U = _Unknown()


def _not(p):
    return U if p is U else not p


def _and(a, b):
    return False if a is False or b is False else U if a is U or b is U else bool(a and b)


def _or(a, b):
    return True if a is True or b is True else U if a is U or b is U else bool(a or b)


def _sel(p, a, b):
    return (a if a is b else U) if p is U else (a if p else b)


def _known(f):
    return lambda a, b: U if a is U or b is U else f(a, b)


_min, _max, _xor = _known(min), _known(max), _known(lambda a, b: bool(a) != bool(b))
# LLO's scalar ops of two operands, as Python
_SIGNS = {"sadd": "+", "ssub": "-", "smul": "*", "sand": "&", "sor": "|", "sxor": "^"}
_CALLS = {"smin": "_min", "smax": "_max", "por": "_or", "pand": "_and", "pxor": "_xor"}
_BIN = {
    **{op: f"({{0}}{sign}{{1}})" for op, sign in _SIGNS.items()},
    **{op: f"{call}({{0}},{{1}})" for op, call in _CALLS.items()},
    "sshll": "(((({0}<<{1})+0x80000000)&0xFFFFFFFF)-0x80000000)",  # back to a signed word
    "sshra": "({0}>>{1})",
    "sshrl": "(({0}&0xFFFFFFFF)>>{1})",
    "smulhi": "(({0}&0xFFFFFFFF)*({1}&0xFFFFFFFF)>>32)",
    "pnand": "_not(_and({0},{1}))",
    "pnor": "_not(_or({0},{1}))",
}
_CMP = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

_BUNDLE = re.compile(
    r"(?ms)^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{(.*?)\}[^\n}]*$"
    r"(?=\n *(?:0x|0 |\Z)|\s*\Z)"
)
_ALLOCATION = re.compile(
    r"#(allocation\w+) \[shape = '[^']*', space=(\w+), size = (\w+)[^\]]*?"
    r"(?:tag = '([^']*)')?\]"
)
_OP = re.compile(  # result, name, suffixes, predicate, arguments
    r"(?s)(?:(%\w+) = )?([a-z_]+)((?:\.\w+)*)\s*"
    r"(?:\((!?%\w+_p\d+)(?:, %\w+)?\),?)?\s*(.*)"
)


@dataclasses.dataclass
class _Segment:
    """Straight-line code up to the end of a branch's delay slots, as Python source, then run."""

    start: int
    end: int
    target: int | None = None
    lines: list[str] = dataclasses.field(default_factory=list)
    run: Any = None
    use: list[int] = dataclasses.field(default_factory=list)  # operations per unit


class Program:
    """A scheduled LLO kernel: scalar ops per bundle, plus unit use per bundle."""

    def __init__(self, prefix: str, chip: Chip):
        def files(pattern):
            return glob.glob(glob.escape(prefix) + pattern)

        sched = [f for f in files("-*-packed-bundles-post-ra.txt") if "schedule-analysis" not in f]
        util = files("-*-pre-delay_hlo-static-per-bundle-utilization.txt")
        regions = files("-*-post-bundle-packing-post-ra.txt")
        if not (sched and util):
            raise FileNotFoundError(prefix)
        self.name = re.sub(r"^\d+-", "", os.path.basename(prefix))
        self.chip = chip
        self._layout(Path(regions[0]).read_text() if regions else "")
        text = Path(sched[0]).read_text()
        text = re.sub(r"/\*(size_in_granules|dst_syncflagno)=\*/", r"@\1 ", text)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.bundles = []
        for m in _BUNDLE.finditer(text):
            assert int(m[1], 16) == len(self.bundles), (m[1], len(self.bundles))
            self.bundles.append([o.strip() for o in m[2].split(";;") if o.strip()])
        rows = re.findall(r"^[0-9 ]+$", Path(util[0]).read_text(), re.M)
        self.capacity, *self.util = (tuple(map(int, row.split())) for row in rows)
        self.segments = {}

    def _layout(self, text):
        self.base, self.zero, self.vmem = {}, set(), 0
        self.loops = re.findall(r"loop: (.*)", text)
        for m in _ALLOCATION.finditer(text):
            if m[1] in self.base:
                continue
            self.base[m[1]] = (len(self.base) + 1) << 24
            if "core index" in (m[4] or ""):
                self.zero.add(self.base[m[1]])
            if m[2] == "vmem":
                self.vmem += int(m[3], 16)

    def _alloc(self, name):
        return self.base.setdefault(name, (len(self.base) + 1) << 24)

    def _val(self, a):
        a = a.strip()
        if m := re.fullmatch(r"(!?)%\w+_([sp])(\d+)", a):
            e = f"{m[2].upper()}[{m[3]}]"
            return f"_not({e})" if m[1] else e
        if m := re.fullmatch(r"\[#(\w+)(?: \+ \$(\w+))?\]", a):
            return str(self._alloc(m[1]) + int(m[2] or "0", 16))
        if re.fullmatch(r"-?\d+", a):
            v = int(a)
            return str(v - 2**32 if v >= 2**31 else v)
        return "U"

    def _addr(self, a):  # smem:[...]
        m = re.search(r"smem:\[([^\]]*)\]", a)
        inner = m[1] if m else a

        def term(t):
            if t.startswith("$"):
                return str(int(t[1:], 16))
            return str(self._alloc(t[1:])) if t.startswith("#") else self._val(t)

        return "+".join(term(t.strip()) for t in inner.split("+"))

    def _op(self, op, pc, seg, writes):
        """Translate one LLO op: an effect into a line of `seg`, a value into one of `writes`."""
        if not (m := _OP.match(op)):
            return
        dst, name, suffix, pred, rest = m.groups()
        cond = self._val(pred) if pred else "True"
        args = [x for x in re.split(r",\s*(?![^\[]*\])", rest) if x.strip()]
        if name.startswith("sbr"):
            t = re.search(r"target bundleno = (\d+)", rest)
            seg.target = int(t[1]) if t else None
            seg.end = min(seg.end, pc + 1 + DELAY_SLOTS)
            seg.lines.append(f"taken={cond}")
            return
        if name == "dma" and suffix == ".done.wait":
            flags = ",".join(map(self._val, args))
            seg.lines.append(f"if {cond} is not False: wait({pc - seg.start},[{flags}])")
            return
        if name == "dma":
            p = re.search(r"\((!?%\w+_p\d+)\)", op)
            cond = self._val(p[1]) if p else "True"
            size = re.search(r"@size_in_granules ([^,\s]+)", op)
            flag = re.search(r"@dst_syncflagno ([^,\s]+)", op)
            ops = ",".join(self._val(g[1]) if g else "U" for g in (size, flag))
            seg.lines.append(f"if {cond} is not False: dma({pc - seg.start},{suffix!r},[{ops}])")
            return
        if name == "sst":
            i = rest.rfind("]") + 1
            to, value = self._addr(rest[:i]), self._val(rest[i:].strip(" ,"))
            seg.lines.append(f"if {cond} is True: M[{to}]={value}")
            return
        d = re.fullmatch(r"%\w+_([sp])(\d+)", dst or "")
        if not d or name == "sphi":
            return
        tgt = f"{d[1].upper()}[{d[2]}]"
        v = [self._val(a) for a in args]
        if name == "sld":
            e = f"M.get({self._addr(rest)},U)"
        elif name in _BIN and len(v) == 2:
            e = _BIN[name].format(*v)
        elif name == "scmp" and len(v) == 2:
            c = _CMP[suffix.split(".")[1]]
            w = "({}&0xFFFFFFFF)" if ".u32" in suffix else "{}"
            e = f"({w.format(v[0])}{c}{w.format(v[1])})"
        elif name == "scalar_select":
            e = "_sel({},{},{})".format(*v)
        elif name == "int_to_ptr":  # a cast, usually in place
            e = self._val(rest.split("]")[-1])
            if e == tgt:
                return
        elif name in ("smov", "pmov"):
            e = v[-1]
        elif name == "pneg":
            e = f"_not({v[0]})"
        elif name == "scalar_lea":
            e = "(" + "+".join(v) + ")"
        elif name == "inlined_call_operand":
            e = "0"
        else:
            e = "U"
        if pred:
            e = f"_sel({cond},{e},{tgt})"
        writes.append((tgt, e))

    def segment(self, start: int) -> _Segment:
        """The straight-line code that begins at bundle `start`."""
        if start in self.segments:
            return self.segments[start]
        seg, pc = _Segment(start, len(self.bundles)), start
        while pc < seg.end:
            writes = []
            for op in self.bundles[pc]:
                self._op(op, pc, seg, writes)
            if writes:
                targets, values = zip(*writes, strict=True)
                seg.lines.append(f"{','.join(targets)} = {','.join(values)}")
            pc += 1
        body = "\n ".join(["taken=False", *seg.lines, "return taken"])
        namespace = {}
        exec(f"def run(S,P,M,dma,wait):\n {body}\n", globals(), namespace)
        seg.run = namespace["run"]
        seg.use = [sum(column) for column in zip(*self.util[start : seg.end], strict=True)]
        return self.segments.setdefault(start, seg)

    def run(self, *, rare_branches: bool = True, max_segments: int = 5_000_000) -> KernelStats:
        """Execute the scalar unit from the first bundle to the last."""
        size = len(self.bundles)
        st = KernelStats(self.name, self.chip, vmem=self.vmem, code_bundles=size, loops=self.loops)
        S, P, M = [U] * 64, [U] * 32, dict.fromkeys(self.zero, 0)
        now, stall, busy_until = 0, 0, 0.0
        bytes_per_cycle = core_bandwidth(self.chip) / self.chip.clock
        latency = DMA_LATENCY_S * self.chip.clock
        inflight = collections.defaultdict(collections.deque)
        seg_t0 = 0

        def dma(off, kind, ops):
            nonlocal busy_until
            gran, flag = ops
            if gran is U:
                st.warnings["DMA of unknown size"] += 1
                return
            nbytes = gran * GRANULE
            if "hbm" in kind:
                st.hbm_bytes += nbytes
            t = max(seg_t0 + off + stall, busy_until)
            busy_until = t + nbytes / bytes_per_cycle
            inflight[flag].append(busy_until + latency)

        def wait(off, ops):
            nonlocal stall
            if q := inflight.get(ops[0]):
                stall += max(0, int(q.popleft() - (seg_t0 + off + stall)))

        count, pc = collections.Counter(), 0
        for _ in range(max_segments):
            if pc >= size:
                break
            seg = self.segment(pc)
            end, target = seg.end, seg.target
            seg_t0 = now
            taken = seg.run(S, P, M, dma, wait)
            count[pc] += 1
            now += end - pc
            if taken is U:
                st.warnings[f"unknown branch at bundle {pc}..{end}"] += 1
                taken = not rare_branches and target is not None and target > pc
            pc = target if taken and target is not None else end
        else:
            st.warnings["segment limit reached"] += 1
        st.cycles, st.stall = now, stall
        tot = [0] * len(UNITS)
        for s, n in count.items():
            seg = self.segments[s]
            tot = [a + n * b for a, b in zip(tot, seg.use, strict=True)]
            st.hot.append((n * (seg.end - s), s, seg.end, n))
        st.hot.sort(reverse=True)
        busy = zip(UNITS, tot, self.capacity, strict=True)
        st.units = {u: t / (c * max(now, 1)) for u, t, c in busy}
        st.fills, st.spills = tot[UNITS.index("FILL")], tot[UNITS.index("SPILL")]
        if size > IMEM_BUNDLES:
            st.warnings["code larger than instruction memory"] += 1
        st.unit_ops = dict(zip(UNITS, tot, strict=True))
        return st


def analyse_dump(path: str, chip: Chip, *, rare_branches: bool = True) -> list[KernelStats]:
    """Count every kernel that libtpu dumped into the folder `path`."""
    out = []
    for f in sorted(glob.glob(os.path.join(glob.escape(path), "*-packed-bundles-post-ra.txt"))):
        m = re.match(r"(.*?)-\d+-packed-bundles-post-ra\.txt$", f)
        if not m or "schedule-analysis" in f or "late-" in f or re.search(r"-TLP-|-TLP$", m[1]):
            continue
        out.append(Program(m[1], chip).run(rare_branches=rare_branches))
    return out


def describe(k: KernelStats, flops: float | None = None, hot: int = 3) -> str:
    """Lines to print: cost, busy units, share of the peak for `flops`, `hot` hottest pieces."""
    c = k.chip
    busy = " ".join(f"{u} {v:.0%}" for u, v in k.units.items() if v > 0.005)
    cost = (
        f"{k.name}: {k.cycles:,} cycles (+{k.stall:,} DMA stall) = {k.ms:.3f} ms; "
        f"code {k.code_bundles} bundles; VMEM {k.vmem / 2**20:.1f} MiB; "
        f"HBM {k.hbm_bytes / 1e6:.0f} MB ({k.hbm_bytes / core_bandwidth(c) * 1e3:.3f} ms)"
    )
    s = [cost, f"  busy: {busy}; spill/fill ops {k.spills:,}/{k.fills:,}"]
    if flops:
        ideal = flops / c.core_flop_per_cycle / c.cores
        share = ideal / (k.cycles + k.stall)
        s.append(f"  peak-FLOP cycles {ideal:,.0f} -> {share:.1%} of peak; loops {k.loops}")
    for cyc, a, b, n in k.hot[:hot]:
        s.append(f"  hot bundles [{a},{b}) x {n} = {cyc:,} cycles ({cyc / max(1, k.cycles):.0%})")
    for w, n in k.warnings.items():
        s.append(f"  WARNING {w} x{n}")
    return "\n".join(s)


if __name__ == "__main__":
    sys.modules["benchmarks.tpu_static"] = sys.modules["__main__"]  # for FILE.py's own import
    path, func = sys.argv[1].split(":")
    fn, args, flops = runpy.run_path(path)[func]()
    for k in measure(fn, *args, topology=sys.argv[2]):
        print(describe(k, flops))
