"""What came of the combinations, as a Markdown document."""

from __future__ import annotations

from typing import Any

HEAD = """# Beside other packs

What guidance does together with other packs' nodes and with ComfyUI's own, each combination run as it is and again with
guidance. Made by

```
nox -s packs -- --packs FOLDER
```

where FOLDER holds clones of the packs (of ComfyUI_UltimateSDUpscale with its submodule); nothing is downloaded. The demo
model, {pictures} pictures, 20 steps and cfg 3 unless told. *px*: mean distance of 14 joints from where they should be, in
finished pictures, by an estimator that has nothing to do with the head that steers; larger pictures are shrunk to 128 px.
*readout*, where such a figure makes no sense: the mean square difference of the head's readout of the finished latent from
the control.

- **holds**: within 1.5 times of ComfyUI's euler guided; a readout: at most half the unguided one. **partly**: at most half
  the unguided error. **weakly**: below it. **worse**: not.
- **broken**: the guided picture is garbage (its latent is not finite, or its deviation is off by a quarter); **broken
  unguided**: it is so by itself. **no effect**: as unguided, to the bit.
- **restored**: weights, hooks, replaced forwards, ComfyUI's functions, and the options, wrappers and patches of the patcher
  that was given are as before, to the bit.
"""


def document(report: dict[str, Any]) -> str:
    """docs/packs.md of what packs.json holds."""
    entries = list(report.values())
    pictures = max((entry.get("pictures", 0) for entry in entries), default=0)
    parts = [HEAD.format(pictures=pictures)]
    parts += ["| pack | version | ComfyUI | loaded | combinations | hold |", "|---|---|---|---|---|---|"]
    for entry in entries:
        rows = entry["rows"]
        held = sum(row["verdict"].startswith(("holds", "as asked")) for row in rows)
        loaded = cell(f"in part: {entry['loading']}") if entry["loading"] else "yes"
        loaded = loaded if entry["found"] else "not found"
        parts.append(f"| {entry['pack']} | {entry['version']} | {entry['comfyui']} | {loaded} | {len(rows)} | {held} |")
    for entry in entries:
        if entry["rows"]:
            parts += ["", *section(entry)]
    return "\n".join(parts) + "\n"


def section(entry: dict[str, Any]) -> list[str]:
    """A pack's own table."""
    unguided, guided = entry["euler"]
    return [
        f"## {entry['pack']} {entry['version']}".rstrip() + f", ComfyUI {entry['comfyui']}",
        "",
        f"ComfyUI's euler: {unguided:.1f} px unguided, {guided:.1f} px guided.",
        "",
        "| node | tried | unguided | guided | | restored | said |",
        "|---|---|---|---|---|---|---|",
        *(table_row(row) for row in entry["rows"]),
    ]


def table_row(row: dict[str, Any]) -> str:
    restored = {True: "yes", False: f"no: {', '.join(row['left'][:3])}", None: ""}[row["restored"]]
    figures = figure(row, "unguided"), figure(row, "guided")
    cells = [row["nodes"], row["tried"], *figures, row["verdict"], restored, message(row)]
    return "| " + " | ".join(map(cell, cells)) + " |"


def message(row: dict[str, Any]) -> str:
    """What the run said: why it failed, its warnings, and what is odd about it."""
    more = [f"and {len(row['said']) - 1} more"] if len(row["said"]) > 1 else []
    said = [row["failed"].partition(": ")[2], *row["said"][:1], *more]
    if row["from_plain"] == 0 and not row["same"]:
        said.append("unguided it is what KSampler makes: nothing was tried")
    if row["same"] and row["from_plain"] > 1e-3:
        said.append("unguided it is not what KSampler makes")
    return "; ".join(part.removeprefix("Readout guidance: ") for part in said if part)


def figure(row: dict[str, Any], which: str) -> str:
    value = row[which]
    if value != value:
        return ""
    return f"{value:.1f} px" if row["unit"] == "px" else f"{value:.4f}"


def cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
