"""Put what the daemon answers the way a person reads it.

Pure: a JSON answer in, text out; the shapes are those of `docs/reference/json.md`.
"""

from __future__ import annotations

from typing import Any

from p2pgrid.node import show_links
from p2pgrid.node.console import size, table

GRID_FAILURE = 125
"""Exit code of `run` when a task ended without its guest's own status (docker's convention)."""

Answer = dict[str, Any]


def put(v: Answer) -> str:
    note = ""
    if v["freed"]:
        note = f"\n{size(v['freed'])} that the guest has freed stay behind: get will write them as zeros"
    elif not v["exact"]:
        note = f"\nits compression cannot be repeated: get will write a fresh {v['format']} file"
    return (
        f"{v['name']}  {v['disk']}\n"
        f"{size(v['size'])} in {v['chunks']} chunks and {v['holes']} holes, "
        f"{size(v['unique_bytes'])} of data, "
        f"{size(v['wire_bytes'])} on the wire{_update(v)}; {v['seconds']:.1f} s{note}"
        + (f"\n{exported(v)}" if "export" in v else "")
    )


def _update(v: Answer) -> str:
    """What it costs who has the disk that it is told by."""
    return f", {size(v['delta_bytes'])} for who has {v['parent'][:20]}…" if v["parent"] else ""


def get(v: Answer) -> str:
    same = (
        "byte-identical to what was put" if v["exact"] else f"same guest content, a fresh {v['format']} file"
    )
    return f"{v['path']}  {size(v['bytes'])}  {same}"


def exported(v: Answer) -> str:
    rest = v["export_bytes"] - v["export_written"]
    was = f", {size(rest)} were there" if rest else ""
    return (
        f"{v['export']}  {v['objects']} object(s), {v['packs']} pack(s), {size(v['export_bytes'])}{was}\n"
        f"once a web server offers it: p2pgrid get {v['disk']} --origin URL -o FILE"
    )


def disks(v: Answer) -> str:
    rows = [
        (d["name"], size(d["size"]), size(d["wire_bytes"]), d["holders"], _held(d), d["disk"][:20] + "…")
        for d in v["disks"]
    ]
    return table(rows, "NAME", "SIZE", "WIRE", "HOLDERS", "HELD HERE", "DISK")


def _held(d: Answer) -> str:
    return f"{100 * d['held'] // d['frames']} %" if d.get("frames") else "-"


def disk(v: Answer) -> str:
    lines = [
        f"name     {v['name']}",
        f"disk     {v['disk']}",
        f"content  {v['content']}",
        f"size     {size(v['size'])} ({v['size']} bytes), put as {v['format']}",
        *(
            [f"freed    {size(v['freed'])} of it read as zeros: the guest had freed them"]
            if v["freed"]
            else []
        ),
        *([f"parent   {v['parent']}: who has it fetches {size(v['delta_bytes'])}"] if v["parent"] else []),
        *(
            [
                f"chunks   {v['chunks']} of {size(v['chunk_size'])}, {v['holes']} more are holes",
                f"held     {v['held']} of {v['frames']} here",
            ]
            if v["chunks"] is not None
            else ["held     nothing here"]
        ),
        *(f"holder   {h['name']}  {h['peer']}" for h in v["holders"]),
    ]
    return "\n".join(lines)


def verified(v: Answer) -> str:
    lines = [_verified(d) for d in v["data"] if d["bad"]]
    if not lines:
        return f"all {v['checked']} chunks held here are good"
    return "\n".join(lines)


def _verified(d: Answer) -> str:
    rest = d["bad"] - d["repaired"]
    return f"{d['name']}: {d['bad']} bad chunk(s) found, {d['repaired']} repaired from peers" + (
        f", {rest} still missing" if rest else ""
    )


def jobs(v: Answer) -> str:
    rows = [(j["job"], j["name"] or "-", j["state"], _counts(j)) for j in v["jobs"]]
    return table(rows, "JOB", "NAME", "STATE", "TASKS")


def _counts(view: Answer) -> str:
    return ", ".join(f"{n} {state}" for state, n in view["counts"].items() if n)


def job(v: Answer) -> str:
    rows = [
        (
            t["index"],
            t["state"],
            t["node"] or "-",
            "-" if t["exit"] is None else t["exit"],
            t["attempts"],
            t["reason"] or "",
        )
        for t in v["tasks"]
    ]
    head = f"job {v['job']}  {v['state']}  disk {v['disk']}\n"
    if v["why"]:
        head += f"waiting: {v['why']}\n"
    return head + table(rows, "TASK", "STATE", "NODE", "EXIT", "TRIES", "NOTE")


def finished(v: Answer) -> str:
    return "\n".join([job(v), f"results: {v['results']}", *_failed(v.get("results_failed", []))])


def results(v: Answer) -> str:
    done = f"{v['folder']}  {v['tasks']} task(s), {v['files']} file(s), {size(v['bytes'])}"
    return "\n".join([done, *_failed(v.get("failed", []))])


def _failed(tasks: list[Answer]) -> list[str]:
    return [f"the result of task {t['index']} could not be written: {t['why']}" for t in tasks]


def nodes(v: Answer) -> str:
    rows = [
        (n["name"], ",".join(n["roles"]), n["state"], n["running"], ",".join(n["shares"]) or "-", n["peer"])
        for n in v["nodes"]
    ]
    return table(rows, "NAME", "ROLES", "STATE", "RUNNING", "SHARES", "PEER")


def status(v: Answer) -> str:
    lines = [
        f"{v['name']}  {v['peer']}  ({', '.join(v['roles'])})",
        f"grid     {v['grid']}  {'connected' if v['connected'] else 'out of reach, trying again'}",
        f"running  {', '.join(v['running']) or 'nothing'}",
        f"received {size(sum(v['received'].values()))}   served {size(sum(v['served'].values()))}",
        *([f"paused   {v['paused']}"] if v["paused"] else []),
        *(f"holds    {d['datum'][:24]}…  {d['chunks']}/{d['total']} chunks" for d in v["holds"]),
        *show_links.links(v["links"]),
    ]
    return "\n".join(lines)


def exit_code(view: Answer) -> int:
    """What `run` and `job wait` exit with: the guests' first status that is not 0."""
    for task in view["tasks"]:
        if task["state"] in ("error", "cancelled") or (task["state"] == "failed" and task["exit"] is None):
            return GRID_FAILURE
        if task["exit"]:
            return int(task["exit"])
    return 0


def prefs(v: Answer) -> str:
    now = v["now"]
    rows = [(name, v[name]) for name in v if name not in ("windows", "now", "schema")]
    rows += [("window", window) for window in v["windows"]] or [("window", "none")]
    holds = (
        f"nothing moves: {now['paused']}" if now["paused"] else f"at most {now['up']} up, {now['down']} down"
    )
    return table([*rows, ("now", holds)], "PREFERENCE", "VALUE")
