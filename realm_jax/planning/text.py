"""A plan as text: what people read."""

import io

from rich import box
from rich.console import Console
from rich.table import Table

from realm_jax.planning.plan import Plan, Step

WIDTH = 100


def render(plan: Plan, width: int = WIDTH) -> str:
    """The whole plan as tables, without control characters, lines of at most `width`."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    console.print(
        f"{plan.model}: {plan.architecture}, {plan.parameters / 1e9:,.2f} billion parameters, {' '.join(plan.types)}\n"
        f"on {plan.topology} ({plan.device}), mesh {mesh}, context {plan.context:,}, batch {plan.batch:,}"
    )
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print()
    for table in (_memory(plan), _collectives(plan), _limits(plan), _compiled(plan)):
        if table is not None:
            console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _memory(plan: Plan) -> Table:
    m = plan.memory
    table = _table("Memory of each device", "", "bytes", "")
    for what, count, remark in (
        ("device", m.total, f"{size(m.usable)} of it as JAX takes it" if m.usable != m.total else ""),
        ("weights, divided", m.weights_divided, ""),
        ("weights, on every device", m.weights_replicated, ""),
        ("cache", m.cache, f"{plan.batch:,} x {plan.context:,} tokens"),
        ("workspace, estimated", m.workspace, ""),
    ):
        table.add_row(what, size(count), remark)
    table.add_section()
    table.add_row("fits", "yes" if m.fits else "no", "")
    table.add_row("largest context, one request", f"{plan.largest_context:,}", "tokens")
    table.add_row(f"largest batch, {plan.context:,} tokens each", f"{plan.largest_batch:,}", "requests")
    return table


def _collectives(plan: Plan) -> Table | None:
    if not plan.collectives:
        return None
    table = _table("Collectives of a step", "", "over", "a step", "devices", "each, per token", "sent, per token")
    for c in plan.collectives:
        table.add_row(
            f"{c.operation}, {c.what}",
            ",".join(c.axes),
            f"{c.count}",
            f"{c.devices}",
            size(c.token_bytes),
            size(c.moved),
        )
    table.add_section()
    table.add_row(
        "each device, in all", "", f"{sum(c.count for c in plan.collectives)}", "", "", size(plan.moved_per_token)
    )
    return table


def _limits(plan: Plan) -> Table:
    table = _table(
        f"Limits at {plan.context:,} tokens of context, by the device's published figures",
        "step",
        "reads",
        "memory",
        "compute",
        "interconnect",
        "tokens/s",
        "bound by",
    )

    def add(what: str, step: Step) -> None:
        table.add_row(
            what,
            size(step.bytes_read),
            _time(step.memory_seconds),
            _time(step.compute_seconds),
            _time(step.interconnect_seconds),
            f"{step.tokens_per_second:,.0f}" if step.tokens_per_second >= 10 else f"{step.tokens_per_second:.2g}",
            step.bound,
        )

    for step in plan.decode:
        add(f"decode, {step.batch:,} request{'s' * (step.batch > 1)}", step)
    add(f"prefill, {plan.prefill.batch:,} tokens", plan.prefill)
    return table


def _compiled(plan: Plan) -> Table | None:
    c = plan.compiled
    if c is None:
        return None
    table = _table(f"The decode step of {plan.batch:,} requests, {c.target}", "", "")
    for what, count in (
        ("arguments: weights and cache", c.argument_bytes),
        ("outputs", c.output_bytes),
        ("of these in arguments' place", c.aliased_bytes),
        ("temporary", c.temporary_bytes),
    ):
        if count is not None:
            table.add_row(what, size(count))
    table.add_row("backend", c.backend)
    for what, names in (("kernels", c.kernels), ("collectives", c.collectives)):
        table.add_row(f"{what}, those of a loop once", ", ".join(f"{n} {name}" for name, n in names.items()) or "none")
    table.add_row("seconds", f"{c.seconds:.1f}")
    return table


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _time(seconds: float) -> str:
    if seconds == 0:
        return "-"
    unit, scaled = next(
        ((unit, seconds * scale) for unit, scale in (("s", 1.0), ("ms", 1e3)) if seconds * scale >= 1),
        ("us", seconds * 1e6),
    )
    return f"{scaled:.2f} {unit}" if scaled < 10 else f"{scaled:.1f} {unit}"
