"""Draws docs/graph.svg, the README's picture of the asset graph, from the definitions themselves.

    python docs/draw_graph.py [FILE]

One band a group, in the order in which groups depend on each other. An arrow that follows from two
others is left out. A test draws it again and compares.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

import dagster as dg

PICTURE = Path(__file__).with_name("graph.svg")

# Live metrics are one node a model and stage, and nothing is built on them.
_LEFT_OUT = "live_metrics"
_WIDTH, _MARGIN, _LABEL, _GUTTER = 900, 12, 100, 44
_BAND, _GAP, _BOX = 62, 22, 40
_FILL = {"shard": "#dbeafe", "model": "#dcfce7", "none": "#f1f5f9"}
_STROKE = {"shard": "#2563eb", "model": "#15803d", "none": "#64748b"}
_ARROW = 'fill="none" stroke="#475569" stroke-width="1.3" marker-end="url(#tip)"'
_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="13" \
font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">
<title>The asset graph of dagster-nanochat</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#475569"/></marker></defs>
<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """An asset: its group, what it is partitioned by, what it is made from, how many checks it has."""

    name: str
    group: str
    partition: str
    parents: frozenset[str]
    checks: int
    description: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """Where a node is drawn: its left upper corner and width, and the number of its band."""

    x: float
    y: float
    width: float
    band: int

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def centre(self) -> float:
        return self.y + _BOX / 2


def read_nodes() -> dict[str, Node]:
    """The assets of the code location, without live metrics."""
    from dagster_nanochat.definitions import defs
    from dagster_nanochat.partitions import model_partitions, shard_partitions

    kinds = {model_partitions: "model", shard_partitions: "shard"}
    graph = defs().resolve_asset_graph()
    nodes = {}
    for key in graph.get_all_asset_keys():
        asset = graph.get(key)
        if key.path[0] == _LEFT_OUT:
            continue
        name = key.to_user_string()
        nodes[name] = Node(
            name=name,
            group=asset.group_name or "default",
            partition=kinds.get(asset.partitions_def, "none") if asset.partitions_def else "none",
            parents=frozenset(parent.to_user_string() for parent in asset.parent_keys),
            checks=len(asset.check_keys),
            description=(asset.description or "").split("\n")[0],
        )
    return dict(sorted(nodes.items()))


def ancestors(nodes: dict[str, Node], name: str) -> frozenset[str]:
    found: set[str] = set()
    waiting = list(nodes[name].parents)
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found.add(parent)
            waiting += nodes[parent].parents
    return frozenset(found)


def arrows(nodes: dict[str, Node]) -> list[tuple[str, str]]:
    """Parent and child, but for the arrows that follow from others."""
    above = {name: ancestors(nodes, name) for name in nodes}
    return [
        (parent, node.name)
        for node in nodes.values()
        for parent in sorted(node.parents)
        if not any(parent in above[other] for other in node.parents)
    ]


def place(nodes: dict[str, Node]) -> tuple[dict[str, Box], list[str]]:
    """Boxes by name, and what each band is called: groups that are equally far down share one."""
    depth = {name: len(ancestors(nodes, name)) for name in nodes}
    furthest = {node.group: 0 for node in nodes.values()}
    for node in nodes.values():
        furthest[node.group] = max(furthest[node.group], depth[node.name])
    bands = sorted(set(furthest.values()))
    titles = [", ".join(sorted(g for g in furthest if furthest[g] == far)) for far in bands]
    boxes = {}
    left = _MARGIN + _LABEL + _GUTTER
    for band, far in enumerate(bands):
        inside = {node.name: node for node in nodes.values() if furthest[node.group] == far}
        linked = {name for node in inside.values() for name in (node.parents & inside.keys())}
        linked |= {name for name, node in inside.items() if node.parents & inside.keys()}
        # What is made from each other stands side by side, in its order; what stands alone comes last.
        order = sorted(inside, key=lambda name: (name not in linked, depth[name], name))
        cell = (_WIDTH - _MARGIN - left) / max(3, len(order))
        for index, name in enumerate(order):
            width = min(cell - 14, max(120, 8.2 * len(name) + 20))
            boxes[name] = Box(
                x=left + index * cell + (cell - width) / 2,
                y=_MARGIN + band * (_BAND + _GAP) + (_BAND - _BOX) / 2,
                width=width,
                band=band,
            )
    return boxes, titles


def path(start: Box, end: Box, lane: int) -> str:
    """The line from one box to another: sideways in a band, down to the next, else by the gutter."""
    below, at = round(start.y + _BOX), round(end.centre)
    from_x, to_x = round(start.middle), round(end.middle)
    if start.band == end.band:
        return f"M{start.x + start.width:.0f},{at} L{end.x - 5:.0f},{at}"
    if end.band == start.band + 1:
        above = round(end.y - 5)
        return f"M{from_x},{below} C{from_x},{below + 34} {to_x},{above - 34} {to_x},{above}"
    x = _MARGIN + _LABEL + _GUTTER - 8 - 7 * lane
    turn = round(start.y + _BOX + (_BAND - _BOX) / 2 + _GAP / 2) - 3 + 6 * lane
    return (
        f"M{from_x},{below} C{from_x},{turn} {from_x},{turn} {from_x - 20},{turn} "
        f"L{x + 10},{turn} Q{x},{turn} {x},{turn + 10} "
        f"L{x},{at - 10} Q{x},{at} {x + 10},{at} L{end.x - 5:.0f},{at}"
    )


def draw(nodes: dict[str, Node]) -> str:
    """The picture as SVG text."""
    boxes, titles = place(nodes)
    height = 2 * _MARGIN + len(titles) * (_BAND + _GAP) - _GAP + 26
    lines = [_HEAD.format(width=_WIDTH, height=height)]
    for band, title in enumerate(titles):
        y = _MARGIN + band * (_BAND + _GAP)
        lines.append(
            f'<rect x="{_MARGIN}" y="{y}" width="{_WIDTH - 2 * _MARGIN}" height="{_BAND}" rx="6" '
            f'fill="#f8fafc"/><text x="{_MARGIN + 10}" y="{y + _BAND // 2 + 4}" fill="#334155" '
            f'font-weight="600">{escape(title)}</text>'
        )
    lanes: dict[str, int] = {}
    for parent, child in arrows(nodes):
        start, end = boxes[parent], boxes[child]
        lane = lanes.setdefault(parent, len(lanes)) if end.band > start.band + 1 else 0
        lines.append(f'<path d="{path(start, end, lane)}" {_ARROW}/>')
    lines += [line for node in nodes.values() for line in _box_lines(node, boxes[node.name])]
    lines += _legend(height - _MARGIN, {node.partition for node in nodes.values()})
    return "\n".join([*lines, "</svg>", ""])


def _box_lines(node: Node, box: Box) -> Iterable[str]:
    style = f'fill="{_FILL[node.partition]}" stroke="{_STROKE[node.partition]}"'
    yield (
        f"<g><title>{escape(node.description)}</title>"
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{_BOX}" rx="6" {style}/>'
    )
    name_y = box.centre + (0 if node.checks else 5)
    yield f'<text x="{box.middle:.0f}" y="{name_y:.0f}" text-anchor="middle">{escape(node.name)}</text>'
    if node.checks:
        checks = f"{node.checks} check{'s' if node.checks > 1 else ''}"
        yield (
            f'<text x="{box.middle:.0f}" y="{box.centre + 14:.0f}" text-anchor="middle" font-size="10" '
            f'fill="#475569">{checks}</text>'
        )
    yield "</g>"


def _legend(y: float, used: set[str]) -> Iterable[str]:
    x = _MARGIN + 10
    texts = {"shard": "one partition a shard", "model": "one partition a model", "none": "external"}
    for kind, text in texts.items():
        if kind in used:
            yield (
                f'<rect x="{x}" y="{y - 11}" width="16" height="12" rx="3" fill="{_FILL[kind]}" '
                f'stroke="{_STROKE[kind]}"/>'
                f'<text x="{x + 23}" y="{y}" font-size="12" fill="#334155">{text}</text>'
            )
            x += 170


def main(arguments: list[str]) -> None:
    target = Path(arguments[0]) if arguments else PICTURE
    target.write_text(draw(read_nodes()), encoding="utf-8")
    print(f"{target}: {len(target.read_text(encoding='utf-8')):,} characters, dagster {dg.__version__}")


if __name__ == "__main__":
    main(sys.argv[1:])
